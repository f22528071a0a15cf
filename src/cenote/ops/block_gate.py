"""Which blocks of an attention map carry weight: scores of block pairs, what they choose, and what they learn from."""

from __future__ import annotations

import math
import re

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from cenote.ops.attention_statistics import block_maxima
from cenote.ops.blocks import causal_blocks, pool_blocks
from cenote.ops.selection import select_threshold, select_topk

MASKED = -1e30
"""Logit of a pair of blocks that is not causal: finite, so that a target of 0 there costs 0."""
KINDS = {"max": "max", "min": "min", "avg": "mean"}
"""Poolings in the order of their channels, which is the same whatever order a gate type names them in."""


def parse_kinds(text: str, side: str) -> tuple[str, ...]:
    """``"Kmaxminavg"`` to the kinds it names, in the order of their channels.

    Args:
        side: the letter in front, ``"Q"`` or ``"K"``.

    Raises:
        ValueError: an unknown, repeated or missing kind.
    """
    named = re.findall("|".join(KINDS), text[1:])
    if not text.startswith(side) or not named or side + "".join(named) != text or len(set(named)) != len(named):
        raise ValueError(f"expected {side} and then max, min and avg, each at most once and one at least, got {text!r}")
    return tuple(kind for kind in KINDS if kind in named)


def parse_gate_type(text: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """``"Qavg_Kmaxminavg"`` to the kinds of pooling of queries and of keys.

    Raises:
        ValueError: a text of another form.
    """
    queries, bar, keys = text.partition("_")
    if not bar:
        raise ValueError(f"a gate type is Q<kinds>_K<kinds>, such as 'Qavg_Kmaxminavg', got {text!r}")
    return parse_kinds(queries, "Q"), parse_kinds(keys, "K")


def pool_kinds(
    x: Float[Tensor, "batch heads tokens dim"], block_size: int, kinds: tuple[str, ...]
) -> Float[Tensor, "batch heads blocks width"]:
    """Several poolings of each block side by side, ``width = len(kinds) * dim``, in float32."""
    return torch.cat([pool_blocks(x, block_size, KINDS[kind]).float() for kind in kinds], dim=-1)


def block_logits(
    query: Float[Tensor, "batch heads blocks dim"], key: Float[Tensor, "batch kv_heads blocks dim"]
) -> Float[Tensor, "batch heads blocks blocks"]:
    """``q_i k_j^T / sqrt(dim)`` of two blocks, :data:`MASKED` where block ``j`` lies behind ``i``."""
    batch, heads, blocks, dim = query.shape
    grouped = query.reshape(batch, key.shape[1], -1, blocks, dim)
    logits = (grouped @ key.transpose(-1, -2).unsqueeze(2)).reshape(batch, heads, blocks, blocks) * dim**-0.5
    return logits.masked_fill(~causal_blocks(blocks, blocks, logits.device), MASKED)


def kept_columns(nz_ratio: float, blocks: int) -> int:
    """Blocks a row keeps so that a share ``nz_ratio`` of the causal triangle stays: ``max(1, floor((1 - sqrt(1 - r))
    N))``.

    ``k`` of ``N`` columns hold ``2 x - x^2`` of the triangle, with ``x = k / N``.
    """
    return max(1, math.floor((1 - math.sqrt(1 - nz_ratio)) * blocks))


def choose_blocks(
    logits: Float[Tensor, "batch heads blocks blocks"],
    *,
    nz_ratio: float = 1.0,
    threshold: float | None = None,
    last_block_dense: bool = True,
) -> Bool[Tensor, "batch heads blocks blocks"]:
    """Which pairs of blocks are attended to.

    Args:
        logits: of all pairs; those behind the diagonal are ignored.
        nz_ratio: keep this share of the causal triangle by the same number of best blocks a row.
        threshold: keep the blocks whose softmax over the row is strictly above it instead; a row that has none keeps
            its best. 0 keeps every block.
        last_block_dense: whether the last two rows of blocks keep everything.

    Raises:
        ValueError: ``nz_ratio`` outside (0, 1] or ``threshold`` outside [0, 1).
    """
    check_sparsity(nz_ratio, threshold)
    blocks = logits.shape[-1]
    seen = causal_blocks(blocks, blocks, logits.device)
    if threshold == 0:
        chosen = torch.ones_like(logits, dtype=torch.bool)
    elif threshold is not None:
        scores = logits.float().masked_fill(~seen, MASKED).softmax(dim=-1)
        chosen = select_threshold(scores, threshold, seen.expand_as(scores))
    else:
        chosen = select_topk(logits, kept_columns(nz_ratio, blocks), seen.expand_as(logits))
    if last_block_dense:
        chosen[:, :, -2:] = True
    return chosen & seen


def check_sparsity(nz_ratio: float, threshold: float | None) -> None:
    """Raise ``ValueError`` for a share outside (0, 1] or a threshold outside [0, 1)."""
    if not 0 < nz_ratio <= 1:
        raise ValueError(f"nz_ratio must lie in (0, 1], got {nz_ratio}")
    if threshold is not None and not 0 <= threshold < 1:
        raise ValueError(f"threshold must lie in [0, 1), got {threshold}")


def block_target(
    query: Float[Tensor, "batch heads tokens head_dim"],
    key: Float[Tensor, "batch kv_heads tokens head_dim"],
    block_size: int,
    scale: float | None = None,
) -> Float[Tensor, "batch heads blocks blocks"]:
    """What a gate learns: the largest attention probability in each pair of blocks, rows divided by their sums.

    Made one row of blocks at a time: no attention map is ever whole in memory.
    """
    maxima = block_maxima(query, key, block_size, scale=scale)
    return maxima / maxima.sum(dim=-1, keepdim=True)


def distillation_loss(
    logits: Float[Tensor, "batch heads rows blocks"],
    target: Float[Tensor, "batch heads rows blocks"],
    reduction: str = "mean",
    drop: float = 0.25,
) -> Float[Tensor, ""]:
    """``KL(target || softmax(logits))`` with the first rows left out, before the published factor of 10.

    Args:
        reduction: ``"mean"`` over all entries, as published, which makes the loss small and dependent on the length;
            ``"row"`` sums over a row's entries and takes the mean over rows.
        drop: share of the first rows that is left out: ``floor(drop * rows)``.

    Raises:
        ValueError: an unknown reduction.
    """
    if reduction not in ("mean", "row"):
        raise ValueError(f"reduction must be 'mean' or 'row', got {reduction!r}")
    first = math.floor(drop * logits.shape[2])
    log_scores = logits[:, :, first:].float().log_softmax(dim=-1)
    entries = F.kl_div(log_scores, target[:, :, first:], reduction="none")
    return entries.mean() if reduction == "mean" else entries.sum(dim=-1).mean()


def quest_bounds(
    query: Float[Tensor, "batch heads tokens head_dim"],
    key: Float[Tensor, "batch kv_heads tokens head_dim"],
    block_size: int,
) -> Float[Tensor, "batch heads blocks blocks"]:
    """Upper bounds of the inner products in each pair of blocks, from the keys' range in each channel.

    ``max_{q in block} sum_d max(q_d max_d, q_d min_d)`` with maximum and minimum over the keys of the other block
    ("Quest", arXiv 2406.10774, whose queries are single tokens). Not masked.
    """
    high, low = (pool_blocks(key, block_size, kind).float().transpose(-1, -2).unsqueeze(2) for kind in ("max", "min"))
    rows = []
    for part in query.split(block_size, dim=2):  # a bound for each token and block at once would take gigabytes
        grouped = part.float().unflatten(1, (key.shape[1], -1))
        bounds = grouped.clamp(min=0) @ high + grouped.clamp(max=0) @ low
        rows.append(bounds.amax(dim=3).flatten(1, 2))
    return torch.stack(rows, dim=2)
