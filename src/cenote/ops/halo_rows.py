"""Attention of blocks over their neighbourhoods, a few rows of blocks at a time: the fast form on a processor.

Laying out every neighbourhood copies keys and values ``(window / block)^2`` times; logits, their gradient and the
weights are ``window^2`` numbers a pixel and head. Here neighbourhoods and logits exist for a few rows of blocks at a
time and stay in the processor's cache. The weights alone are kept, and only where a gradient is wanted.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

_PIECE = 400_000
"""About as many logits at a time, a row of blocks at least; 1.6 MB of them."""


def attend_blocks(
    query: Float[Tensor, "batch down across heads queries dim"],
    key_value: Float[Tensor, "batch height width heads inner"],
    rows: Float[Tensor, "batch down across heads queries window"],
    columns: Float[Tensor, "batch down across heads queries window"],
    seen: Bool[Tensor, "batch height width"] | None,
    block: int,
    scale: float,
) -> Float[Tensor, "batch down across heads queries values"]:
    """``softmax(scale q k^T + rows + columns) v`` of each block over its window of a map.

    Args:
        query: by block.
        key_value: for each head its keys, then its values; the map has its halo around it.
        rows: position logits of the rows of the window.
        columns: position logits of its columns.
        seen: cells that take part; ``None`` for all. A query that sees none gets a finite number without meaning.
        block: distance of windows in cells.
        scale: factor of the content logits.
    """
    fast = query.device.type == "cpu" and query.dtype in (torch.float32, torch.float64)
    if fast and not torch.compiler.is_compiling():
        return _Rows.apply(query, key_value, rows, columns, seen, block, scale)
    return attend_windows(query, key_value, rows, columns, seen, block, scale)


def attend_windows(
    query: Float[Tensor, "batch down across heads queries dim"],
    key_value: Float[Tensor, "batch height width heads inner"],
    rows: Float[Tensor, "batch down across heads queries window"],
    columns: Float[Tensor, "batch down across heads queries window"],
    seen: Bool[Tensor, "batch height width"] | None,
    block: int,
    scale: float,
) -> Float[Tensor, "batch down across heads queries values"]:
    """:func:`attend_blocks` with all windows laid out: for accelerators, compilers and half precision."""
    dim, side = query.shape[-1], rows.shape[-1]
    near = _windows(key_value, side, block)
    bias = (rows.unsqueeze(-1) + columns.unsqueeze(-2)).flatten(-2)
    if seen is not None:
        bias = bias.masked_fill(~_windows(seen[..., None, None], side, block).mT, torch.finfo(bias.dtype).min)
    queries, keys, values, bias = (x.flatten(0, 2) for x in (query, near[..., :dim], near[..., dim:], bias))
    mixed = torch.nn.functional.scaled_dot_product_attention(queries, keys, values, bias, scale=scale)
    return mixed.unflatten(0, query.shape[:3])


def _windows(maps: Tensor, side: int, block: int) -> Tensor:
    """``(batch, down, across, heads, side * side, inner)`` of maps ``(batch, height, width, heads, inner)``."""
    view = maps.unfold(1, side, block).unfold(2, side, block)  # batch, down, across, heads, inner, side, side
    return view.permute(0, 1, 2, 3, 5, 6, 4).flatten(4, 5)


class _Piece(NamedTuple):
    """Some items' blocks of one row, blocks and heads flattened.

    Attributes:
        at: index of the piece in tensors by block.
        query: ``(blocks * heads, queries, dim)``.
        near: keys and values of the windows, ``(blocks * heads, side * side, inner)``.
        hidden: what the windows must not see, ``(blocks, 1, side * side)``.
    """

    at: tuple[slice, int]
    query: Tensor
    near: Tensor
    hidden: Tensor | None


def _pieces(query: Tensor, key_value: Tensor, seen: Tensor | None, block: int, side: int) -> Iterator[_Piece]:
    batch, down, across, heads = query.shape[:4]
    items = max(1, _PIECE // (across * heads * query.shape[4] * side * side))
    for start in range(0, batch, items):
        for row in range(down):
            at = (slice(start, start + items), row)
            band = (at[0], slice(row * block, row * block + side))
            near = _windows(key_value[band], side, block).flatten(0, 3)
            hidden = None
            if seen is not None:
                hidden = ~_windows(seen[band][..., None, None], side, block).flatten(0, 3).mT
            yield _Piece(at, query[at].flatten(0, 2), near, hidden)


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key_value: Tensor,
        rows: Tensor,
        columns: Tensor,
        seen: Tensor | None,
        block: int,
        scale: float,
    ) -> Tensor:
        dim, side = query.shape[-1], rows.shape[-1]
        mixed = query.new_empty(*query.shape[:-1], key_value.shape[-1] - dim)
        kept: list[Tensor] = []
        logits = query.new_empty(0)
        for piece in _pieces(query, key_value, seen, block, side):
            shape = (*piece.query.shape[:2], side * side)
            if any(ctx.needs_input_grad) or logits.shape != shape:
                logits = query.new_empty(shape)
            row, column = rows[piece.at], columns[piece.at]
            torch.add(row.unsqueeze(-1), column.unsqueeze(-2), out=logits.view(*row.shape, side))
            logits.baddbmm_(piece.query, piece.near[..., :dim].mT, alpha=scale)
            if piece.hidden is not None:
                logits.unflatten(0, (len(piece.hidden), -1)).masked_fill_(
                    piece.hidden.unsqueeze(1), torch.finfo(logits.dtype).min
                )
            weights = torch.softmax(logits, dim=-1, out=logits)
            mixed[piece.at] = torch.bmm(weights, piece.near[..., dim:]).view_as(mixed[piece.at])
            kept.append(weights)
        ctx.save_for_backward(query, key_value, rows, columns, seen, *(kept if any(ctx.needs_input_grad) else ()))
        ctx.block, ctx.scale = block, scale
        return mixed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        query, key_value, rows, columns, seen, *kept = ctx.saved_tensors
        block, scale = ctx.block, ctx.scale
        if torch.is_grad_enabled():  # a gradient of the gradient is wanted
            inputs = (query, key_value, rows, columns)
            mixed = attend_windows(*inputs, seen, block, scale)
            wanted = [x for x, need in zip(inputs, ctx.needs_input_grad, strict=False) if need]
            found = iter(torch.autograd.grad(mixed, wanted, grad, create_graph=True))
            return (*(next(found) if need else None for need in ctx.needs_input_grad[:4]), None, None, None)
        dim, side = query.shape[-1], rows.shape[-1]
        d_query, d_rows, d_columns = (torch.empty_like(x) for x in (query, rows, columns))
        d_map = torch.zeros_like(key_value)
        for piece, weights in zip(_pieces(query, key_value, seen, block, side), kept, strict=True):
            out = grad[piece.at].flatten(0, 2)
            d_near = torch.empty_like(piece.near)
            d_near[..., dim:] = torch.bmm(weights.mT, out)
            d_weights = torch.bmm(out, piece.near[..., dim:].mT)
            d_logits = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype)
            if piece.hidden is not None:
                d_logits.unflatten(0, (len(piece.hidden), -1)).masked_fill_(piece.hidden.unsqueeze(1), 0.0)
            d_near[..., :dim] = torch.bmm(d_logits.mT, piece.query).mul_(scale)
            d_query[piece.at] = torch.bmm(d_logits, piece.near[..., :dim]).mul_(scale).view_as(query[piece.at])
            square = d_logits.view(*rows[piece.at].shape, side)
            d_rows[piece.at], d_columns[piece.at] = square.sum(dim=-1), square.sum(dim=-2)
            _spread(d_map[piece.at[0]], d_near.view(*query[piece.at].shape[:3], side, side, -1), piece.at[1], block)
        return d_query, d_map, d_rows, d_columns, None, None, None


def _spread(maps: Tensor, d_near: Tensor, row: int, block: int) -> None:
    """Add what the windows ``(batch, across, heads, side, side, inner)`` of a row of blocks hold to their cells."""
    side = d_near.shape[3]
    cells = maps[:, row * block : row * block + side].unfold(2, side, block)  # batch, side, across, heads, inner, side
    d_near = d_near.permute(0, 3, 1, 2, 5, 4)
    for start in range(0, side, block):  # neighbouring windows share no cell within a block's width
        cells[..., start : start + block] += d_near[..., start : start + block]
