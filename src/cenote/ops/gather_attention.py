"""Attention of one query to chosen positions of a cache: gather their keys and values, attend to those alone."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Positions(NamedTuple):
    """Chosen positions of a cache, one set a key and value head or one a query head.

    Attributes:
        index: ``(batch, sets, chosen)``; unused places hold any valid position.
        mask: which places are used, or ``None`` if all are.
    """

    index: Int[Tensor, "batch sets chosen"]  # type: ignore[assignment]  # hides tuple.index
    mask: Bool[Tensor, "batch sets chosen"] | None = None

    @classmethod
    def from_mask(cls, chosen: Bool[Tensor, "batch sets keys"]) -> Positions:
        """The positions where the mask is ``True``, in order.

        Raises:
            ValueError: a row that chooses nothing.
        """
        counts = chosen.sum(dim=-1)
        fewest, most = int(counts.min()), int(counts.max())
        if fewest == 0:
            raise ValueError("a selection is empty: every set must hold at least one position")
        index = chosen.byte().argsort(dim=-1, descending=True, stable=True)[..., :most]
        if fewest == most:
            return cls(index)
        used = torch.arange(most, device=index.device) < counts.unsqueeze(-1)
        return cls(torch.where(used, index, index[..., :1]), used)

    def with_visible(self, visible: Bool[Tensor, "batch keys"]) -> Positions:
        """The same positions, those that are not visible unused."""
        seen = visible.unsqueeze(1).expand(-1, self.index.shape[1], -1).gather(-1, self.index)
        return Positions(self.index, seen if self.mask is None else seen & self.mask)

    def to_mask(self, keys: int) -> Bool[Tensor, "batch sets keys"]:
        """``True`` at the chosen positions."""
        used = torch.ones_like(self.index, dtype=torch.bool) if self.mask is None else self.mask
        counts = torch.zeros(*self.index.shape[:2], keys, dtype=torch.int32, device=self.index.device)
        return counts.scatter_add_(-1, self.index, used.int()) > 0


def topk_positions(
    scores: Float[Tensor, "batch sets keys"],
    k: int | Int[Tensor, "batch"],
    visible: Bool[Tensor, "batch keys"] | None = None,
) -> Positions:
    """The ``k`` best visible positions of each set, or all of them where fewer are. ``k`` may be a number a row.

    Raises:
        ValueError: ``k`` below 1, or a row that sees nothing.
    """
    least = k if isinstance(k, int) else int(k.min())
    if least < 1:
        raise ValueError(f"k must be at least 1, got {least}")
    if visible is None and isinstance(k, int):
        return Positions(scores.topk(min(k, scores.shape[-1]), dim=-1, sorted=False).indices)
    counts = torch.full(scores.shape[:1], scores.shape[-1], device=scores.device)
    if visible is not None:
        counts = visible.sum(dim=-1)
        scores = scores.masked_fill(~visible.unsqueeze(1), float("-inf"))
    if int(counts.min()) == 0:
        raise ValueError("a selection is empty: a row sees no position")
    counts = counts.clamp(max=k)
    fewest, most = int(counts.min()), int(counts.max())
    index = scores.topk(most, dim=-1).indices
    if fewest == most:
        return Positions(index)
    used = (torch.arange(most, device=index.device) < counts[:, None, None]).expand_as(index)
    return Positions(torch.where(used, index, index[..., :1]), used)


def memory_rows(
    x: Float[Tensor, "batch heads keys dim"], index: Int[Tensor, "batch sets chosen"]
) -> tuple[Float[Tensor, "rows dim"], Int[Tensor, "places"]]:
    """The memory behind ``x`` as rows, and which of them each set's positions are.

    Several sets go to a head where there are more sets than heads. Views into a larger buffer, as caches give them, are
    read in place.

    Raises:
        ValueError: sets that are no multiple of the heads.
    """
    batch, heads, keys, dim = x.shape
    sets = index.shape[1]
    if sets % heads:
        raise ValueError(f"{sets} sets of positions do not fit {heads} heads")
    step_batch, step_head, step_key, step_dim = x.stride()
    if step_dim != 1 or step_key != dim or step_head % dim or step_batch % dim or x.numel() == 0:
        x = x.contiguous()
        step_batch, step_head = x.stride()[:2]
    rows_batch, rows_head = step_batch // dim, step_head // dim
    flat = x.as_strided(((batch - 1) * rows_batch + (heads - 1) * rows_head + keys, dim), (dim, 1))
    first = torch.arange(heads, device=x.device) * rows_head
    if batch > 1:
        first = first + torch.arange(batch, device=x.device)[:, None] * rows_batch
    return flat, (index.reshape(batch, heads, -1) + first.unsqueeze(-1)).flatten()


def gather_tokens(
    x: Float[Tensor, "batch heads keys dim"], index: Int[Tensor, "batch sets chosen"]
) -> Float[Tensor, "batch sets chosen dim"]:
    """Rows of ``x`` at these positions; several sets to a head where there are more sets than heads.

    One flat ``index_select`` over rows of memory: ``gather`` with an expanded index is slower than dense attention.

    Raises:
        ValueError: sets that are no multiple of the heads.
    """
    flat, rows = memory_rows(x, index)
    return flat.index_select(0, rows).view(*index.shape, x.shape[-1])


def gather_attention(
    query: Float[Tensor, "batch heads 1 head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    value: Float[Tensor, "batch kv_heads keys width"],
    positions: Positions,
    scale: float | None = None,
) -> Float[Tensor, "batch heads 1 width"]:
    """``softmax(q K_I^T * scale) V_I`` over each set ``I`` of positions, for the query heads that the set serves.

    Equal to attention over all keys with every position outside the set masked. Logits and softmax run in float32.

    Raises:
        ValueError: sets for neither key and value heads nor query heads.
    """
    batch, heads, _, head_dim = query.shape
    sets = positions.index.shape[1]
    if sets not in (heads, key.shape[1]):
        raise ValueError(f"expected one set for each of {key.shape[1]} key and value heads or {heads} query heads")
    grouped = query.reshape(batch, sets, heads // sets, head_dim)
    # The keys on the left: the other way round the product of one row is slower.
    logits = (gather_tokens(key, positions.index) @ grouped.transpose(-1, -2)).transpose(-1, -2).float()
    logits = logits * (head_dim**-0.5 if scale is None else scale)
    if positions.mask is not None:
        logits = logits.masked_fill(~positions.mask.unsqueeze(2), float("-inf"))
    weights = logits.softmax(dim=-1).to(value.dtype)
    if sets == heads and value.device.type == "cpu" and not (torch.is_grad_enabled() and _needs_grad(weights, value)):
        return _weighted_rows(weights.squeeze(2), value, positions.index).unsqueeze(2)
    return (weights @ gather_tokens(value, positions.index)).reshape(batch, heads, 1, -1)


def _weighted_rows(
    weights: Float[Tensor, "batch sets chosen"],
    x: Float[Tensor, "batch heads keys dim"],
    index: Int[Tensor, "batch sets chosen"],
) -> Float[Tensor, "batch sets dim"]:
    """``weights @ x[index]`` for one row of weights a set, summed while it is read: what is chosen is not copied."""
    flat, rows = memory_rows(x, index)
    ends = torch.arange(0, len(rows), index.shape[2])
    bags = F.embedding_bag(rows, flat, ends, mode="sum", per_sample_weights=weights.flatten())
    return bags.view(*index.shape[:2], -1)


def _needs_grad(*tensors: Tensor) -> bool:
    return any(tensor.requires_grad for tensor in tensors)


def decode_logits(
    query: Float[Tensor, "batch heads 1 head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    scale: float | None = None,
) -> Float[Tensor, "batch heads keys"]:
    """``q K^T * scale`` of one query in float32, keys shared by the query heads of their group."""
    batch, heads, _, head_dim = query.shape
    grouped = query.reshape(batch, key.shape[1], -1, head_dim)
    logits = (grouped @ key.transpose(-1, -2)).float() * (head_dim**-0.5 if scale is None else scale)
    return logits.reshape(batch, heads, -1)


def decode_attention(
    query: Float[Tensor, "batch heads 1 head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    value: Float[Tensor, "batch kv_heads keys width"],
    visible: Bool[Tensor, "batch keys"] | None = None,
    scale: float | None = None,
) -> tuple[Float[Tensor, "batch heads 1 width"], Float[Tensor, "batch heads keys"]]:
    """Dense attention of one query, and its probabilities in float32: what a selecting layer needs both of."""
    logits = decode_logits(query, key, scale)
    if visible is not None:
        logits = logits.masked_fill(~visible.unsqueeze(1), float("-inf"))
    weights = logits.softmax(dim=-1)
    return weigh_values(weights, value), weights


def weigh_values(
    weights: Float[Tensor, "batch heads keys"], value: Float[Tensor, "batch kv_heads keys width"]
) -> Float[Tensor, "batch heads 1 width"]:
    """``weights @ V``, values shared by the query heads of their group."""
    batch, heads, keys = weights.shape
    grouped = weights.to(value.dtype).reshape(batch, value.shape[1], -1, keys)
    return (grouped @ value).reshape(batch, heads, 1, -1)
