"""Cross-attention of a few queries over the tokens, the shape of which most attentive poolings are settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cenote.ops.masked import masked_mean, zero_padding
from cenote.ops.query_attention import Read, fold_key_projection, own_channels, project_pooled, spread_heads
from cenote.pooling.base import Prepared, Query, QueryPooling
from cenote.pooling.blocks import check_heads


class CrossAttentionPooling(QueryPooling):
    """Multi-head cross-attention, pooled first and projected after.

    ``q = W_q N_q(s)``, ``k_n = W_k N_k(x_n)``, ``v_n = W_v N_v(x_n)``,
    ``y = W_o concat_h sum_n softmax_n(q_h^T k_nh / sqrt(head_dim)) v_nh``, where the source s is learned or the mean
    of the tokens, each N a layer norm or nothing and each W a linear map or nothing. Tokens are normalised without
    gain g and bias b: ``q_h^T W_k,h (g * x + b)`` is ``(g * W_k,h^T q_h)^T x`` up to a constant that cancels in the
    softmax, and ``sum_n a_n (g * x_n + b) = g * sum_n a_n x_n + b``. The key bias cancels too: where a published layer
    has one it is kept for its weights, without effect.

    Subclasses set the arguments; what some of them do besides goes into :meth:`source`, :meth:`score_bias`,
    :meth:`values` and :meth:`complete`.

    Args:
        dim: token width.
        num_heads: heads, contiguous blocks of channels.
        num_queries: learned queries, or ``None`` for one query made from the mean of the tokens.
        init: fills the learned queries, in place.
        project: which of query, key, value and output are projected, letters of ``"qkvo"``.
        bias: which of those projections have a bias.
        norms: which of query, key and value are normalised; letters in one string share one norm.
        eps: of the norms.
        norm_bias: whether the norms have a bias besides the gain.
        reduce: how several queries become one vector: the ``"first"``, their ``"mean"``, or side by side
            (``"concat"``).
        head_dim: width of a head, ``dim / num_heads`` unless given.
        shared_heads: one key head and one value head for all query heads (multi-query attention).
        own_key: the query's source is also a key and a value, beside the tokens.
        out_dim: width of the output projection.
    """

    queries: nn.Parameter | None

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_queries: int | None = 1,
        init: Callable[[Tensor], Any] = nn.init.zeros_,
        project: str = "qkvo",
        bias: str = "",
        norms: Sequence[str] = (),
        eps: float = 1e-5,
        norm_bias: bool = True,
        reduce: Literal["first", "mean", "concat"] = "concat",
        head_dim: int | None = None,
        shared_heads: bool = False,
        own_key: bool = False,
        out_dim: int | None = None,
    ) -> None:
        if head_dim is None:
            check_heads(dim, num_heads)
            head_dim = dim // num_heads
        if num_queries is not None and num_queries < 1:
            raise ValueError(f"the number of queries must be at least 1, got {num_queries}")
        width = dim if out_dim is None else out_dim
        super().__init__(dim, width * (num_queries or 1) if reduce == "concat" else width)
        self.num_heads, self.head_dim, self.reduce = num_heads, head_dim, reduce
        self.num_queries, self.shared_heads, self.own_key = num_queries or 1, shared_heads, own_key
        inner = num_heads * head_dim
        read = head_dim if shared_heads else inner
        self.query_projection = nn.Linear(dim, inner, bias="q" in bias) if "q" in project else None
        self.key_projection = nn.Linear(dim, read, bias="k" in bias) if "k" in project else None
        self.value_projection = nn.Linear(dim, read, bias="v" in bias) if "v" in project else None
        self.output_projection = nn.Linear(inner, width, bias="o" in bias) if "o" in project else None
        self.eps, self.norms = eps, nn.ModuleList(nn.LayerNorm(dim, eps=eps, bias=norm_bias) for _ in norms)
        self._norm_of = {letter: index for index, group in enumerate(norms) for letter in group}
        if num_queries is None:
            self.register_parameter("queries", None)
        else:
            self.queries = nn.Parameter(torch.empty(num_queries, dim))
            init(self.queries)

    def norm(self, letter: str) -> nn.LayerNorm | None:
        """The norm of the query (``"q"``), key (``"k"``) or value (``"v"``), or ``None``."""
        return self.norms[self._norm_of[letter]] if letter in self._norm_of else None  # type: ignore[return-value]

    def normalise(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """Tokens normalised without parameters."""
        return nn.functional.layer_norm(tokens, (self.dim,), eps=self.eps)

    def prepare(self, tokens: Tensor, mask: Tensor | None) -> Prepared:
        tokens = zero_padding(tokens, mask)
        normed = self.normalise(tokens, mask) if self._norm_of.keys() & {"k", "v"} else tokens
        keys, values = (normed if letter in self._norm_of else tokens for letter in "kv")
        return Prepared(keys, values, mask, masked_mean(tokens, mask) if self.queries is None else None)

    def source(self, prepared: Prepared) -> Tensor:
        """What the queries are made from, normalised: ``(queries, dim)`` or ``(batch, queries, dim)``."""
        norm, source = self.norm("q"), self.given(prepared)
        return source if norm is None else norm(source)

    def given(self, prepared: Prepared) -> Tensor:
        """The caller's queries, the learned ones or the mean, as they are."""
        given = prepared.query_tokens
        if given is None:
            return prepared.mean[:, None] if self.queries is None else self.queries  # type: ignore[index]
        if given.shape[-1] != self.dim:
            raise ValueError(f"query_tokens must have width {self.dim}, got shape {tuple(given.shape)}")
        if self.reduce == "concat" and given.shape[-2] != self.num_queries:
            raise ValueError(f"{type(self).__name__} takes {self.num_queries} query token(s), got {given.shape[-2]}")
        return given

    def query(self, prepared: Prepared) -> Query:
        source, norm = self.source(prepared), self.norm("k")
        heads = source if self.query_projection is None else self.query_projection(source)
        heads = heads.unflatten(-1, (self.num_heads, self.head_dim)) * self.head_dim**-0.5
        if self.key_projection is None:
            folded = spread_heads(heads)
        else:
            folded = fold_key_projection(heads, self.key_projection.weight)
        queries = folded if norm is None else folded * norm.weight
        bias, extra = self.score_bias(folded, prepared), None
        if self.own_key:
            extra = (folded * self._own(source, norm)).sum(dim=-1, keepdim=True)
        return Query(*(None if part is None else part.flatten(-3, -2) for part in (queries, bias, extra)))  # type: ignore[arg-type]

    def score_bias(self, folded: Tensor, prepared: Prepared) -> Tensor | None:
        """Added to the scores ``(..., queries, heads, tokens)``; ``folded`` are the queries that the keys meet after
        their norm.
        """
        return None

    def values(self, read: Read, prepared: Prepared) -> Tensor:
        """What each head read, after the values' norm and before their projection: ``(batch, queries, heads, dim)``."""
        pooled, norm = read.pooled.unflatten(-2, (-1, self.num_heads)), self.norm("v")
        if self.reduce == "first":
            pooled = pooled[:, :1]
        if norm is not None:
            pooled = pooled * norm.weight
            pooled = pooled if norm.bias is None else pooled + norm.bias
        if self.own_key:
            share = read.extra.unflatten(-2, (-1, self.num_heads))  # type: ignore[union-attr]
            own = self._own(self.source(prepared), norm)
            pooled = pooled + share.to(own.dtype) * own
        return pooled

    @staticmethod
    def _own(source: Tensor, norm: nn.LayerNorm | None) -> Tensor:
        """The source as a key and value, less the bias that :meth:`query` leaves out and :meth:`values` adds for
        every token.
        """
        own = source.unsqueeze(-2)
        return own if norm is None or norm.bias is None else own - norm.bias

    def finish(self, read: Read, prepared: Prepared) -> Tensor:
        values, projection = self.values(read, prepared), self.value_projection
        if projection is None:
            vectors = own_channels(values)
        else:
            vectors = project_pooled(values, projection.weight, projection.bias, self.shared_heads)
        if self.output_projection is not None:
            vectors = self.output_projection(vectors)
        vectors = self.complete(vectors, prepared)
        return vectors.mean(dim=-2) if self.reduce == "mean" else vectors.flatten(-2)

    def complete(self, vectors: Tensor, prepared: Prepared) -> Tensor:
        """What follows the attention, ``(batch, queries, width)`` to the same: residual and MLP of those that have
        them.
        """
        return vectors
