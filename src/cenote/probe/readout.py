"""The trained artefact: a pooling with its head, saved so that it can be rebuilt, checked and shared."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from cenote.backbones.base import Backbone
from cenote.pooling.base import Pooling
from cenote.probe.artefact import (
    CONFIG,
    WEIGHTS,
    build_pooling,
    load_weights,
    pooled_vector,
    save_module,
    select_tokens_of,
)
from cenote.probe.card import model_card
from cenote.probe.hub import Pushable, locate
from cenote.types import Features, Grid, Task, TokenChoice

FORMAT = 1


@dataclass(frozen=True)
class ReadoutConfig:
    """Everything needed to build a :class:`Readout` and to know which features it reads.

    Attributes:
        pooling: spec for :func:`cenote.pooling.create_pooling`, or ``"encoder_pooler"`` for the encoder's own pooled
            output.
        options: constructor options of the pooling beyond ``dim``, JSON-able.
        dim: width of what it reads (hidden states, or the pooled output for ``"encoder_pooler"``).
        layers: numbers of the hidden states it reads, in order.
        tokens: ``"class"``, ``"patches"`` or ``"both"``.
        grid: patch grid of the backbone, or ``None``.
        task: classification, multilabel or regression.
        classes: names in label order; empty for regression.
        outputs: width of the head (number of classes, or of regression targets).
        backbone: spec for :func:`cenote.backbones.load_backbone`.
        revision: commit of a hub backbone, or ``None``.
        backbone_options: further keywords of ``load_backbone`` that change its features (``bidirectional``,
            ``max_length``, ...).
        backbone_fingerprint: :meth:`Backbone.fingerprint` of the backbone it was trained on; empty means unknown.
        norm_eps: added to the variance by the normalisation in front of the head.
        target_mean, target_std: regression outputs are ``head * target_std + target_mean``.
        table: rows of the comparison it came from, for the card.
        data: name of the data set, for the card.
    """

    pooling: str
    dim: int
    layers: tuple[int, ...]
    tokens: TokenChoice
    task: Task
    outputs: int
    backbone: str
    backbone_fingerprint: str = ""
    revision: str | None = None
    backbone_options: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    grid: Grid | None = None
    classes: tuple[str, ...] = ()
    norm_eps: float = 1e-6
    target_mean: float = 0.0
    target_std: float = 1.0
    table: tuple[dict[str, Any], ...] = ()
    data: str = ""

    def __post_init__(self) -> None:
        if self.task not in ("classification", "multilabel", "regression"):
            raise ValueError(f"task must be 'classification', 'multilabel' or 'regression', got {self.task!r}")
        if self.tokens not in ("class", "patches", "both"):
            raise ValueError(f"tokens must be 'class', 'patches' or 'both', got {self.tokens!r}")
        if not self.layers:
            raise ValueError("a readout reads at least one layer, got none")
        if self.task != "regression" and len(self.classes) != self.outputs:
            raise ValueError(f"a head of {self.outputs} outputs needs as many class names, got {len(self.classes)}")

    def to_json(self) -> str:
        """The text of ``config.json``."""
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> ReadoutConfig:
        """Read ``config.json``; ``ValueError`` when it is not one of this library's readouts."""
        try:
            values = json.loads(text)
            known = {f.name for f in dataclasses.fields(cls)}
            if values["format"] != FORMAT:
                raise ValueError(f"it has format {values['format']!r} and this version reads {FORMAT}")
            values = {key: value for key, value in values.items() if key in known}
            values |= {key: tuple(values[key]) for key in ("layers", "classes", "table") if key in values}
            if values.get("grid") is not None:
                values["grid"] = Grid(*values["grid"])
            return cls(**values)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"this config.json does not describe a readout of cenote: {error}") from None

    def build_pooling(self) -> Pooling | None:
        """A fresh pooling, or ``None`` for ``"encoder_pooler"``."""
        return build_pooling(self)


class Readout(nn.Module, Pushable):
    """Pooling, normalisation, linear head: ``scores = W norm(pool(features)) + b``.

    ``norm`` is a batch norm without affine part. In eval mode it is ``(v - mean) / sqrt(var + eps)``, so the same
    module also carries the standardisation of readouts that were fitted in closed form (``eps = 0``, mean and
    variance of the training vectors). Always in eval mode and frozen when built: ``train().requires_grad_()`` to go
    on training.

    Args:
        config: what it reads and gives.
        pooling, norm, head: trained parts; ``None`` builds a fresh one from ``config``.

    Raises:
        ValueError: parts whose widths do not fit each other.
    """

    def __init__(
        self,
        config: ReadoutConfig,
        pooling: Pooling | None = None,
        norm: nn.BatchNorm1d | None = None,
        head: nn.Linear | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.pooling = config.build_pooling() if pooling is None else pooling
        width = config.dim if self.pooling is None else self.pooling.out_dim
        self.norm = nn.BatchNorm1d(width, eps=config.norm_eps, affine=False) if norm is None else norm
        self.head = nn.Linear(width, config.outputs) if head is None else head
        if (
            self.norm.num_features != width
            or self.head.in_features != width
            or self.head.out_features != config.outputs
        ):
            raise ValueError(
                f"the pooling gives vectors of width {width} for {config.outputs} outputs, but the normalisation has "
                f"width {self.norm.num_features} and the head is {self.head.in_features} to {self.head.out_features}"
            )
        if self.norm.eps != config.norm_eps:
            raise ValueError(f"config says norm_eps={config.norm_eps}, but the normalisation has eps={self.norm.eps}")
        # Frozen, because a backbone's features are inference tensors, which autograd refuses to record.
        self.eval().requires_grad_(False)

    def forward(self, features: Features) -> Float[Tensor, "batch outputs"]:
        """Logits, or values in the unit of the target for regression.

        Raises:
            ValueError: the features lack a layer that this readout reads, or the encoder's pooled output.
        """
        vector = self.vector(features).float()
        scores = self.head(self.norm(vector))
        if self.config.task == "regression":
            return scores * self.config.target_std + self.config.target_mean
        return scores

    def vector(self, features: Features) -> Float[Tensor, "batch width"]:
        """The pooled vector in front of normalisation and head."""
        return pooled_vector(features, self.config, self.pooling)

    def weights(self, features: Features) -> Float[Tensor, "batch queries tokens"]:
        """What each query attends to; ``ValueError`` where the pooling does not attend."""
        if self.pooling is None:
            raise ValueError("the encoder's own pooler gives no attention weights")
        tokens, mask = select_tokens_of(features, self.config, self.pooling)
        return self.pooling(tokens, mask, return_weights=True)[1]

    def predict_proba(self, features: Features) -> Float[Tensor, "batch classes"]:
        """Softmax of the scores, or their sigmoid for multi-label; ``ValueError`` for regression."""
        if self.config.task == "regression":
            raise ValueError("a regression readout has no class probabilities: call it for its values")
        scores = self(features)
        return scores.softmax(dim=-1) if self.config.task == "classification" else scores.sigmoid()

    def check_backbone(self, backbone: Backbone) -> None:
        """Raise ``ValueError`` unless ``backbone`` has the weights and the width that this readout was trained on."""
        expected, found = self.config.backbone_fingerprint, backbone.fingerprint()
        if expected and expected != found:
            raise ValueError(
                f"this readout was trained on {self.config.backbone} with fingerprint {expected[:12]}, but "
                f"{backbone.spec} has {found[:12]}: other weights give meaningless answers "
                "(allow_other_backbone=True to go on)"
            )
        if backbone.dim != self.config.dim and self.pooling is not None:
            raise ValueError(
                f"this readout reads tokens of width {self.config.dim}, but {backbone.spec} gives {backbone.dim}"
            )

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write ``model.safetensors``, a card ``README.md`` and ``config.json`` into ``folder``, all or none."""
        return save_module(self, folder, model_card(self.config), self.config.to_json())

    @classmethod
    def from_pretrained(cls, source: str | Path, revision: str | None = None) -> Readout:
        """Load from a folder, or from a model repository of the Hugging Face hub.

        Args:
            source: a folder that :meth:`save_pretrained` wrote, or a repository id such as ``"user/name"``.
            revision: branch, tag or commit of the repository.

        Raises:
            ValueError: neither a folder with a readout nor a repository; damaged or foreign files.
        """
        config_path, weights_path = locate(source, (CONFIG, WEIGHTS), revision)
        readout = cls(ReadoutConfig.from_json(config_path.read_text()))
        load_weights(readout, weights_path)
        return readout
