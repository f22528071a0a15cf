"""Blocked local self-attention with halos (HaloNet's layer)."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from cenote.mixing.base import MapMixer, MixerContext
from cenote.ops.halo import Border, halo_attention


class RelativePositions(nn.Module):
    """Tables of vectors for row and column offsets, ``(2 window - 1, dim)`` each, shared by the heads."""

    def __init__(self, window: int, dim: int) -> None:
        super().__init__()
        self.height_rel = nn.Parameter(torch.empty(2 * window - 1, dim))
        self.width_rel = nn.Parameter(torch.empty(2 * window - 1, dim))


class HaloAttention(MapMixer):
    """The queries of each block of a map attend to the block and a halo around it.

    ``y = softmax(q k^T / sqrt(d) + q (r_row + r_column)^T) v`` for each head, over the ``(block_size + 2
    halo_size)^2`` cells of the block's window; q, k and v are linear in each cell and there is no output map. Source:
    "Scaling Local Self-Attention for Parameter Efficient Visual Backbones" (arXiv 2103.12731). The paper's authors
    published no code: keys, initialisation and defaults are those of timm's ``HaloAttn``, whose checkpoints load.

    As a token mixer it keeps width and grid. On maps, ``layer(x)`` or :meth:`mix_map`, it may change the width
    (``dim_out``) and shrink the map (``stride``), and stands where a convolution does. Multiply-adds a map:
    ``height * width * window^2 * (qk width + dim_out) / stride^2``.

    Different from timm: any map with ``auto_pad``, masks of cells, a border that is masked or mirrored, positions in
    pixels, strides above 2; faster, since neighbourhoods are laid out a few rows of blocks at a time.

    Args:
        dim: width of the map.
        dim_out: width of the values; ``dim`` unless given.
        stride: keep every n-th row and column of the queries.
        num_heads: heads.
        dim_head: query and key channels of a head; from ``dim_out * qk_ratio`` (rounded to a multiple of 8, then
            divided by the heads) unless given.
        block_size: side of a block. Changing it later needs other tables.
        halo_size: cells around it. 0 is attention in separate windows.
        qk_ratio: see ``dim_head``.
        qkv_bias: biases of q, k and v.
        scale_pos_embed: divide the position logits by ``sqrt(dim_head)`` as well.
        avg_down: with a stride, attend at full size and average 2 x 2 cells; also done where the stride does not
            divide the block.
        mask_padding: leave cells outside of the map out of the softmax. Off as in timm: they count as zeros there.
        pixel_offsets: with a stride, offsets in pixels rather than in timm's mixture of query and pixel rows.
        auto_pad: pad maps whose sides are no multiples of the block at the lower right with cells that nobody sees.
        border: ``"zeros"``, or ``"reflect"`` to see the map mirrored outside of it.

    Raises:
        ValueError: heads that do not divide ``dim_out``, sizes below their least value, pooling with a stride other
            than 2, and what :func:`cenote.ops.halo.halo_attention` raises.
    """

    name = "halo_attention"
    projections = "own"
    paper = "halonet"

    def __init__(
        self,
        dim: int,
        dim_out: int | None = None,
        stride: int = 1,
        num_heads: int = 8,
        dim_head: int | None = None,
        block_size: int = 8,
        halo_size: int = 3,
        qk_ratio: float = 1.0,
        qkv_bias: bool = False,
        scale_pos_embed: bool = False,
        avg_down: bool = False,
        mask_padding: bool = False,
        pixel_offsets: bool = False,
        auto_pad: bool = False,
        border: Border = "zeros",
    ) -> None:
        super().__init__(dim)
        self.dim_out = dim_out or dim
        if num_heads < 1 or self.dim_out % num_heads:
            raise ValueError(f"dim_out={self.dim_out} is not divisible into num_heads={num_heads}")
        if block_size < 1 or halo_size < 0 or stride < 1:
            raise ValueError(
                f"block_size and stride are at least 1 and halo_size at least 0, got block_size={block_size}, "
                f"stride={stride}, halo_size={halo_size}"
            )
        if border == "reflect" and mask_padding:
            raise ValueError("a mirrored border is there to be seen: mask_padding goes with border='zeros'")
        self.pooled = stride > 1 and (avg_down or block_size % stride != 0)
        if self.pooled and stride != 2:
            raise ValueError(
                f"stride {stride} must divide block_size={block_size}: only stride 2 is made by averaging instead"
            )
        self.num_heads, self.stride = num_heads, stride
        self.dim_head = dim_head or multiple_of_8(self.dim_out * qk_ratio) // num_heads
        if self.dim_head < 1:
            raise ValueError(f"num_heads={num_heads} leaves no query channels of {self.dim_out} * {qk_ratio}")
        self.block_size, self.halo_size = block_size, halo_size
        self.scale_pos_embed, self.mask_padding, self.pixel_offsets = scale_pos_embed, mask_padding, pixel_offsets
        self.auto_pad, self.border = auto_pad, border
        inner = num_heads * self.dim_head
        self.q = nn.Conv2d(dim, inner, 1, bias=qkv_bias)
        self.kv = nn.Conv2d(dim, inner + self.dim_out, 1, bias=qkv_bias)
        self.pos_embed = RelativePositions(block_size + 2 * halo_size, self.dim_head)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Truncated normal weights of deviation ``dim^-0.5`` (q, k, v) and ``dim_head^-0.5`` (tables)."""
        for weights, fan in ((self.q, self.dim), (self.kv, self.dim), (self.pos_embed, self.dim_head)):
            for name, parameter in weights.named_parameters():
                if name == "bias":
                    nn.init.uniform_(parameter, -(fan**-0.5), fan**-0.5)
                else:
                    nn.init.trunc_normal_(parameter, std=fan**-0.5)

    def forward(
        self,
        tokens: Tensor,
        mask: Tensor | None = None,
        context: MixerContext | None = None,
        return_weights: bool = False,
    ) -> Any:
        """Tokens as :meth:`cenote.mixing.Mixer.forward` takes them, or a map as :meth:`mix_map` does.

        Raises:
            ValueError: tokens for a layer that changes width or size, and what the two raise.
        """
        if tokens.ndim == 4 and mask is None and not return_weights:
            return self.mix_map(tokens, context)
        if tokens.ndim == 3 and (self.dim_out != self.dim or self.stride != 1):
            raise ValueError(
                f"tokens keep their width and number: HaloAttention with dim={self.dim}, dim_out={self.dim_out}, "
                f"stride={self.stride} takes maps"
            )
        return super().forward(tokens, mask, context, return_weights)

    def mix_map(
        self,
        x: Float[Tensor, "batch dim height width"],
        context: MixerContext | None = None,
        keep: Bool[Tensor, "batch height width"] | None = None,
    ) -> Float[Tensor, "batch dim_out rows columns"]:
        """A map ``(batch, dim_out, height / stride, width / stride)``; with ``auto_pad`` sides are rounded up.

        ``keep`` marks real cells: the others are not seen, whatever they hold, and give numbers without meaning.
        """
        if x.ndim != 4 or x.shape[1] != self.dim:
            raise ValueError(
                f"HaloAttention was built for maps (batch, {self.dim}, height, width), got {tuple(x.shape)}"
            )
        if keep is None:
            return self._mix_map(x, None)
        if keep.dtype != torch.bool or keep.shape != (len(x), *x.shape[2:]):
            raise ValueError(f"keep must be a boolean {(len(x), *x.shape[2:])}, got {keep.dtype} {tuple(keep.shape)}")
        return self._mix_map(x.masked_fill(~keep[:, None], 0.0), keep)

    def _mix_map(self, x: Tensor, keep: Tensor | None) -> Tensor:
        height, width = x.shape[2:]
        if self.pooled and keep is not None:
            raise ValueError("averaging does not know which cells are real: no keep with avg_down")
        cells = x.permute(0, 2, 3, 1)
        below, right = -height % self.block_size, -width % self.block_size
        if self.auto_pad and (below or right):
            keep = keep if keep is not None else x.new_ones(x.shape[0], height, width, dtype=torch.bool)
            keep = pad(keep, (0, right, 0, below), value=False)
            cells = pad(cells, (0, 0, 0, right, 0, below))
        step = 1 if self.pooled else self.stride
        query, key_value = _apply(self.q, cells[:, ::step, ::step]), _apply(self.kv, cells)
        mixed = halo_attention(
            query.unflatten(-1, (self.num_heads, -1)),
            key_value.unflatten(-1, (self.num_heads, -1)),
            self.pos_embed.height_rel.to(query.dtype),
            self.pos_embed.width_rel.to(query.dtype),
            block=self.block_size,
            halo=self.halo_size,
            keep=keep,
            mask_padding=self.mask_padding,
            border=self.border,
            scale_positions=self.scale_pos_embed,
            pixel_offsets=self.pixel_offsets,
        )
        mixed = mixed.flatten(3).permute(0, 3, 1, 2)
        mixed = mixed[:, :, : -(-height // step), : -(-width // step)].contiguous()
        return nn.functional.avg_pool2d(mixed, 2, ceil_mode=self.auto_pad) if self.pooled else mixed

    @classmethod
    def from_reference(cls, state_dict: dict[str, Tensor], **config: Any) -> HaloAttention:
        """From timm's keys ``q``, ``kv``, ``pos_embed.height_rel``, ``pos_embed.width_rel`` and its options.

        Raises:
            ValueError: tables of another length than ``2 (block_size + 2 halo_size) - 1``.
        """
        layer = cls(**config)
        for name, table in layer.pos_embed.named_parameters():
            given = state_dict[f"pos_embed.{name}"]
            if given.shape != table.shape:
                raise ValueError(
                    f"block_size={layer.block_size} and halo_size={layer.halo_size} need tables {tuple(table.shape)}, "
                    f"but pos_embed.{name} is {tuple(given.shape)}"
                )
        layer.load_state_dict(state_dict)
        return layer


def _apply(convolution: nn.Conv2d, cells: Tensor) -> Tensor:
    """A 1 x 1 convolution of maps ``(batch, height, width, channels)``."""
    return linear(cells, convolution.weight[:, :, 0, 0], convolution.bias)


def multiple_of_8(width: float) -> int:
    """The nearest multiple of 8, at least 8, and not more than a tenth below (timm's rule)."""
    rounded = max(8, int(width + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * width else rounded
