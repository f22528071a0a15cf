"""The artefact of a judged probe: a pooling whose vectors are compared by cosine, saved so that it can be rebuilt."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from cenote.backbones.base import Backbone
from cenote.data.base import Items, Skipped
from cenote.pooling.base import Pooling
from cenote.probe.artefact import CONFIG, WEIGHTS, build_pooling, load_weights, pooled_vector, save_module
from cenote.probe.card import embedding_card
from cenote.probe.decode import decoded_batches, named_items
from cenote.probe.hub import Pushable, locate
from cenote.types import Features, Grid, JudgedTask, TokenChoice

FORMAT = 1
KIND = "embedding"


@dataclass(frozen=True)
class EmbeddingConfig:
    """Everything needed to build an :class:`EmbeddingReadout` and to know which features it reads.

    Attributes:
        pooling: spec for :func:`cenote.pooling.create_pooling`, or ``"encoder_pooler"``.
        dim: width of what it reads.
        layers: numbers of the hidden states it reads, in order.
        tokens: ``"class"``, ``"patches"`` or ``"both"``.
        task: what it was judged by.
        backbone, revision, backbone_options, backbone_fingerprint: as in
            :class:`cenote.probe.readout.ReadoutConfig`.
        options: constructor options of the pooling beyond ``dim``, JSON-able.
        grid: patch grid of the backbone, or ``None``.
        standardise: whether vectors are standardised, by statistics of the training part, before they are normalised.
        query_prompt, document_prompt: put in front of texts.
        data, metric, score: where it comes from.
    """

    pooling: str
    dim: int
    layers: tuple[int, ...]
    tokens: TokenChoice
    task: JudgedTask
    backbone: str
    backbone_fingerprint: str = ""
    revision: str | None = None
    backbone_options: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    grid: Grid | None = None
    standardise: bool = False
    query_prompt: str = ""
    document_prompt: str = ""
    data: str = ""
    metric: str = ""
    score: float = 0.0

    def to_json(self) -> str:
        """The text of ``config.json``."""
        return json.dumps({"format": FORMAT, "kind": KIND, **dataclasses.asdict(self)}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> EmbeddingConfig:
        """Read ``config.json``; ``ValueError`` when it does not describe an embedding readout."""
        try:
            values = json.loads(text)
            if values.get("kind") != KIND or values.get("format") != FORMAT:
                raise ValueError(f"kind {values.get('kind')!r}, format {values.get('format')!r}")
            known = {f.name for f in dataclasses.fields(cls)}
            values = {key: value for key, value in values.items() if key in known}
            values["layers"] = tuple(values["layers"])
            if values.get("grid") is not None:
                values["grid"] = Grid(*values["grid"])
            return cls(**values)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"this config.json does not describe an embedding readout of cenote: {error}") from None

    def build_pooling(self) -> Pooling | None:
        """A fresh pooling, or ``None`` for the encoder's own."""
        return build_pooling(self)


class Encoded(NamedTuple):
    """Vectors of the items that could be read.

    Attributes:
        vectors: one an item, ``(items, width)``.
        ids: their names, in that order.
        skipped: what was left out.
    """

    vectors: Tensor
    ids: tuple[str, ...]
    skipped: tuple[Skipped, ...]


class EmbeddingReadout(nn.Module, Pushable):
    """Unit vectors ``normalise(standardise(pool(features)))``; their inner products are the cosines that were judged.

    Always in eval mode and frozen when built.

    Args:
        config: what it reads.
        pooling: trained pooling; ``None`` builds a fresh one from ``config``.
        norm: standardisation, where ``config`` has one; likewise.
    """

    def __init__(
        self, config: EmbeddingConfig, pooling: Pooling | None = None, norm: nn.BatchNorm1d | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.pooling = config.build_pooling() if pooling is None else pooling
        width = config.dim if self.pooling is None else self.pooling.out_dim
        fresh = nn.BatchNorm1d(width, eps=1e-6, affine=False) if config.standardise else None
        self.norm = fresh if norm is None else norm
        self.eval().requires_grad_(False)

    def forward(self, features: Features) -> Float[Tensor, "batch width"]:
        """Unit vectors.

        Raises:
            ValueError: the features lack a layer that is read, or the encoder's pooled output.
        """
        vector = pooled_vector(features, self.config, self.pooling).float()
        return F.normalize(vector if self.norm is None else self.norm(vector), dim=-1)

    def encode(
        self, backbone: Backbone, items: Items | Sequence[Any], batch_size: int = 32, *, prompt: str | None = None
    ) -> Float[Tensor, "items width"]:
        """Vectors of raw items, in order, on the CPU.

        Args:
            backbone: the one it was judged on.
            items: raw items; texts get a prompt in front.
            batch_size: items in one pass through the backbone.
            prompt: ``None`` takes ``config.query_prompt``; give ``config.document_prompt`` for documents.

        Raises:
            ValueError: no items, one that cannot be decoded (its position is named), or another backbone.
        """
        return self.encode_named(backbone, items, batch_size, prompt=prompt).vectors

    def encode_named(
        self, backbone: Backbone, items: Items | Sequence[Any], batch_size: int = 32, *, prompt: str | None = None,
        ids: Sequence[str] | None = None, on_error: Literal["raise", "skip"] = "raise",
        allow_other_backbone: bool = False,
    ) -> Encoded:  # fmt: skip
        """As :meth:`encode`, with the names of what was encoded and what was left out.

        Args:
            backbone, items, batch_size, prompt: as for :meth:`encode`.
            ids: names of the items; their positions if not given.
            on_error: what an item that cannot be decoded does: raise, or be left out and listed.
            allow_other_backbone: do not insist on the backbone that the readout was made on.

        Raises:
            ValueError: no items, one that cannot be decoded (it is named), none that can, or another backbone.
        """
        if not len(items):
            raise ValueError("there are no items to encode")
        if not allow_other_backbone:
            self.check_backbone(backbone)
        prompt = self.config.query_prompt if prompt is None else prompt
        vectors: list[Tensor] = []
        kept: list[str] = []
        skipped: list[Skipped] = []
        with torch.inference_mode():
            for names, some in decoded_batches(items, named_items(items, ids), batch_size, on_error, skipped):
                texts = [prompt + item for item in some] if prompt else some
                vectors.append(self(backbone(backbone.collate(texts), self.config.layers)).cpu())
                kept += names
        return Encoded(torch.cat(vectors), tuple(kept), tuple(skipped))

    def check_backbone(self, backbone: Backbone) -> None:
        """Raise ``ValueError`` unless ``backbone`` has the weights that this readout was made on."""
        expected, found = self.config.backbone_fingerprint, backbone.fingerprint()
        if expected and expected != found:
            raise ValueError(
                f"this readout was made on {self.config.backbone} with fingerprint {expected[:12]}, but "
                f"{backbone.spec} has {found[:12]}: other weights give meaningless vectors "
                "(allow_other_backbone=True goes on all the same)"
            )

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write ``model.safetensors``, a card ``README.md`` and ``config.json`` into ``folder``, all or none."""
        return save_module(self, folder, embedding_card(self.config), self.config.to_json())

    @classmethod
    def from_pretrained(cls, source: str | Path, revision: str | None = None) -> EmbeddingReadout:
        """Load from a folder, or from a model repository of the Hugging Face hub.

        Raises:
            ValueError: neither, or damaged or foreign files.
        """
        config_path, weights_path = locate(source, (CONFIG, WEIGHTS), revision)
        readout = cls(EmbeddingConfig.from_json(config_path.read_text()))
        load_weights(readout, weights_path)
        return readout
