"""What every open-set score shares: a linear head, fitting in batches, a decision, and files."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from cenote.inspection.open_set_files import read_config, read_tensors, write_score
from cenote.inspection.open_set_head import linear_head
from cenote.inspection.open_set_input import CHUNK, Batches, as_batches, checked_features, checked_labels
from cenote.ops.masked import widen

S = TypeVar("S", bound="OpenSetScore")


class OpenSetScore(ABC):
    """How much an item looks like a member of the class it is predicted as; high for knowns.

    Features are the input of the last linear layer, exactly: after pooling and normalisation, dropout off, so that
    ``logits = features W^T + b`` (:meth:`check_logits` tells). For a :class:`cenote.probe.Readout` they are
    ``readout.norm(readout.vector(features))``.

    Args:
        weight: W, ``(classes, dim)``.
        bias: b, ``(classes,)``; zeros if ``None``.
        settings: what the method was built with, JSON-able.

    Attributes:
        name: of the method, in :data:`cenote.inspection.OPEN_SET_SCORES`.
        passes: how often :meth:`fit` reads the training data; 0 for methods that learn nothing from it.
        state: what was fitted, by name.
        notes: what was kept beside it in a file, such as a threshold.

    Raises:
        ValueError: fewer than two classes, shapes that do not fit, values that are not finite.
    """

    name: ClassVar[str]
    passes: int = 1

    def __init__(
        self,
        weight: Float[Tensor, "classes dim"],
        bias: Float[Tensor, "classes"] | None = None,
        **settings: Any,
    ) -> None:
        if weight.ndim != 2 or len(weight) < 2:
            raise ValueError(f"weight must be (classes, dim) with at least 2 classes, got {tuple(weight.shape)}")
        bias = weight.new_zeros(len(weight)) if bias is None else bias
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias must be ({len(weight)},) for {len(weight)} classes, got {tuple(bias.shape)}")
        self.weight, self.bias = widen(weight.detach()), widen(bias.detach())
        if not (self.weight.isfinite().all() and self.bias.isfinite().all()):
            raise ValueError("weight and bias must be finite")
        self.settings = settings
        self.state: dict[str, Tensor] = {}
        self.notes: dict[str, Any] = {}
        self.fitted = self.passes == 0

    @classmethod
    def from_head(cls: type[S], head: nn.Module, **options: Any) -> S:
        """Built on a linear layer or the classifier that ends in one; see :func:`linear_head`."""
        return cls(*linear_head(head), **options)

    @property
    def classes(self) -> int:
        return self.weight.shape[0]

    @property
    def dim(self) -> int:
        return self.weight.shape[1]

    def logits(self, features: Float[Tensor, "items dim"]) -> Float[Tensor, "items classes"]:
        """``features W^T + b``, in float32 or better."""
        return self._linear(self._checked(features))

    def check_logits(
        self, features: Float[Tensor, "items dim"], logits: Float[Tensor, "items classes"], tolerance: float = 1e-3
    ) -> None:
        """Raise ``ValueError`` unless the model's own ``logits`` are ``features W^T + b``.

        ``tolerance`` is relative to the largest logit. A difference means that ``features`` are not the input of the
        last layer, or that the layer does more than multiply and add.
        """
        own = self.logits(features)
        if own.shape != logits.shape:
            raise ValueError(f"expected logits {tuple(own.shape)}, got {tuple(logits.shape)}")
        away = float((own - logits.to(own)).abs().max())
        if not away <= tolerance * float(logits.abs().max().clamp_min(1e-12)):
            raise ValueError(
                f"W f + b differs from the model's logits by up to {away:.3g}: either the features are not the input "
                "of the last linear layer, or the head normalises or scales (cosine heads do)"
            )

    @torch.no_grad()
    def fit(self: S, features: Float[Tensor, "items dim"] | Batches, labels: Int[Tensor, "items"] | None = None) -> S:
        """Learn what is normal.

        Args:
            features: training features with ``labels``, or an iterable of ``(features, labels)`` batches. It is gone
                through :attr:`passes` times, so a generator serves methods of one pass only.
            labels: classes, ``0 .. classes - 1``.

        Raises:
            TypeError: labels that are not integers.
            ValueError: nothing to fit on, features of another width or not finite, labels out of range, a class
                without what the method needs.
        """
        batches = as_batches(features, labels)
        if self.passes > 1 and isinstance(batches, Iterator):
            raise ValueError(f"{self.name} reads the training data {self.passes} times: give a list, not a generator")
        self.fitted = False
        self._begin()
        for number in range(max(self.passes, 1)):
            seen = 0
            for some, theirs in batches:
                self._take(number, some, theirs)
                seen += len(some)
            if not seen:
                raise ValueError("there are no training items to fit on")
            self._end(number)
        self.fitted = True
        return self

    @torch.no_grad()
    def score(self, features: Float[Tensor, "items dim"]) -> Float[Tensor, "items"]:
        """One number an item; the higher, the more it belongs to its predicted class.

        Raises:
            ValueError: not fitted yet; features of another width or not finite.
        """
        self._require_fit()
        chunks = [self._checked(some) for some in features.split(CHUNK)]
        return torch.cat([self._score(some, self._linear(some)) for some in chunks])

    @torch.no_grad()
    def predict(self, features: Float[Tensor, "items dim"], threshold: float) -> Int[Tensor, "items"]:
        """The predicted class where ``score >= threshold``, else -1. Errors as :meth:`score`."""
        predicted = torch.cat([self.logits(some).argmax(dim=1) for some in features.split(CHUNK)])
        return torch.where(self.score(features) >= threshold, predicted, -1)

    def save_pretrained(self, folder: str | Path, **notes: Any) -> Path:
        """Write ``open_set.safetensors`` and ``open_set.json`` into ``folder``, both or none.

        ``notes`` (a threshold, say) are kept in the JSON and come back as :attr:`notes`.
        """
        self._require_fit()
        tensors = {f"state.{name}": t for name, t in self.state.items()} | {"weight": self.weight, "bias": self.bias}
        write_score(folder, tensors, {"method": self.name, "settings": self.settings, "notes": notes})
        return Path(folder)

    @classmethod
    def from_pretrained(cls: type[S], folder: str | Path) -> S:
        """Read what :meth:`save_pretrained` wrote; ``ValueError`` for another method's files or damaged ones."""
        config, tensors = read_config(folder), read_tensors(folder)
        if config["method"] != cls.name:
            raise ValueError(f"{folder} holds the method {config['method']!r}, not {cls.name!r}")
        try:
            score = cls(tensors.pop("weight"), tensors.pop("bias"), **config["settings"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{folder} does not hold a {cls.name} score: {error}") from None
        score.state = {name.removeprefix("state."): tensor for name, tensor in tensors.items()}
        score.notes, score.fitted = config["notes"], True
        return score

    def _begin(self) -> None:  # noqa: B027
        """Make the state anew."""

    def _observe(self, number: int, features: Tensor, labels: Tensor, logits: Tensor) -> None:  # noqa: B027
        """Take in one batch in pass ``number``."""

    def _end(self, number: int) -> None:  # noqa: B027
        """Close pass ``number``."""

    @abstractmethod
    def _score(self, features: Tensor, logits: Tensor) -> Tensor: ...

    def _take(self, number: int, features: Tensor, labels: Tensor) -> None:
        features = self._checked(features)
        labels = checked_labels(labels, len(features), self.classes, features.device)
        self._observe(number, features, labels, self._linear(features))

    def _checked(self, features: Tensor) -> Tensor:
        return checked_features(features, self.dim, self.weight.device)

    def _linear(self, features: Tensor) -> Tensor:
        return nn.functional.linear(features, self.weight.to(features.dtype), self.bias.to(features.dtype))

    def _require_fit(self) -> None:
        if not self.fitted:
            raise ValueError(f"{self.name} is not fitted yet: call fit(features, labels) first")
