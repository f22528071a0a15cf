"""Rectified SpaAttn: block-sparse attention for diffusion transformers, corrected by what block means say."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from cenote.attention.base import Recipe, Session
from cenote.attention.host import Host
from cenote.ops.rectified_attention import rectified_attention
from cenote.ops.space_filling_curve import AXES, GridShape, block_neighbours, hilbert_order
from cenote.specs import unknown_name

if TYPE_CHECKING:
    from cenote.integrations.attention_core import Call

PRESETS: dict[str, dict[str, Any]] = {
    "hunyuan_video": {"drop_rate": 0.8},
    "wan2.1_t2v": {"drop_rate": 0.75, "dense_layers": (0, 1), "dense_calls": 10},
    "wan2.1_i2v": {"drop_rate": 0.75, "dense_layers": (0, 1)},
    "wan2.2": {"drop_rate": 0.75, "dense_layers": (0, 1)},
    "cogvideox1.5": {"drop_rate": 0.85, "dense_calls": 5},
    "flux": {"drop_rate": 0.9, "dense_layers": tuple(range(37, 57))},
}
"""The paper's settings by host."""


@dataclass(frozen=True)
class RectifiedSpaAttn(Recipe):
    """Sparse attention in a diffusion transformer, scaled to its share of the mass, plus means of dropped blocks.

    ``out_i = R_i sparse_i + sum_j P_ij comp_ij mean(v_j)``, see
    :func:`cenote.ops.rectified_attention.rectified_attention`. Tokens are reordered along a space-filling curve once
    before the first block and back after the last. Nothing is trained. Source: "Rectified SpaAttn" (arXiv
    2511.19835).

        with RectifiedSpaAttn.preset("wan2.1_t2v")(pipe.transformer):
            video = pipe(prompt).frames

    Serves ``WanTransformer3DModel``, ``HunyuanVideoTransformer3DModel``, ``CogVideoXTransformer3DModel`` and
    ``FluxTransformer2DModel`` of diffusers, and vision transformers of timm, whose class and register tokens are
    treated as text; other models raise ``TypeError``. On leaving the block the model is as it
    was, also after an exception. Other than the official code: batches, text of any length and of another length per
    item, a neighbour rule for every host.

    Args:
        drop_rate: share of blocks that may be dropped: at least ``floor((1 - drop_rate) * whole blocks)`` are kept.
        p: keep blocks in falling order of estimated mass while their sum is at most ``p``, and one more; 1 keeps all.
        top_k: blocks to keep at least, instead of by ``drop_rate``.
        block_size: tokens a block.
        neighbours: always keep blocks that touch in the grid.
        first_frame: whether the first blocks, as many as a frame has, always attend each other; by default in Wan.
        order: ``"curve"`` reorders the tokens, ``"raster"`` leaves them.
        axis_order: which axis of the curve leads.
        mean: ``"real"`` averages a ragged last block over its tokens, ``"padded"`` as the official code does.
        allow_padding: where text shares the attention, a visual length that ``block_size`` does not divide is refused
            unless this is set.
        compensate: ``"gain"`` by the paper, ``"all"`` without its test, ``"none"`` for plain block-sparse attention.
        dense_layers: layers, from 0 in the order in which they run, that keep the host's own attention.
        dense_calls: so many first calls of the transformer in every generation run the host's own attention; guidance
            with separate calls makes two a step. A generation begins where the time step rises.
        backend: of :func:`cenote.ops.block_sparse.block_sparse_attention`.

    Raises:
        ValueError: settings out of range.
    """

    name: ClassVar[str] = "rectified_spaattn"

    drop_rate: float = 0.8
    p: float = 0.3
    top_k: int | None = None
    block_size: int = 128
    neighbours: bool = True
    first_frame: bool | None = None
    order: str = "curve"
    axis_order: tuple[str, ...] = AXES
    mean: str = "real"
    allow_padding: bool = False
    compensate: str = "gain"
    dense_layers: tuple[int, ...] = ()
    dense_calls: int = 0
    backend: str = "auto"

    def __post_init__(self) -> None:
        if not 0 <= self.drop_rate < 1:
            raise ValueError(f"drop_rate must lie in [0, 1), got {self.drop_rate}")
        if not 0 < self.p <= 1:
            raise ValueError(f"p must lie in (0, 1], got {self.p}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}")
        if self.block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {self.block_size}")
        if self.order not in ("curve", "raster"):
            raise ValueError(f"order must be 'curve' or 'raster', got {self.order!r}")
        if sorted(self.axis_order) != sorted(AXES):
            raise ValueError(f"axis_order must hold each of {AXES} once, got {tuple(self.axis_order)}")
        if self.mean not in ("real", "padded"):
            raise ValueError(f"mean must be 'real' or 'padded', got {self.mean!r}")
        if self.compensate not in ("gain", "all", "none"):
            raise ValueError(f"compensate must be 'gain', 'all' or 'none', got {self.compensate!r}")
        if self.dense_calls < 0 or any(layer < 0 for layer in self.dense_layers):
            raise ValueError("dense_calls and dense_layers must not be negative")

    @classmethod
    def preset(cls, name: str, **changes: Any) -> RectifiedSpaAttn:
        """The paper's settings for a host, one of :data:`PRESETS`, with changes.

        The two transformers of Wan 2.2 A14B are two models, each with its own first two layers dense.
        """
        if name not in PRESETS:
            raise unknown_name("preset", name, PRESETS)
        return cls(**PRESETS[name] | changes)

    @contextmanager
    def __call__(self, model: nn.Module) -> Iterator[Any]:
        """Attend in this way within the block; gives the :class:`RectifiedSession`."""
        from cenote.integrations.timm_attention import is_timm_vit, timm_attention_core

        session = RectifiedSession(self)
        if is_timm_vit(model):
            host = timm_attention_core(model, session)
        else:
            from cenote.integrations.diffusers_attention import attention_core

            host = attention_core(model, session)
        with host:
            yield session

    def start(self, host: Host) -> Session:
        """The method is bidirectional: a decoder that attends to the past alone is refused."""
        raise TypeError(f"{self.name} serves diffusion transformers, got {type(host.model).__name__}")


class RectifiedSession:
    """The settings at work on one model."""

    def __init__(self, settings: RectifiedSpaAttn) -> None:
        self.settings = settings
        self.touching: dict[GridShape, Tensor] = {}
        self.kept: list[Tensor] = []

    @property
    def density(self) -> float:
        """Mean share of visual blocks that was kept, over the sparse layers and calls so far.

        Raises:
            ValueError: nothing sparse has run yet.
        """
        if not self.kept:
            raise ValueError("no sparse layer has run yet")
        return float(torch.stack([share.cpu() for share in self.kept]).mean())

    def order(self, shape: GridShape) -> Tensor | None:
        return None if self.settings.order == "raster" else hilbert_order(shape, self.settings.axis_order)

    def dense(self, layer: int, call: Call) -> bool:
        return layer in self.settings.dense_layers or call.number < self.settings.dense_calls

    def attend(self, query: Tensor, key: Tensor, value: Tensor, text_valid: Tensor | None, call: Call) -> Tensor:
        s = self.settings
        whole = math.prod(call.shape) // s.block_size
        first = s.first_frame if s.first_frame is not None else call.first_frame
        result = rectified_attention(
            query,
            key,
            value,
            block_size=s.block_size,
            p=s.p,
            # A hair above: (1 - 0.8) * 10 is 1.99... in floating point.
            top_k=s.top_k or max(1, math.floor((1 - s.drop_rate) * whole + 1e-9)),
            text_len=call.text_len,
            text_valid=text_valid,
            neighbours=self._neighbours(call, query) if s.neighbours else None,
            first_frame_blocks=whole // call.shape[0] if first else 0,
            compensate=s.compensate,
            mean=s.mean,
            allow_padding=s.allow_padding,
            backend=s.backend,
        )
        self.kept.append(result.block_mask.float().mean())
        return result.output

    def _neighbours(self, call: Call, like: Tensor) -> Tensor:
        if call.shape not in self.touching:
            order = call.order if call.order is not None else torch.arange(math.prod(call.shape))
            self.touching[call.shape] = block_neighbours(order, call.shape, self.settings.block_size)
        return self.touching[call.shape].to(like.device)
