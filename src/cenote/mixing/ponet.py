"""PoNet: poolings of three reaches in place of attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from cenote.mixing.base import Mixer, MixerContext
from cenote.ops.masked import masked_mean, zero_padding
from cenote.ops.ponet import GlobalPool, fuse_pools, global_aggregation, local_pool, segment_pool
from cenote.ops.segments import check_segment_ids, equal_segments, segments_between

POOLINGS = ("global", "segment", "local")


class PoNetPools(NamedTuple):
    """The poolings of a sequence before they are fused, ``None`` for one that the mixer does not have.

    Attributes:
        overall: the global vector ``(batch, dim)`` and the weights ``(batch, heads, tokens)`` that made it.
        segment: maximum over each token's segment, ``(batch, tokens, dim)``.
        local: maximum over each token and its neighbours, ``(batch, tokens, dim)``.
    """

    overall: GlobalPool | None
    segment: Tensor | None
    local: Tensor | None


class PoNet(Mixer):
    """``P_n = (g + s_n) * O_n + l_n``: a global vector, a segment maximum and a local maximum, gated token by token.

    With linear maps Q, K, O, S, L of the tokens: ``g`` is, for each head, attention of the mean of Q over the keys K,
    which are the values too; ``s_n`` the maximum of S over the segment of token n; ``l_n`` the maximum of L over
    tokens n-1, n, n+1. Time and memory are linear in the number of tokens. Source: "PoNet: Pooling Network for
    Efficient Token Mixing in Long Sequences" (arXiv 2110.02442).

    The context may hold ``segment_ids`` (0 to tokens - 1, in any order) and ``special_mask``. Without segment ids each
    special token and each stretch between two is a segment; without special tokens either, the whole row is one. The
    leak guard leaves special tokens out of the local windows and gives them the global part alone, so that sentences
    do not see each other but through ``g``; without ``special_mask`` there is no special token and nothing to guard.

    Otherwise than in the official code, with the same numbers: Q enters as a mean, so the mean is projected, and keys
    are never formed (see :func:`cenote.ops.ponet.global_aggregation`), which leaves three of five maps of all tokens;
    padding is left out of every maximum, where the official code holds -10000; special tokens are told, not looked up
    as ids 101 and 102. A row without a real token is refused. There is no causal form.

    Args:
        dim: token width.
        num_heads: heads of the global pooling; ``dim`` must be divisible by it.
        leak_guard: see above; ``clsgsepg`` in official configurations.
        poolings: which of ``"global"``, ``"segment"``, ``"local"`` take part.
        output_map: a linear map behind the gate. The published layer has one outside of the mixer, next to the norm.

    Raises:
        ValueError: a width that the heads do not divide; unknown, repeated or no poolings; segment ids that are out of
            range.
    """

    name = "ponet"
    paper = "ponet"

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        leak_guard: bool = True,
        poolings: Sequence[str] = POOLINGS,
        output_map: bool = False,
    ) -> None:
        super().__init__(dim)
        if not isinstance(num_heads, int) or num_heads < 1 or dim % num_heads:
            raise ValueError(f"dim={dim} is not divisible into num_heads={num_heads} heads")
        if not poolings or isinstance(poolings, str) or sorted(set(poolings) & set(POOLINGS)) != sorted(poolings):
            raise ValueError(f"poolings must be one or more of {', '.join(POOLINGS)}, each once, got {poolings!r}")
        self.num_heads, self.leak_guard, self.poolings = num_heads, leak_guard, tuple(poolings)

        def linear(*users: str) -> nn.Linear | None:
            return nn.Linear(dim, dim) if set(users) & set(self.poolings) else None

        self.dense_q, self.dense_k = linear("global"), linear("global")
        self.dense_o = linear("global", "segment")
        self.dense_segment, self.dense_local = linear("segment"), linear("local")
        self.dense_output = nn.Linear(dim, dim) if output_map else None

    def check(self, tokens: Tensor, mask: Tensor | None, context: MixerContext) -> None:
        super().check(tokens, mask, context)
        if context.segment_ids is not None:
            check_segment_ids(type(self).__name__, context.segment_ids, tokens, mask)
        special = context.special_mask
        if special is not None and special.dtype != torch.bool:
            raise TypeError(f"{type(self).__name__} expects a boolean special_mask, got {special.dtype}")

    def segments(self, tokens: Tensor, mask: Tensor | None, context: MixerContext) -> Int[Tensor, "batch tokens"]:
        """The segment of each token, from the context or by default."""
        if context.segment_ids is not None:
            return context.segment_ids.long()
        special = context.special_mask
        if special is not None:
            return segments_between(special if mask is None else special & mask)
        return torch.zeros(tokens.shape[:2], dtype=torch.long, device=tokens.device)

    def pools(
        self,
        tokens: Float[Tensor, "batch tokens dim"],
        mask: Tensor | None = None,
        context: MixerContext | None = None,
    ) -> PoNetPools:
        """What :meth:`forward` fuses; rows of padding mean nothing. Arguments and errors as there."""
        context = MixerContext() if context is None else context
        self.check(tokens, mask, context)
        return self._pools(zero_padding(tokens, mask), mask, context)

    def _pools(self, tokens: Tensor, mask: Tensor | None, context: MixerContext) -> PoNetPools:
        overall, segment, local = None, None, None
        guarded = context.special_mask if self.leak_guard else None
        if self.dense_q is not None and self.dense_k is not None:
            query = self.dense_q(masked_mean(tokens, mask))
            overall = global_aggregation(
                query, tokens, self.num_heads, mask, self.dense_k.weight, self.dense_k.bias
            )  # fmt: skip
        if self.dense_segment is not None:
            ids = self.segments(tokens, mask, context)
            segment = segment_pool(self.dense_segment(tokens), ids, mask, guarded)
        if self.dense_local is not None:
            local = local_pool(self.dense_local(tokens), mask, guarded)
        return PoNetPools(overall, segment, local)

    def _mix(
        self, tokens: Tensor, mask: Tensor | None, context: MixerContext, return_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        return self.fuse(tokens, self._pools(tokens, mask, context)), None

    def fuse(self, tokens: Float[Tensor, "batch tokens dim"], pools: PoNetPools) -> Float[Tensor, "batch tokens dim"]:
        """Gate each token's share of the poolings; rows of padding mean nothing."""
        gate = None if self.dense_o is None else self.dense_o(tokens)
        overall = None if pools.overall is None else pools.overall.vector
        fused = fuse_pools(gate, overall, pools.segment, pools.local)
        return fused if self.dense_output is None else self.dense_output(fused)

    @classmethod
    def from_reference(cls, state_dict: dict[str, Tensor], **config: Any) -> PoNet:
        """From official keys ``dense_q``, ``dense_k``, ``dense_o``, ``dense_segment``, ``dense_local`` (weight and
        bias) and official settings ``hidden_size``, ``num_attention_heads``, ``clsgsepg``."""
        mixer = cls(config.pop("hidden_size"), config.pop("num_attention_heads"), config.pop("clsgsepg", True))
        if config:
            raise ValueError(f"unknown settings {', '.join(sorted(config))}")
        mixer.load_state_dict(state_dict)
        return mixer


class PoNetLRA(PoNet):
    """PoNet as in the Long Range Arena: equal stretches of a row as segments, no leak guard.

    A segment has ``length // segment_num + 1`` tokens. Published numbers of segments: ListOps 64, image 32, retrieval
    64, pathfinder 1 (one maximum over all), text 4096 (segments of one token, which pool nothing). What the context
    says of segments and special tokens is not read.

    Otherwise than in the official code ``length`` counts real tokens, so that padding changes nothing;
    ``count_padding`` gives the published behaviour.

    Args:
        dim: token width; 64 as published.
        num_heads: heads of the global pooling; 2 as published.
        segment_num: segments of a row at most.
        count_padding: let padding count into the length and into the place of a token.
        poolings, output_map: as for :class:`PoNet`.

    Raises:
        ValueError: as for :class:`PoNet`, and ``segment_num`` below 1.
    """

    name = "ponet_lra"

    def __init__(
        self,
        dim: int,
        num_heads: int = 2,
        segment_num: int = 32,
        count_padding: bool = False,
        poolings: Sequence[str] = POOLINGS,
        output_map: bool = False,
    ) -> None:
        super().__init__(dim, num_heads, False, poolings, output_map)
        if not isinstance(segment_num, int) or segment_num < 1:
            raise ValueError(f"segment_num must be an integer of at least 1, got {segment_num!r}")
        self.segment_num, self.count_padding = segment_num, count_padding

    def segments(self, tokens: Tensor, mask: Tensor | None, context: MixerContext) -> Int[Tensor, "batch tokens"]:
        counted = None if self.count_padding else mask
        return equal_segments(tokens.shape[1], self.segment_num, counted, len(tokens)).to(tokens.device)

    @classmethod
    def from_reference(cls, state_dict: dict[str, Tensor], **config: Any) -> PoNetLRA:
        """From keys as of :class:`PoNet` and official settings ``num_head``, ``head_dim``, ``segment_num``."""
        num_heads, head_dim = config.pop("num_head"), config.pop("head_dim")
        mixer = cls(num_heads * head_dim, num_heads, config.pop("segment_num"), count_padding=True)
        if config:
            raise ValueError(f"unknown settings {', '.join(sorted(config))}")
        mixer.load_state_dict(state_dict)
        return mixer
