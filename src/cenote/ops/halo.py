"""Local attention in blocks: the queries of a block share one neighbourhood, the block and a halo around it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from cenote.ops.halo_rows import attend_blocks

Border = Literal["zeros", "reflect"]
"""What lies outside of the map: keys and values of 0, or the map mirrored."""


def relative_rows(
    block: int, halo: int, stride: int = 1, pixel_offsets: bool = False, device: torch.device | None = None
) -> Int[Tensor, "queries window"]:
    """Row of the table for each query row (or column) of a block and each row of its window.

    ``w - 1 + t - u`` for the u-th query and the t-th of ``w = block + 2 halo`` window rows. With a stride the u-th
    query lies on pixel row ``stride * u``; ``pixel_offsets`` counts that: ``w - 1 + t - stride * u``.
    """
    window = block + 2 * halo
    query = torch.arange(block // stride, device=device) * (stride if pixel_offsets else 1)
    return window - 1 + torch.arange(window, device=device) - query[:, None]


def halo_attention(
    query: Float[Tensor, "batch rows columns heads dim"],
    key_value: Float[Tensor, "batch height width heads inner"],
    height_rel: Float[Tensor, "table dim"],
    width_rel: Float[Tensor, "table dim"],
    *,
    block: int,
    halo: int,
    keep: Bool[Tensor, "batch height width"] | None = None,
    mask_padding: bool = False,
    border: Border = "zeros",
    scale_positions: bool = False,
    pixel_offsets: bool = False,
    attend: Callable[..., Tensor] = attend_blocks,
) -> Float[Tensor, "batch rows columns heads values"]:
    """Blocked local attention with relative positions on maps, channels last.

    For each head ``softmax_k(q . k_k / sqrt(dim) + q . (height_rel[i] + width_rel[j])) v`` over the
    ``(block + 2 halo)^2`` cells of the window around the query's block, i and j as in :func:`relative_rows`.

    Args:
        query: every ``height / rows``-th cell of the map in each direction.
        key_value: for each head ``dim`` key channels, then its value channels.
        height_rel: vectors of row offsets, ``2 (block + 2 halo) - 1`` of them, shared by the heads.
        width_rel: of column offsets.
        block: side of a block.
        halo: cells around a block that its queries see as well.
        keep: cells that exist; the others get no weight. A query that sees none gets a number without meaning.
        mask_padding: leave cells outside of the map out of the softmax. Without, they are keys and values of 0, which
            take weight from the border's outputs.
        border: what lies outside of the map.
        scale_positions: divide position logits by ``sqrt(dim)`` too.
        pixel_offsets: see :func:`relative_rows`.
        attend: :func:`cenote.ops.halo_rows.attend_blocks` chooses the faster form; ``attend_windows`` is the other.

    Raises:
        ValueError: sides that are no multiples of the block, a negative halo, queries on no regular grid, tables of
            the wrong length, a mirrored border that is wider than the map or masked.
    """
    stride = _check(query, key_value, height_rel, width_rel, block, halo, mask_padding, border)
    dim, inside = query.shape[-1], block // stride
    scale = dim**-0.5
    by_block = query.unflatten(2, (-1, inside)).unflatten(1, (-1, inside)).permute(0, 1, 3, 5, 2, 4, 6).contiguous()
    index = relative_rows(block, halo, stride, pixel_offsets, query.device)
    rows = torch.einsum("...uvd,utd->...uvt", by_block, height_rel[index]).flatten(-3, -2)
    columns = torch.einsum("...uvd,vtd->...uvt", by_block, width_rel[index]).flatten(-3, -2)
    if scale_positions:
        rows, columns = rows * scale, columns * scale
    seen = keep
    if mask_padding and halo and keep is None:
        seen = torch.ones(key_value.shape[:3], dtype=torch.bool, device=query.device)
    if border == "reflect":
        key_value = _mirror(key_value, halo)
        seen = None if seen is None else _mirror(seen, halo)
    else:
        key_value = pad(key_value, (0, 0, 0, 0, halo, halo, halo, halo))
        seen = None if seen is None else pad(seen, (halo,) * 4, value=not mask_padding)
    mixed = attend(by_block.flatten(4, 5), key_value, rows, columns, seen, block, scale)
    return mixed.unflatten(4, (inside, inside)).permute(0, 1, 4, 2, 5, 3, 6).flatten(3, 4).flatten(1, 2)


def _check(
    query: Tensor,
    key_value: Tensor,
    height_rel: Tensor,
    width_rel: Tensor,
    block: int,
    halo: int,
    mask_padding: bool,
    border: Border,
) -> int:
    """The stride of the queries; raises as :func:`halo_attention` says."""
    height, width = key_value.shape[1:3]
    if block < 1 or halo < 0:
        raise ValueError(f"the block is at least 1 and the halo at least 0, got block={block}, halo={halo}")
    if height % block or width % block:
        raise ValueError(
            f"a map of {height} x {width} is not divisible into blocks of {block} x {block}: resize or pad it "
            "(HaloAttention pads with auto_pad=True)"
        )
    rows, columns = query.shape[1:3]
    stride = height // max(rows, 1)
    if stride < 1 or (rows * stride, columns * stride) != (height, width) or block % stride:
        raise ValueError(
            f"queries must lie on every s-th cell of the map, s a divisor of block={block}: got {rows} x {columns} "
            f"queries on {height} x {width} cells"
        )
    expected = (2 * (block + 2 * halo) - 1, query.shape[-1])
    for name, table in (("height_rel", height_rel), ("width_rel", width_rel)):
        if tuple(table.shape) != expected:
            raise ValueError(f"{name} must be (2 (block + 2 halo) - 1, dim) = {expected}, got {tuple(table.shape)}")
    if border not in ("zeros", "reflect"):
        raise ValueError(f"border must be 'zeros' or 'reflect', got {border!r}")
    if border == "reflect" and mask_padding:
        raise ValueError("a mirrored border is there to be seen: mask_padding goes with border='zeros'")
    if border == "reflect" and halo >= min(height, width):
        raise ValueError(f"a map of {height} x {width} cannot be mirrored {halo} cells wide")
    return stride


def _mirror(maps: Tensor, halo: int) -> Tensor:
    """Maps ``(batch, height, width, ...)`` with their mirror image around them, the outermost cells not repeated."""
    for axis in (1, 2):
        length = maps.shape[axis]
        place = torch.arange(-halo, length + halo, device=maps.device).abs()
        maps = maps.index_select(axis, length - 1 - (length - 1 - place).abs())
    return maps
