"""Chunks of a cache by their scores: which hold most of the attention, which to keep, at which positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cenote.ops.blocks import num_blocks
from cenote.ops.gather_attention import Positions


@dataclass(frozen=True)
class TokenOrder:
    """Where a row's real tokens are, so that chunks count those alone.

    Attributes:
        lengths: real tokens of each row.
        shortest: the least of them.
        longest: the largest.
        index: places of the ``longest`` first real tokens in order, then of others; ``None`` where they are in front.
    """

    lengths: Int[Tensor, " batch"]
    shortest: int
    longest: int
    index: Int[Tensor, "batch tokens"] | None = None

    @classmethod
    def of(cls, real: Bool[Tensor, "batch keys"]) -> TokenOrder:
        """The order of the real tokens, padding being anywhere."""
        lengths = real.sum(dim=-1)
        index = real.byte().argsort(dim=-1, descending=True, stable=True)
        longest = int(lengths.max())
        return cls(lengths, int(lengths.min()), longest, index[:, :longest])

    @classmethod
    def full(cls, rows: int, tokens: int, device: torch.device | None = None) -> TokenOrder:
        """The first ``tokens`` places of every row are the real ones."""
        return cls(torch.full((rows,), tokens, device=device), tokens, tokens)


def chunk_scores(
    scores: Float[Tensor, "batch sets keys"], chunk_size: int, kind: Literal["sum", "max"], order: TokenOrder
) -> Float[Tensor, "batch sets chunks"]:
    """Sum or maximum of the scores of each chunk of ``chunk_size`` real tokens; the last may be short.

    Chunks that a row does not have are 0 (sum) or ``-inf`` (max).
    """
    most = order.longest
    if order.index is None:
        scores = scores[..., :most]
    else:
        scores = scores.gather(-1, order.index.unsqueeze(1).expand(-1, scores.shape[1], -1))
    fill = 0.0 if kind == "sum" else float("-inf")
    if order.shortest < most:
        beyond = torch.arange(most, device=scores.device) >= order.lengths[:, None]
        scores = scores.masked_fill(beyond.unsqueeze(1), fill)
    missing = num_blocks(most, chunk_size) * chunk_size - most
    parts = F.pad(scores, (0, missing), value=fill).unflatten(-1, (-1, chunk_size))
    return parts.sum(dim=-1) if kind == "sum" else parts.amax(dim=-1)


def best_chunks(
    scores: Float[Tensor, "batch sets chunks"],
    keep: Int[Tensor, " batch"],
    chunks: Int[Tensor, " batch"],
    first: int = 0,
    last: int = 0,
) -> Positions:
    """Of each row's chunks the ``keep`` best, among them always its ``first`` first and ``last`` last ones.

    A row with fewer chunks keeps all. Of equal scores the earlier chunk is kept, whatever else is in the batch.
    """
    number = torch.arange(scores.shape[-1], device=scores.device)
    there = number < chunks[:, None]
    always = (number < first) | (number >= chunks[:, None] - last)
    ranked = scores.masked_fill((always & there).unsqueeze(1), float("inf"))
    ranked = ranked.masked_fill(~there.unsqueeze(1), float("-inf"))
    kept = torch.minimum(keep, chunks)
    most = int(kept.max())
    index = ranked.sort(dim=-1, descending=True, stable=True).indices[..., :most]
    if int(kept.min()) == most:
        return Positions(index.sort(dim=-1).values)
    used = (torch.arange(most, device=scores.device) < kept[:, None, None]).expand_as(index)
    return Positions(torch.where(used, index, index[..., :1]), used)


def chunk_positions(chunks: Positions, chunk_size: int, order: TokenOrder) -> Positions:
    """The cache positions of the tokens of these chunks."""
    index = (chunks.index.unsqueeze(-1) * chunk_size + torch.arange(chunk_size, device=chunks.index.device)).flatten(2)
    used = index < order.lengths[:, None, None]
    if chunks.mask is not None:
        used = used & chunks.mask.repeat_interleave(chunk_size, dim=-1)
    index = torch.minimum(index, order.lengths[:, None, None] - 1)
    if order.index is not None:
        index = order.index.unsqueeze(1).expand(-1, index.shape[1], -1).gather(-1, index)
    return Positions(index, None if bool(used.all()) else used)


def spread(
    mass: Float[Tensor, "batch sets chunks"], chunks: Int[Tensor, " batch"], share: float = 0.9
) -> Float[Tensor, "batch sets"]:
    """How many of a row's chunks, the heaviest first, together stay at or below ``share`` of its mass, per chunk.

    One less than those that reach it: a chunk that holds more than ``share`` gives 0. Lies in [0, 1).
    """
    heaviest = mass.double().sort(dim=-1, descending=True).values
    running = (heaviest / heaviest.sum(dim=-1, keepdim=True)).cumsum(dim=-1)
    within = (running <= share) & (torch.arange(mass.shape[-1], device=mass.device) < chunks[:, None, None])
    return within.sum(dim=-1).double() / chunks[:, None]


def common_members(sets: Bool[Tensor, "batch heads layers chunks"]) -> Int[Tensor, "batch heads layers layers"]:
    """``|S_i and S_j|`` for every pair of layers; on the diagonal the sizes of the sets."""
    members = sets.float()
    return (members @ members.transpose(-1, -2)).long()


def set_overlap(common: Int[Tensor, "heads layers layers"]) -> Float[Tensor, "heads layers layers"]:
    """``|S_i and S_j| / |S_j|`` for layers ``i < j``, 1 on the diagonal, 0 below, from :func:`common_members`.

    Counts summed over steps give the mean over steps, all sets being of one size. Dividing once and in float64 keeps
    equal overlaps equal, which a plan's comparisons rest on.
    """
    sizes = common.diagonal(dim1=1, dim2=2).clamp(min=1).double()
    overlap = (common / sizes.unsqueeze(-2)).triu(diagonal=1)
    return overlap + torch.eye(common.shape[1], device=common.device)
