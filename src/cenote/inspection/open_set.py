"""COSTARR: is an item one of the predicted class, judged before and after the class weights attenuate its feature."""

from __future__ import annotations

import warnings

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cenote.inspection.open_set_base import OpenSetScore
from cenote.ops.open_set import metric_cosine, unit

CHOICES = {
    "parts": ("both", "pre", "post"),
    "scale_parts": ("none", "unit"),
    "similarity": ("half_shifted", "cosine"),
    "confidence": ("min_max", "softmax", "none"),
}


class CoStarr(OpenSetScore):
    """Confidence times the similarity of the feature, plain and attenuated, to what is normal for the predicted class.

    With ``k = argmax l``, ``u = [F ; W_k * F]`` and ``T_k`` the mean of ``u`` over training items of class k that are
    classified correctly::

        score = (l_k - l_min) / (l_max - l_min)  *  (1 + cos(u, T_k)) / 2

    ``l_min`` and ``l_max`` are the extreme logits of all training items and classes. Small weights attenuate what does
    not tell the known classes apart; there the unattenuated half may still see that an item is new. Because ``W * F``
    is linear in F, ``cos(u, T_k)`` is the cosine of F and the class mean in the metric ``1 + W_k^2``, so only one
    mean a class is stored: O(classes x dim) after any number of items, summed in float64.

    Source: "COSTARR: Consolidated Open Set Technique with Attenuation for Robust Recognition" (arXiv 2508.01087). The
    rule is reconstructed from the abstract, the only text at hand: what the template is, how the cosine is shifted and
    how the logits are scaled are inferences, and each is an option. A class of which no training item is classified
    correctly falls back to the mean of all its items. A feature of zeros has cosine 0.

    Args:
        weight: W of the last linear layer, ``(classes, dim)``.
        bias: b, ``(classes,)``.
        parts: ``"both"``, ``"pre"`` (F alone) or ``"post"`` (W_k * F alone).
        scale_parts: ``"unit"`` scales both parts to length one before they are joined; the template then needs two
            means a class.
        similarity: ``"half_shifted"`` (0 to 1) or ``"cosine"`` (-1 to 1).
        confidence: ``"min_max"``, ``"softmax"`` (largest probability) or ``"none"``.
        clip: raise a negative min-max confidence to 0. Without it such an item scores the lower the more similar it
            is, and a warning says so.

    Raises:
        ValueError: as :class:`OpenSetScore`; an option that does not exist; a class without any training item; all
            training logits equal under ``confidence="min_max"``.
    """

    name = "costarr"

    def __init__(
        self,
        weight: Float[Tensor, "classes dim"],
        bias: Float[Tensor, "classes"] | None = None,
        *,
        parts: str = "both",
        scale_parts: str = "none",
        similarity: str = "half_shifted",
        confidence: str = "min_max",
        clip: bool = False,
    ) -> None:
        settings = {"parts": parts, "scale_parts": scale_parts, "similarity": similarity, "confidence": confidence}
        for option, value in settings.items():
            if value not in CHOICES[option]:
                raise ValueError(f"{option} must be one of {', '.join(CHOICES[option])}, got {value!r}")
        super().__init__(weight, bias, **settings, clip=clip)
        self.parts, self.scale_parts, self.similarity, self.confidence = parts, scale_parts, similarity, confidence
        self.clip = clip

    def partial_fit(self, features: Float[Tensor, "items dim"], labels: Int[Tensor, "items"]) -> CoStarr:
        """Take in one more batch; the same numbers as :meth:`fit` on everything at once. Errors as :meth:`fit`."""
        if not self.state:
            self._begin()
        self._take(0, features, labels)
        self.fitted = True
        return self

    def _begin(self) -> None:
        # The unit-scaled attenuated part is not linear in F, so its mean is kept beside the feature's.
        width = self.dim * (2 if self.scale_parts == "unit" else 1)
        device = self.weight.device
        self.state = {
            "sums": torch.zeros(self.classes, width, dtype=torch.float64, device=device),
            "counts": torch.zeros(self.classes, dtype=torch.int64, device=device),
            "correct": torch.zeros(self.classes, dtype=torch.bool, device=device),
            "logit_range": torch.tensor([float("inf"), -float("inf")], dtype=torch.float64, device=device),
        }

    def _observe(self, number: int, features: Tensor, labels: Tensor, logits: Tensor) -> None:
        sums, counts, correct, extremes = (self.state[n] for n in ("sums", "counts", "correct", "logit_range"))
        if not len(labels):
            return
        right = logits.argmax(dim=1) == labels
        # Until its first correctly classified item a class collects all of its items; from then on only those.
        first = torch.zeros_like(correct).index_fill_(0, labels[right], True) & ~correct
        sums[first], counts[first] = 0, 0
        correct |= first
        used = right | ~correct[labels]
        features, labels = features[used], labels[used]
        sums.index_add_(0, labels, self._pieces(features, labels).double())
        counts += labels.bincount(minlength=self.classes)
        low, high = logits.aminmax()
        extremes[0], extremes[1] = torch.minimum(extremes[0], low.double()), torch.maximum(extremes[1], high.double())

    def _end(self, number: int) -> None:
        self._means()

    def _pieces(self, features: Tensor, classes: Tensor) -> Tensor:
        """What is averaged: F, or both parts at length one."""
        if self.scale_parts == "none":
            return features
        return torch.cat([unit(features), unit(self.weight.to(features.dtype)[classes] * features)], dim=1)

    def _means(self) -> Tensor:
        missing = (self.state["counts"] == 0).nonzero().flatten().tolist()
        if missing:
            raise ValueError(f"class(es) {missing[:10]} have no training item, so nothing is known of them")
        low, high = self.state["logit_range"].tolist()
        if self.confidence == "min_max" and not high > low:
            raise ValueError(f"all training logits are {low:g}: min-max confidence is undefined")
        return self.state["sums"] / self.state["counts"][:, None]

    def _metric(self, classes: Tensor, width: int, dtype: torch.dtype) -> Tensor:
        """The diagonal under which the cosine is taken."""
        if self.scale_parts == "unit":
            shares = {"both": (1, 1), "pre": (1, 0), "post": (0, 1)}[self.parts]
            both = self.weight.new_tensor(shares, dtype=dtype).repeat_interleave(self.dim)
            return both.expand(len(classes), width)
        if self.parts == "pre":
            return self.weight.new_ones(len(classes), width, dtype=dtype)
        squared = self.weight.to(dtype)[classes].square()
        return squared if self.parts == "post" else 1 + squared

    def _score(self, features: Tensor, logits: Tensor) -> Tensor:
        top, predicted = logits.max(dim=1)
        pieces = self._pieces(features, predicted)
        templates = self._means().to(features.dtype)[predicted]
        cosine = metric_cosine(pieces, templates, self._metric(predicted, pieces.shape[1], features.dtype))
        similarity = (1 + cosine.clamp(-1, 1)) / 2 if self.similarity == "half_shifted" else cosine.clamp(-1, 1)
        return self._confidence(top, logits) * similarity

    def _confidence(self, top: Tensor, logits: Tensor) -> Tensor:
        if self.confidence == "none":
            return torch.ones_like(top)
        if self.confidence == "softmax":
            return logits.softmax(dim=1).amax(dim=1)
        low, high = self.state["logit_range"].tolist()
        confidence = (top - low) / (high - low)
        below = int((confidence < 0).sum())
        if below and not self.clip:
            warnings.warn(
                f"the logits of {below} item(s) lie below every training logit: their confidence is negative, and the "
                "more similar they are, the lower they score (clip=True raises it to 0)",
                stacklevel=4,
            )
        return confidence.clamp_min(0) if self.clip else confidence
