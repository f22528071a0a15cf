"""Attention whose map comes from a second sequence and never from the tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cenote.mixing.base import MixerContext, RecurrentMixer, State
from cenote.ops.causal_attention import all_real, attend, visible
from cenote.ops.heads import heads_of, merge_heads, num_heads_of
from cenote.ops.rotary import real_positions, rotate


class FixedAttention(RecurrentMixer):
    """``softmax(Q K^T / sqrt(head_dim)) V`` with ``Q = W_q s, K = W_k s`` from a stream s and ``V = W_v x``.

    The i-th real token takes the map's i-th row, whatever it is. *RndEmbQK* of "Deconstructing Attention" (arXiv
    2510.11602) where the stream starts from fixed random vectors, *FixedSeqQK* where it starts from the embeddings of a
    fixed text; :class:`cenote.mixing.MetaFormer` runs the stream beside the tokens and gives every block its depth. On
    the stream itself (which lends to itself) this is ordinary self-attention.

    A token's row is its number among the real tokens of its item, or ``context.positions``, so padding on either side
    changes nothing. A stream of one row is shared by the batch and its map formed once, where nothing is padded.

    Args:
        dim: token width.
        num_heads: heads; ``dim`` must be divisible by it. 1 for each ``head_dim`` channels if that is given instead.
        head_dim: width of a head in place of ``num_heads``.
        causal: a token attends to itself and earlier ones only. Needed for chunks, whose state is the values; each
            chunk is given the whole stream.
        qkv_bias: bias of the query, key and value maps.
        proj_bias: bias of the output map.
        rope_theta: base of rotary positions of the stream; ``None`` for none.

    Raises:
        ValueError: a width that the heads do not divide; a stream of another width, with fewer rows than there are
            tokens or than a position asks for, or of a batch that is neither 1 nor the tokens'; a chunk without
            ``causal``.
    """

    name = "fixed_attention"
    needs = frozenset({"stream"})
    attends = True
    paper = "deconstructing-attention"

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        head_dim: int | None = None,
        causal: bool = False,
        qkv_bias: bool = False,
        proj_bias: bool = True,
        rope_theta: float | None = None,
    ) -> None:
        super().__init__(dim)
        self.num_heads, self.causal, self.rope_theta = num_heads_of(dim, num_heads, head_dim), causal, rope_theta
        self.qk = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.value = nn.Linear(dim, dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim, bias=proj_bias)

    def check(self, tokens: Tensor, mask: Tensor | None, context: MixerContext) -> None:
        super().check(tokens, mask, context)
        stream = context.stream
        assert stream is not None
        if stream.ndim != 3 or stream.shape[0] not in (1, tokens.shape[0]) or stream.shape[-1] != self.dim:
            raise ValueError(
                f"{type(self).__name__} expects a stream (1 or {tokens.shape[0]}, stream_tokens, {self.dim}), "
                f"got {tuple(stream.shape)}"
            )
        rows = context.positions
        if (
            rows is not None
            and not torch.compiler.is_compiling()
            and bool(((rows < 0) | (rows >= len(stream[0]))).any())
        ):
            raise ValueError(
                f"the stream has {stream.shape[1]} rows, but positions go from {int(rows.min())} to {int(rows.max())}"
            )

    def _query_key(self, stream: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        if tokens > stream.shape[1]:
            raise ValueError(f"the stream has {stream.shape[1]} rows, too few for {tokens} tokens")
        query, key = (heads_of(x, self.num_heads) for x in self.qk(stream[:, :tokens]).chunk(2, dim=-1))
        if self.rope_theta is None:
            return query, key
        positions = torch.arange(tokens, device=stream.device)[None]
        return rotate(query, positions, self.rope_theta), rotate(key, positions, self.rope_theta)

    def _mix(
        self, tokens: Tensor, mask: Tensor | None, context: MixerContext, return_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        assert context.stream is not None
        count, rows = tokens.shape[1], context.positions
        if rows is None and mask is not None:
            rows = real_positions(mask)
        query, key = self._query_key(context.stream, count if context.positions is None else context.stream.shape[1])
        if rows is not None:
            query, key = _take(query, rows), _take(key, rows)
        seen = visible(count, mask, count, self.causal, tokens.device)
        mixed, weights = attend(query, key, heads_of(self.value(tokens), self.num_heads), seen, return_weights)
        if weights is not None:
            weights = weights.expand(len(tokens), -1, -1, -1)
        return self.proj(merge_heads(mixed)), weights

    def initial_state(self, tokens: Tensor) -> State:
        past = tokens.new_zeros(tokens.shape[0], self.num_heads, 0, self.dim // self.num_heads)
        return past, tokens.new_zeros(tokens.shape[0], 0, dtype=torch.bool), tokens.new_zeros(tokens.shape[0], 0).long()

    def _chunk(self, tokens: Tensor, state: State, mask: Tensor | None, context: MixerContext) -> tuple[Tensor, State]:
        if not self.causal:
            raise ValueError("attention that sees later tokens has no chunks: build it with causal=True")
        assert context.stream is not None
        values, real, rows = state
        fresh = all_real(tokens, mask)
        number = real_positions(fresh, real.sum(dim=1))
        values = torch.cat([values, heads_of(self.value(tokens), self.num_heads)], 2)
        real = torch.cat([real, fresh], 1)
        rows = torch.cat([rows, number if context.positions is None else context.positions], 1)
        every = context.stream.shape[1] if context.positions is not None else values.shape[2]
        query, key = self._query_key(context.stream, every)
        seen = visible(tokens.shape[1], real, values.shape[2], True, tokens.device)
        query, key = _take(query, rows[:, -tokens.shape[1] :]), _take(key, rows)
        mixed, _ = attend(query, key, values.to(query.dtype), seen)
        return self.proj(merge_heads(mixed)), (values, real, rows)


def _take(x: Tensor, rows: Tensor) -> Tensor:
    """Rows of ``(1 or batch, heads, stream_tokens, head_dim)``, chosen for each item."""
    x = x.expand(rows.shape[0], -1, -1, -1)
    return x.gather(2, rows[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
