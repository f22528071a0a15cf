"""The one interface that every pooling obeys, and the shape most attentive poolings share."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar, Literal, NamedTuple

from jaxtyping import Bool, Float
from torch import Tensor, nn

from cenote.ops.checks import check_tokens
from cenote.ops.masked import zero_padding
from cenote.ops.query_attention import Read, attend
from cenote.types import Modality


class Pooling(nn.Module):
    """Tokens in, one vector out.

    ``pool(tokens, mask)`` gives ``(batch, out_dim)``; ``pool(tokens, mask, return_weights=True)`` also gives the
    attention ``(batch, queries, tokens)`` of those that attend. A subclass implements :meth:`_pool`, which may assume
    checked input, and says what it is in the class attributes below. An item's vector never depends on the other
    items of its batch (outside batch-norm training) nor on padding.

    Attributes:
        layers: ``"last"`` takes ``(batch, tokens, dim)``, ``"all"`` takes ``(batch, layers, tokens, dim)``.
        permutation_invariant: whether the order of the tokens is irrelevant.
        attends: whether there are attention weights to return.
        needs_grid: whether the tokens must fill a grid of patches, so that sequences cannot be read.
        reads_embeddings: whether the layer axis starts with hidden state 0, what enters the first block, where the
            caller does not name the layers.
        modalities: what it was made for; the probe compares it on others only when it is named. ``None`` for all.
        query_parameters: names of parameters that act as learned queries. They need a larger learning rate than the
            rest under Adam-type optimisers, or attention stays uniform.
        no_weight_decay_parameters: names of parameters that decay would spoil.
        paper: slug of the specification, or ``None`` for folklore.
    """

    name: ClassVar[str]
    layers: Literal["last", "all"] = "last"
    permutation_invariant: ClassVar[bool] = True
    attends: ClassVar[bool] = False
    needs_grid: ClassVar[bool] = False
    reads_embeddings: ClassVar[bool] = False
    modalities: ClassVar[tuple[Modality, ...] | None] = None
    query_parameters: ClassVar[tuple[str, ...]] = ()
    no_weight_decay_parameters: ClassVar[tuple[str, ...]] = ()
    paper: ClassVar[str | None] = None

    def __init__(self, dim: int, out_dim: int | None = None) -> None:
        super().__init__()
        if not isinstance(dim, int) or dim < 1:
            raise ValueError(f"dim must be a positive integer, got {dim!r}")
        self.dim = dim
        self.out_dim = dim if out_dim is None else out_dim

    def forward(self, tokens: Tensor, mask: Tensor | None = None, return_weights: bool = False) -> Any:
        """Pool tokens to one vector an item.

        Args:
            tokens: ``(batch, tokens, dim)``, or ``(batch, layers, tokens, dim)`` where :attr:`layers` is ``"all"``.
            mask: ``(batch, tokens)`` boolean, ``True`` for a real token; ``None`` means all are real.
            return_weights: also return the attention weights.

        Raises:
            TypeError: integer tokens, or a mask that is not boolean.
            ValueError: wrong rank, width, mask shape, or a row without a real token; weights asked of a pooling that
                has none.
        """
        self.check(tokens, mask)
        if return_weights and not self.attends:
            raise ValueError(f"{type(self).__name__} does not attend, so it has no weights to return")
        vector, weights = self._pool(tokens, mask)
        return (vector, weights) if return_weights else vector

    def check(self, tokens: Tensor, mask: Tensor | None) -> None:
        """Raise if the input is not what this pooling takes; see :meth:`forward`."""
        check_tokens(type(self).__name__, tokens, mask, self.dim, layers=self.layers == "all")

    @abstractmethod
    def _pool(self, tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The arithmetic: ``(batch, out_dim)`` and the weights ``(batch, queries, tokens)`` or ``None``."""

    @classmethod
    def from_reference(cls, state_dict: dict[str, Tensor], **config: Any) -> Pooling:
        """Build from weights in the official code's key names, with the official code's behaviour."""
        raise NotImplementedError(f"{cls.__name__} has no official checkpoint format")


class Prepared(NamedTuple):
    """Tokens made ready for :class:`QueryPooling`: nothing here depends on a trainable parameter.

    Attributes:
        keys: ``(batch, tokens, dim)``.
        values: ``(batch, tokens, dim)``.
        mask: ``(batch, tokens)`` or ``None``.
        mean: what input-dependent queries start from, ``(batch, dim)``, or ``None``.
        query_tokens: queries given by the caller in place of the pooling's own, ``(batch, queries, dim)``, or ``None``.
    """

    keys: Float[Tensor, "batch tokens dim"]
    values: Float[Tensor, "batch tokens dim"]
    mask: Bool[Tensor, "batch tokens"] | None
    mean: Float[Tensor, "batch dim"] | None = None
    query_tokens: Float[Tensor, "batch queries dim"] | None = None


class Query(NamedTuple):
    """Effective queries: scale, head split, key projection and norm gain already folded in.

    Attributes:
        queries: ``(queries, dim)`` or ``(batch, queries, dim)``, one for each head of each query, heads innermost.
        bias: added to the scores, ``(queries, tokens)`` or ``(batch, queries, tokens)``.
        extra: scores of keys beyond the tokens, ``(queries, extras)`` or ``(batch, queries, extras)``.
    """

    queries: Tensor
    bias: Tensor | None = None
    extra: Tensor | None = None


class QueryPooling(Pooling):
    """A pooling whose parameters touch the tokens only through a few queries.

    Three steps, so that tokens are read once whatever the number of queries (and, in the probe, of models):
    :meth:`prepare` (no parameters) normalises tokens, :meth:`query` folds everything before the softmax into effective
    queries, :meth:`finish` projects what they read. The attention between them is
    :func:`cenote.ops.query_attention.attend`. Several models that share :meth:`prepare` can be evaluated in one
    attention over their concatenated queries.
    """

    attends = True

    @property
    def single_read(self) -> bool:
        """Whether the three steps describe this configuration; not where tokens are read twice or values are
        learned."""
        return True

    def forward(
        self,
        tokens: Tensor,
        mask: Tensor | None = None,
        return_weights: bool = False,
        query_tokens: Tensor | None = None,
    ) -> Any:
        """As :meth:`Pooling.forward`; ``query_tokens`` ``(batch, queries, dim)`` take the place of the pooling's own
        query source."""
        self.check(tokens, mask)
        if query_tokens is not None and (query_tokens.ndim != 3 or query_tokens.shape[0] != tokens.shape[0]):
            raise ValueError(f"query_tokens must be (batch, queries, dim), got shape {tuple(query_tokens.shape)}")
        vector, weights = self._pool(tokens, mask, query_tokens)
        return (vector, weights) if return_weights else vector

    def prepare(self, tokens: Tensor, mask: Tensor | None) -> Prepared:
        """Keys, values and mean of the tokens, free of trainable parameters. Plain tokens unless overridden."""
        tokens = zero_padding(tokens, mask)
        return Prepared(tokens, tokens, mask)

    @abstractmethod
    def query(self, prepared: Prepared) -> Query:
        """The effective queries."""

    @abstractmethod
    def finish(self, read: Read, prepared: Prepared) -> Tensor:
        """From what the queries read to the vector ``(batch, out_dim)``."""

    def _pool(
        self, tokens: Tensor, mask: Tensor | None, query_tokens: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        prepared = self.prepare(tokens, mask)._replace(query_tokens=query_tokens)
        queries, bias, extra = self.query(prepared)
        read = attend(queries, prepared.keys, prepared.values, mask, bias, extra)
        return self.finish(read, prepared), read.weights
