"""SeerAttention's gates: small modules that predict which blocks of an attention map carry weight."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cenote.ops.block_gate import block_logits, parse_gate_type, parse_kinds, pool_kinds
from cenote.ops.precision import full_precision
from cenote.ops.rotary import rotate_by

Rotary = tuple[Tensor, Tensor]
"""Cosines and sines as a host hands them to its layers, ``(batch, positions, width)`` each."""


class HeadLinear(nn.Module):
    """A matrix of its own for each head, ``y_h = x_h W_h`` with ``W`` of shape ``(heads, in_dim, out_dim)``.

    Runs in float32, also under autocast: what comes in has been pooled and is small.
    """

    def __init__(self, heads: int, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, in_dim, out_dim).normal_(std=0.02))

    def forward(self, x: Float[Tensor, "batch heads tokens in_dim"]) -> Float[Tensor, "batch heads tokens out_dim"]:
        with full_precision(x):
            return x.float() @ self.weight.float()


def turn(x: Float[Tensor, "batch heads tokens dim"], rotary: Rotary | None) -> Float[Tensor, "batch heads tokens dim"]:
    """Rotary positions at a gate's width; channels beyond the host's stay as they are."""
    if rotary is None:
        return x
    cos, sin = (part.float().unsqueeze(1) for part in rotary)
    if cos.shape[-1] > x.shape[-1]:
        raise ValueError(f"a gate of width {x.shape[-1]} is too narrow for rotary positions of width {cos.shape[-1]}")
    return rotate_by(x, cos, sin)


class PrefillGate(nn.Module):
    """Scores every pair of a block of queries and a block of keys.

    ``logits = turn(pool(q) W_q) turn(pool(k) W_k)^T / sqrt(hidden_size)``: pooled over blocks in the ways that
    ``gate_type`` names, projected head by head, turned to the positions of the blocks' first tokens. Where queries are
    pooled in one way and ``hidden_size`` is the heads' width they are not projected, and every query head has a key
    projection of its own; otherwise, or with ``force_double``, there are two projections. Source: "SeerAttention"
    (arXiv 2410.13276).

    Args:
        heads: query heads.
        kv_heads: key and value heads.
        head_dim: width of a head.
        block_size: tokens of a block.
        hidden_size: width of the projections; ``head_dim`` if ``None``.
        gate_type: ``Q<kinds>_K<kinds>`` with kinds out of ``max``, ``min``, ``avg``.
        force_double: project the queries in any case.

    Raises:
        ValueError: heads that the key and value heads do not divide, a block size below 1, an unknown gate type.
    """

    def __init__(
        self, heads: int, kv_heads: int, head_dim: int, block_size: int = 64, hidden_size: int | None = None,
        gate_type: str = "Qavg_Kmaxminavg", force_double: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        check_sizes(heads, kv_heads, block_size)
        self.block_size = block_size
        self.query_kinds, self.key_kinds = parse_gate_type(gate_type)
        width = head_dim if hidden_size is None else hidden_size
        double = len(self.query_kinds) > 1 or width != head_dim or force_double
        self.groups = 1 if double else heads // kv_heads
        self.query = HeadLinear(heads, len(self.query_kinds) * head_dim, width) if double else None
        self.key = HeadLinear(kv_heads * self.groups, len(self.key_kinds) * head_dim, width)

    def pool(
        self,
        query: Float[Tensor, "batch heads tokens head_dim"],
        key: Float[Tensor, "batch kv_heads tokens head_dim"],
    ) -> tuple[Float[Tensor, "batch heads blocks query_width"], Float[Tensor, "batch kv_heads blocks key_width"]]:
        """What the gate reads of queries and keys without rotary positions. No parameter takes part."""
        return pool_kinds(query, self.block_size, self.query_kinds), pool_kinds(key, self.block_size, self.key_kinds)

    def score(
        self,
        query: Float[Tensor, "batch heads blocks query_width"],
        key: Float[Tensor, "batch kv_heads blocks key_width"],
        rotary: Rotary | None,
    ) -> Float[Tensor, "batch heads blocks blocks"]:
        """Logits from pooled queries and keys and the rotary positions ``(batch, blocks, width)`` of the blocks."""
        wide = key.repeat_interleave(self.groups, dim=1)
        with full_precision(query):
            read = query if self.query is None else self.query(query)
            return block_logits(turn(read, rotary), turn(self.key(wide), rotary))

    def forward(
        self,
        query: Float[Tensor, "batch heads tokens head_dim"],
        key: Float[Tensor, "batch kv_heads tokens head_dim"],
        rotary: Rotary | None,
    ) -> Float[Tensor, "batch heads blocks blocks"]:
        """Logits from queries and keys without rotary positions, and the cosines and sines of every token."""
        at = None if rotary is None else (rotary[0][:, :: self.block_size], rotary[1][:, :: self.block_size])
        return self.score(*self.pool(query, key), at)


class DecodeGate(nn.Module):
    """Scores every block of keys for a single query, once for each key and value head.

    ``logits = q_gate k_gate^T / sqrt(hidden_size)``: the query heads that share a key and value head become one
    query, keys are pooled over blocks and projected, both are normalised if ``qk_norm`` and turned to the query's
    position and that of the block's first token. Source: "SeerAttention-R" (arXiv 2506.08889).

    Args:
        heads: query heads.
        kv_heads: key and value heads.
        head_dim: width of a head.
        block_size: tokens of a block.
        hidden_size: width of the projections; ``head_dim`` if ``None``.
        key_pooling: ``K<kinds>`` with kinds out of ``max``, ``min``, ``avg``.
        query_pooling: ``"Qproj"`` sums projections of the heads of a group, ``"Qavgproj"`` projects their mean,
            ``"Qavg"`` takes the mean.
        qk_norm: normalise by the root mean square behind the projections.
        rotary: whether positions are turned in.

    Raises:
        ValueError: heads that the key and value heads do not divide, a block size below 1, unknown poolings, or means
            of the queries that are not as wide as the keys' projections.
    """

    def __init__(
        self, heads: int, kv_heads: int, head_dim: int, block_size: int = 64, hidden_size: int | None = None,
        key_pooling: str = "Kmaxminavg", query_pooling: str = "Qproj", qk_norm: bool = True, rotary: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        check_sizes(heads, kv_heads, block_size)
        width = head_dim if hidden_size is None else hidden_size
        check_query_pooling(query_pooling)
        if query_pooling == "Qavg" and width != head_dim:
            raise ValueError(f"'Qavg' leaves queries at the heads' width {head_dim}, so hidden_size cannot be {width}")
        self.block_size, self.rotary = block_size, rotary
        self.key_kinds = parse_kinds(key_pooling, "K")
        self.groups, self.joint = heads // kv_heads, query_pooling == "Qproj"
        self.kv_heads = kv_heads
        self.query = None
        if query_pooling != "Qavg":
            self.query = HeadLinear(heads if self.joint else kv_heads, head_dim, width)
        self.key = HeadLinear(kv_heads, len(self.key_kinds) * head_dim, width)
        self.query_norm = nn.RMSNorm(width, eps=1e-6) if qk_norm else None
        self.key_norm = nn.RMSNorm(width, eps=1e-6) if qk_norm else None
        for linear in (self.query, self.key):
            for head in linear.weight if linear is not None else ():
                nn.init.xavier_uniform_(head)

    def queries(
        self, query: Float[Tensor, "batch heads tokens head_dim"], rotary: Rotary | None
    ) -> Float[Tensor, "batch kv_heads tokens hidden_size"]:
        """One query a key and value head, from queries without rotary positions and where they stand."""
        query = query.float()
        if self.joint and self.query is not None:
            x = self.query(query).unflatten(1, (self.kv_heads, self.groups)).sum(dim=2)
        else:
            x = query.unflatten(1, (self.kv_heads, self.groups)).mean(dim=2)
            x = x if self.query is None else self.query(x)
        return self._finish(x, self.query_norm, rotary)

    def keys(
        self, key: Float[Tensor, "batch kv_heads tokens head_dim"], rotary: Rotary | None
    ) -> Float[Tensor, "batch kv_heads blocks hidden_size"]:
        """One vector a block of keys without rotary positions, and the positions ``(batch, blocks, width)`` that the
        blocks are given."""
        return self.compress(self.pool(key), rotary)

    def pool(
        self, key: Float[Tensor, "batch kv_heads tokens head_dim"]
    ) -> Float[Tensor, "batch kv_heads blocks key_width"]:
        """What the gate reads of keys without rotary positions. No parameter takes part."""
        return pool_kinds(key, self.block_size, self.key_kinds)

    def compress(
        self, pooled: Float[Tensor, "batch kv_heads blocks key_width"], rotary: Rotary | None
    ) -> Float[Tensor, "batch kv_heads blocks hidden_size"]:
        """One vector a block from its pooled keys and the positions ``(batch, blocks, width)`` that it is given."""
        return self._finish(self.key(pooled), self.key_norm, rotary)

    def _finish(self, x: Tensor, norm: nn.RMSNorm | None, rotary: Rotary | None) -> Tensor:
        if norm is not None:
            x = nn.functional.rms_norm(x, norm.normalized_shape, norm.weight.float(), norm.eps)
        return turn(x, rotary if self.rotary else None)


def check_query_pooling(kind: str) -> None:
    """Raise ``ValueError`` for an unknown way of making the queries of a group one."""
    if kind not in ("Qproj", "Qavgproj", "Qavg"):
        raise ValueError(f"query_pooling must be 'Qproj', 'Qavgproj' or 'Qavg', got {kind!r}")


def check_sizes(heads: int, kv_heads: int, block_size: int) -> None:
    """Raise ``ValueError`` for heads that do not share key and value heads evenly, or a block size below 1."""
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"{heads} query heads do not share {kv_heads} key and value heads evenly")
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
