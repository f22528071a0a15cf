"""Bidirectional block-sparse attention, corrected by a pooled estimate of the full attention (Rectified SpaAttn).

Softmax over the kept blocks alone gives kept tokens too much weight and dropped tokens none. Block means of queries
and keys estimate how much mass every block would have had; the estimate scales the sparse output down and adds the
mean values of dropped blocks back, where their estimate can be trusted.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cenote.ops.block_estimate import estimate_blocks, pad_tokens, select_blocks
from cenote.ops.block_sparse import block_sparse_attention
from cenote.ops.masked import widen
from cenote.ops.precision import full_precision


class Rectified(NamedTuple):
    """Output and what led to it.

    Attributes:
        output: ``(batch, heads, tokens, head_dim)``.
        probs: see :attr:`cenote.ops.block_estimate.BlockEstimate.probs`.
        block_mask: which visual blocks every visual block attends, ``(batch, heads, blocks, blocks)``.
        compensated: dropped blocks whose mean value was added back, ``(batch, heads, blocks, blocks)``.
        kept_mass: the factor R of the sparse output, ``1 - sum_j probs_ij compensated_ij``,
            ``(batch, heads, blocks)``.
    """

    output: Tensor
    probs: Tensor
    block_mask: Tensor
    compensated: Tensor
    kept_mass: Tensor


def rectified_attention(
    query: Float[Tensor, "batch heads tokens head_dim"],
    key: Float[Tensor, "batch heads tokens head_dim"],
    value: Float[Tensor, "batch heads tokens head_dim"],
    *,
    block_size: int = 128,
    p: float = 0.3,
    top_k: int = 1,
    text_len: int = 0,
    text_valid: Int[Tensor, "_"] | None = None,
    neighbours: Bool[Tensor, "_ _"] | None = None,
    first_frame_blocks: int = 0,
    block_mask: Bool[Tensor, "_ _ _ _"] | None = None,
    compensate: str = "gain",
    mean: str = "real",
    allow_padding: bool = False,
    scale: float | None = None,
    backend: str = "auto",
) -> Rectified:
    """Sparse attention of visual tokens, scaled to the mass its blocks would have, plus means of dropped blocks.

    ``out_i = R_i sparse_i + sum_j P_ij comp_ij mean(v_j)`` with ``R_i = 1 - sum_j P_ij comp_ij`` for every query of
    block ``i``. ``P`` comes from :func:`cenote.ops.block_estimate.estimate_blocks`, the kept blocks from
    :func:`~cenote.ops.block_estimate.select_blocks` in union with ``neighbours`` and the first frame, and ``comp``
    marks dropped blocks that pass the gain test. Text tokens, behind the visual ones, are attended one by one by every
    query and attend everything themselves. Source: "Rectified SpaAttn" (arXiv 2511.19835).

    Other than the official code: any batch size with a text length per item, inputs are left as they are, a
    ragged last block counts as many keys as it holds, and no text at all is the visual-only form.

    Args:
        query, key, value: visual tokens in the order of the curve, then ``text_len`` text tokens.
        block_size: visual tokens a block.
        p: blocks are kept in falling order of estimated mass as long as their sum is at most ``p``, and one more;
            1 keeps all.
        top_k: keep at least so many columns (the text counts as one); the number of blocks or more keeps all.
        text_len: text tokens at the end.
        text_valid: how many of them, from the first, are real in each item; ``None`` for all.
        neighbours: blocks that are always kept, see :func:`cenote.ops.space_filling_curve.block_neighbours`.
        first_frame_blocks: so many first blocks always attend each other.
        block_mask: kept visual blocks, instead of choosing them by ``p``, ``top_k`` and what is always kept.
        compensate: ``"gain"`` adds back dropped blocks that pass the test, ``"all"`` every dropped block, ``"none"``
            no block, which is plain block-sparse attention over the same blocks.
        mean: ``"real"`` averages a ragged last block over its tokens, ``"padded"`` over ``block_size`` as the
            official code does, so that its means shrink and it still weighs as a whole block.
        allow_padding: with text, a visual length that ``block_size`` does not divide is refused unless this is set.
        scale: of the logits, ``head_dim ** -0.5`` by default.
        backend: of :func:`cenote.ops.block_sparse.block_sparse_attention`.

    Raises:
        ValueError: shapes that differ, lengths that do not fit, ``p`` outside (0, 1], ``top_k`` or ``block_size``
            below 1, neighbours or a block mask of another size, or a query block left without any key.
    """
    batch, heads, tokens, head_dim = _checked_shapes(query, key, value)
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    if not 0 < p <= 1:
        raise ValueError(f"p must lie in (0, 1], got {p}")
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if compensate not in ("gain", "all", "none"):
        raise ValueError(f"compensate must be 'gain', 'all' or 'none', got {compensate!r}")
    if mean not in ("real", "padded"):
        raise ValueError(f"mean must be 'real' or 'padded', got {mean!r}")
    text_mask = _text_mask(batch, tokens, text_len, text_valid, query.device)
    visual = tokens - text_len
    blocks = -(-visual // block_size)
    if text_len and visual % block_size and not allow_padding:
        raise ValueError(
            f"beside text the visual length must be a multiple of block_size = {block_size}, got {visual} "
            "(allow_padding=True pads it)"
        )
    if not 0 <= first_frame_blocks <= blocks:
        raise ValueError(f"first_frame_blocks must lie in 0..{blocks}, got {first_frame_blocks}")
    if neighbours is not None and neighbours.shape != (blocks, blocks):
        raise ValueError(f"neighbours must be ({blocks}, {blocks}), got {tuple(neighbours.shape)}")
    if block_mask is not None and block_mask.shape != (batch, heads, blocks, blocks):
        raise ValueError(f"block_mask must be {(batch, heads, blocks, blocks)}, got {tuple(block_mask.shape)}")
    scale = head_dim**-0.5 if scale is None else scale

    # Whatever stands on padding, NaN too, must reach neither a product nor a mean.
    text_key, text_value = (x[:, :, visual:].masked_fill(~text_mask[:, None, :, None], 0) for x in (key, value))
    q, k, v = (x[:, :, :visual] for x in (query, key, value))
    with full_precision(query):
        estimate = estimate_blocks(q, k, v, block_size, text_key, text_mask, mean, scale)
        if block_mask is None:
            block_mask = select_blocks(estimate.probs, p, top_k, blocks)
            if neighbours is not None:
                block_mask = block_mask | neighbours.to(block_mask.device)
            block_mask[..., :first_frame_blocks, :first_frame_blocks] = True
        compensated = ~block_mask
        if compensate != "all":
            compensated = compensated & estimate.good if compensate == "gain" else torch.zeros_like(compensated)
        added = estimate.probs[..., :blocks] * compensated
        kept_mass, correction = 1 - added.sum(-1), added @ estimate.values

    sparse = _sparse_rows(q, k, v, text_key, text_value, text_mask, block_mask, block_size, scale, backend)
    by_block = widen(sparse).unflatten(2, (blocks, block_size))
    rectified = by_block * kept_mass[..., None, None] + correction.unsqueeze(3)
    output = rectified.flatten(2, 3)[:, :, :visual].to(query.dtype)
    if text_len:
        everything = torch.cat([text_mask.new_ones(batch, visual), text_mask], dim=1)[:, None, None]
        keys, values = torch.cat([k, text_key], dim=2), torch.cat([v, text_value], dim=2)
        text = F.scaled_dot_product_attention(query[:, :, visual:], keys, values, attn_mask=everything, scale=scale)
        output = torch.cat([output, text.to(output.dtype)], dim=2)
    return Rectified(output, estimate.probs, block_mask, compensated, kept_mass)


def _sparse_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    text_key: Tensor,
    text_value: Tensor,
    text_mask: Tensor,
    block_mask: Tensor,
    block_size: int,
    scale: float,
    backend: str,
) -> Tensor:
    """Exact softmax attention of the padded visual queries over kept visual blocks and all text."""
    batch, _, visual, _ = q.shape
    pad = -visual % block_size
    text_pad = -text_key.shape[2] % block_size
    query, key, value = (pad_tokens(x, pad) for x in (q, k, v))
    if text_key.shape[2]:
        text = (pad_tokens(x, text_pad) for x in (text_key, text_value))
        key, value = (torch.cat(pair, dim=2) for pair in zip((key, value), text, strict=True))
    real = q.new_ones(batch, visual, dtype=torch.bool)
    real = torch.cat([F.pad(real, (0, pad)), F.pad(text_mask, (0, text_pad))], dim=1)
    text_blocks = (text_key.shape[2] + text_pad) // block_size
    mask = F.pad(block_mask, (0, text_blocks), value=True)
    hit = mask & real.view(batch, 1, 1, -1, block_size).any(-1)
    if not bool(hit.any(-1).all()):
        raise ValueError("every query block needs at least one kept block with a real token, but some have none")
    key_mask = None if bool(real.all()) else real
    return block_sparse_attention(
        query, key, value, mask, block_size, causal=False, key_mask=key_mask, scale=scale, backend=backend
    )


def _checked_shapes(query: Tensor, key: Tensor, value: Tensor) -> torch.Size:
    if query.ndim != 4 or not query.shape == key.shape == value.shape:
        raise ValueError(
            "query, key and value must all be (batch, heads, tokens, head_dim) of one shape, got "
            f"{tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}"
        )
    return query.shape


def _text_mask(batch: int, tokens: int, text_len: int, valid: Tensor | None, device: torch.device) -> Tensor:
    """Which text tokens are real, ``(batch, text_len)``."""
    if not 0 <= text_len < tokens:
        raise ValueError(f"text_len must lie in 0..{tokens - 1} for {tokens} tokens, got {text_len}")
    if valid is None:
        return torch.ones(batch, text_len, dtype=torch.bool, device=device)
    if valid.shape != (batch,) or valid.is_floating_point():
        raise ValueError(f"text_valid must be {batch} whole numbers, got {valid.dtype} of shape {tuple(valid.shape)}")
    if bool((valid < 0).any() | (valid > text_len).any()):
        raise ValueError(f"text_valid must lie in 0..text_len = {text_len}, got {valid.tolist()}")
    return torch.arange(text_len, device=device) < valid.to(device)[:, None]
