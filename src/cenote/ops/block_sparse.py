"""Softmax attention over chosen pairs of blocks: every pair that is not chosen is never computed."""

from __future__ import annotations

import functools
import shutil
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from cenote.ops.blocks import num_blocks

FLEX_FROM = 8192
"""Tokens from which compiling FlexAttention pays on a CPU."""


def block_sparse_attention(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    value: Float[Tensor, "batch kv_heads keys width"],
    block_mask: Bool[Tensor, "#batch #heads query_blocks key_blocks"],
    block_size: int,
    *,
    causal: bool = True,
    key_mask: Bool[Tensor, "batch keys"] | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Float[Tensor, "batch heads queries width"]:
    """Attention of each query to the real keys of the blocks chosen for its block, none later than itself.

    Equal to dense attention under the mask that the blocks stand for. With ``causal`` the last query is at the last
    key. A query that sees nothing, such as a padding one, gets 0. Differentiable with the torch backend.

    Args:
        block_mask: the chosen pairs; pairs beyond the causal triangle are ignored. The last block of either side may
            be short.
        block_size: tokens of a block.
        key_mask: which keys are real.
        scale: factor on the logits, ``1 / sqrt(head_dim)`` unless given.
        backend: ``"torch"`` gathers the chosen blocks of each row of blocks and attends to them; ``"flex"`` compiles
            FlexAttention, for a GPU or long inputs; ``"auto"`` picks.

    Raises:
        ValueError: a mask of another shape, a row of blocks with nothing chosen, or an unknown backend.
    """
    queries, keys = query.shape[2], key.shape[2]
    shape = (num_blocks(queries, block_size), num_blocks(keys, block_size))
    if tuple(block_mask.shape[2:]) != shape:
        raise ValueError(f"expected a mask of {shape} blocks of {block_size}, got {tuple(block_mask.shape[2:])}")
    if query.shape[1] % key.shape[1]:
        raise ValueError(f"{query.shape[1]} query heads do not share {key.shape[1]} key and value heads")
    if causal and queries > keys:
        raise ValueError(f"{queries} queries cannot end at the last of {keys} keys")
    chosen = block_mask
    if causal:
        # A block of queries may reach one block further where the two grids do not line up.
        last = (
            torch.arange(1, shape[0] + 1, device=query.device).mul(block_size).clamp(max=queries) - 1 + keys - queries
        )
        chosen = chosen & (torch.arange(shape[1], device=query.device) * block_size <= last[:, None])
    if not bool(chosen.any(dim=-1).all()):
        raise ValueError("a row of blocks has nothing chosen: every block of queries needs a block of keys to see")
    if backend not in ("auto", "torch", "flex"):
        raise ValueError(f"backend must be 'auto', 'torch' or 'flex', got {backend!r}")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if backend == "flex" or (backend == "auto" and _flex_pays(query, key, value, key_mask, block_size)):
        return _flex(query, key, value, chosen, block_size, causal, key_mask, scale)
    return _gathered(query, key, value, chosen, block_size, causal, key_mask, scale)


def _gathered(
    query: Tensor, key: Tensor, value: Tensor, chosen: Tensor, block_size: int, causal: bool, key_mask: Tensor | None,
    scale: float,
) -> Tensor:  # fmt: skip
    """A row of query blocks at a time: its keys and values by one ``index_select`` of whole blocks, then fused.

    Which pairs of a query and a gathered key count is said in patterns of a block: seen whole, seen in part where the
    row's own end cuts through (one block, or two where the grids of queries and keys do not line up), not used. Where
    all heads read the same patterns, as with equally many blocks each and their own among them, one mask serves them
    all: making and reading a mask for each costs as much as attention.
    """
    batch, heads, queries, head_dim = query.shape
    kv_heads, keys = key.shape[1:3]
    chosen = chosen.expand(batch, heads, -1, -1)
    counts = chosen.sum(dim=-1)
    order = chosen.byte().argsort(dim=-1, descending=True, stable=True)
    blocks = chosen.shape[-1]
    missing = blocks * block_size - keys
    key_rows, value_rows = (F.pad(x, (0, 0, 0, missing)).reshape(-1, block_size * x.shape[-1]) for x in (key, value))
    row = torch.arange(batch, device=query.device)[:, None] * kv_heads
    row = (row + torch.arange(heads, device=query.device) // (heads // kv_heads)) * blocks
    real = None if key_mask is None else F.pad(key_mask, (0, missing)).unflatten(1, (blocks, block_size))
    items = torch.arange(batch, device=query.device)[:, None, None]
    blind = real is not None or (causal and (keys - queries) % block_size)  # then a query may see nothing
    edges = [_whole(number * block_size, queries, keys, block_size, causal) for number in range(counts.shape[-1])]
    near = torch.tensor(edges, device=query.device).unsqueeze(-1) + torch.arange(2, device=query.device)
    near = near.clamp(max=blocks - 1)
    at_edge = chosen.gather(-1, near.expand(batch, heads, -1, -1))
    alike = (_same(counts) & _same(at_edge).all(dim=-1)).tolist()
    cut = at_edge.any(dim=-1).any(dim=1).any(dim=0).tolist()
    most = counts.amax(dim=(0, 1)).tolist()
    out = []
    for number, width in enumerate(most):
        first, last = number * block_size, min((number + 1) * block_size, queries)
        index = order[:, :, number, :width]
        picked = (index + row.unsqueeze(-1)).flatten()
        k = key_rows.index_select(0, picked).view(batch, heads, width * block_size, head_dim)
        v = value_rows.index_select(0, picked).view(batch, heads, width * block_size, -1)
        seen = None
        if cut[number] or not alike[number]:
            pattern = (index - edges[number] + 1).clamp(min=0, max=2)
            if alike[number]:
                pattern = pattern[:1, :1]
            else:
                used = torch.arange(width, device=query.device) < counts[:, :, number, None]
                pattern = pattern.masked_fill(~used, 3)
            kinds = _patterns(first, last, edges[number], queries, keys, block_size, causal, query.device)
            seen = kinds[pattern].transpose(2, 3).flatten(3)
        if real is not None:
            there = real[items, index].flatten(2).unsqueeze(2)
            seen = there if seen is None else seen & there
        part = F.scaled_dot_product_attention(query[:, :, first:last], k, v, seen, scale=scale)
        if seen is not None and blind:
            part = part.masked_fill(~seen.any(dim=-1, keepdim=True), 0.0)
        out.append(part)
    return torch.cat(out, dim=2)


def _whole(first: int, queries: int, keys: int, block_size: int, causal: bool) -> int:
    """How many blocks of keys every query from ``first`` on sees whole."""
    return ((first + keys - queries + 1) if causal else keys) // block_size


def _patterns(
    first: int, last: int, edge: int, queries: int, keys: int, block_size: int, causal: bool, device: torch.device
) -> Bool[Tensor, "4 rows block_size"]:
    """Which keys of a block the queries ``first`` to ``last - 1`` see: of one before ``edge``, of that, of the next,
    and of none."""
    places = torch.arange(edge * block_size, (edge + 2) * block_size, device=device).view(2, 1, block_size)
    own = torch.arange(first, last, device=device).unsqueeze(-1) + keys - queries
    part = (places < keys) & ((places <= own) if causal else torch.ones_like(own, dtype=torch.bool))
    whole = torch.ones_like(part[:1])
    return torch.cat([whole, part, ~whole])


def _same(x: Tensor) -> Tensor:
    """Whether all heads of all items say the same, ``(batch, heads, ...)`` to ``(...)``."""
    return (x == x[:1, :1]).flatten(0, 1).all(dim=0)


def _flex(
    query: Tensor, key: Tensor, value: Tensor, chosen: Tensor, block_size: int, causal: bool, key_mask: Tensor | None,
    scale: float,
) -> Tensor:  # fmt: skip
    """FlexAttention over the chosen blocks; pairs that are seen whole skip the test of single tokens."""
    from torch.nn.attention.flex_attention import BlockMask

    queries, keys = query.shape[2], key.shape[2]
    blocks = chosen.shape[-1]
    whole = torch.ones(*chosen.shape[-2:], dtype=torch.bool, device=query.device)
    if causal:
        first = torch.arange(chosen.shape[-2], device=query.device) * block_size + keys - queries
        end = torch.arange(1, blocks + 1, device=query.device) * block_size - 1
        whole = end <= first[:, None]
    if keys % block_size:
        whole[:, -1] = False
    if queries % block_size:
        whole[-1] = False
    whole = whole.expand_as(chosen)
    if key_mask is not None:
        full = F.pad(key_mask, (0, blocks * block_size - keys)).unflatten(1, (blocks, block_size)).all(dim=-1)
        whole = whole & full[:, None, None]
    counts, indices = _ordered(chosen & ~whole)
    full_counts, full_indices = _ordered(chosen & whole)
    mask = BlockMask.from_kv_blocks(
        counts, indices, full_counts, full_indices,
        BLOCK_SIZE=block_size, mask_mod=_see(causal, keys - queries, key_mask), seq_lengths=(queries, keys),
    )  # fmt: skip
    # The code for CPUs does not compile where a mask is read at symbolic sizes: then each shape is its own.
    run = _compiled_flex(causal, key_mask is None)
    with torch._dynamo.config.patch(recompile_limit=64):
        out = run(query, key, value, block_mask=mask, scale=scale, enable_gqa=query.shape[1] != key.shape[1])
    return out.nan_to_num() if key_mask is not None else out


def _see(causal: bool, shift: int, key_mask: Tensor | None) -> Any:
    """The test of a single pair, a function of its own for each kind of mask so that each is compiled once."""
    if key_mask is None:
        return (lambda b, h, q, k: k <= q + shift) if causal else (lambda b, h, q, k: k >= 0)
    if causal:
        return lambda b, h, q, k: (k <= q + shift) & key_mask[b, k]
    return lambda b, h, q, k: key_mask[b, k]


def _ordered(mask: Tensor) -> tuple[Tensor, Tensor]:
    counts = mask.sum(dim=-1).int()
    return counts, mask.byte().argsort(dim=-1, descending=True, stable=True).int()


@functools.cache
def _compiled_flex(causal: bool, any_shape: bool) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    # A full graph or an error: what FlexAttention does uncompiled is slow and, with rows that see nothing, wrong.
    return torch.compile(flex_attention, fullgraph=True, dynamic=None if any_shape else False)


@functools.cache
def _compiler() -> bool:
    return any(shutil.which(name) for name in ("g++", "clang++", "c++"))


def _fits_tiles(block_size: int, head_dim: int, width: int) -> bool:
    """Whether FlexAttention's GPU kernels take these sizes: they refuse other blocks and narrower heads."""
    return block_size >= 16 and block_size.bit_count() == 1 and min(head_dim, width) >= 16


def _flex_pays(query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, block_size: int) -> bool:
    learning = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    if torch.compiler.is_compiling() or learning:
        return False
    if query.is_cuda:
        return _fits_tiles(block_size, query.shape[-1], value.shape[-1])
    return query.device.type == "cpu" and key_mask is None and query.shape[2] >= FLEX_FROM and _compiler()
