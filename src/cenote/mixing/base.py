"""The interface that every token mixer obeys, and what a mixer may be given beyond tokens and mask."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cenote.ops.checks import check_tokens
from cenote.ops.masked import zero_padding
from cenote.ops.packing import unpack
from cenote.ops.token_grid import from_map, locate, to_map
from cenote.types import Grid

Need = Literal["grid", "segment_ids", "special_mask", "embeddings", "stream"]
State = Any
"""What a recurrent mixer carries from one call to the next: a tuple of tensors of the mixer's own making."""


@dataclass(frozen=True)
class MixerContext:
    """What a mixer may need beyond tokens and mask; each mixer names its own part in :attr:`Mixer.needs`.

    Attributes:
        grid: rows and columns of the patches that follow the prefix tokens.
        prefix: number of non-patch tokens in front (class token, registers).
        positions: number of each token in its sequence, ``(batch, tokens)``; ``None`` for 0, 1, 2, ...
        segment_ids: which segment (sentence) each token belongs to, ``(batch, tokens)``.
        special_mask: ``True`` at class and separator tokens, ``(batch, tokens)``.
        embeddings: what entered the first block, ``(batch, tokens, dim)``.
        stream: a second sequence at this depth, ``(batch or 1, stream_tokens, dim)``, which runs through the same
            layers by itself and lends its queries and keys.
    """

    grid: Grid | None = None
    prefix: int = 0
    positions: Int[Tensor, "batch tokens"] | None = None
    segment_ids: Int[Tensor, "batch tokens"] | None = None
    special_mask: Bool[Tensor, "batch tokens"] | None = None
    embeddings: Float[Tensor, "batch tokens dim"] | None = None
    stream: Float[Tensor, "streams stream_tokens dim"] | None = None

    def replace(self, **changes: Any) -> MixerContext:
        """The same context with some fields changed."""
        return replace(self, **changes)


class Mixer(nn.Module):
    """Tokens in, as many tokens out, each having seen others.

    ``mix(tokens, mask, context)`` gives ``(batch, tokens, dim)``, without residual or norm: those belong to the
    block around it (:class:`cenote.mixing.MetaFormerBlock`). A subclass implements :meth:`_mix`, which may assume
    checked input, and says what it is in the class attributes below. Real tokens never depend on padding or on the
    other items of the batch; padding comes out as 0.

    Attributes:
        needs: fields of :class:`MixerContext` without which it cannot run.
        projections: whether it has query, key and value projections of its own, or works on the tokens as they are.
        causal: whether a token sees only itself and earlier ones.
        permutation_equivariant: whether permuted tokens give the same outputs permuted.
        attends: whether there are attention maps ``(batch, heads, tokens, tokens)`` to return.
        recurrent: whether it is a :class:`RecurrentMixer`.
        paper: slug of the specification, or ``None`` for folklore.
    """

    name: ClassVar[str]
    needs: ClassVar[frozenset[Need]] = frozenset()
    projections: ClassVar[Literal["own", "none"]] = "own"
    causal: bool = False
    permutation_equivariant: bool = False
    attends: bool = False
    recurrent: ClassVar[bool] = False
    paper: ClassVar[str | None] = None

    def __init__(self, dim: int) -> None:
        super().__init__()
        if not isinstance(dim, int) or dim < 1:
            raise ValueError(f"dim must be a positive integer, got {dim!r}")
        self.dim = dim

    def forward(
        self,
        tokens: Tensor,
        mask: Tensor | None = None,
        context: MixerContext | None = None,
        return_weights: bool = False,
    ) -> Any:
        """Mix the tokens of each item.

        Args:
            tokens: ``(batch, tokens, dim)``.
            mask: ``(batch, tokens)`` boolean, ``True`` for a real token; ``None`` means all are real.
            context: what :attr:`needs` names; may hold more.
            return_weights: also return the attention maps ``(batch, heads, queries, keys)``.

        Raises:
            TypeError: integer tokens, or a mask that is not boolean.
            ValueError: wrong rank, width, mask shape, a row without a real token, a missing part of the context;
                weights asked of a mixer that has none.
        """
        context = MixerContext() if context is None else context
        self.check(tokens, mask, context)
        if return_weights and not self.attends:
            raise ValueError(f"{type(self).__name__} has no attention maps to return")
        mixed, weights = self._mix(zero_padding(tokens, mask), mask, context, return_weights)
        mixed = zero_padding(mixed, mask)
        return (mixed, weights) if return_weights else mixed

    def check(self, tokens: Tensor, mask: Tensor | None, context: MixerContext) -> None:
        """Raise if the input is not what this mixer takes; see :meth:`forward`."""
        kind = type(self).__name__
        check_tokens(kind, tokens, mask, self.dim)
        missing = sorted(need for need in self.needs if getattr(context, need) is None)
        if missing:
            raise ValueError(f"{kind} needs {', '.join(missing)}: pass MixerContext({missing[0]}=...)")
        for field in ("segment_ids", "special_mask", "positions"):
            value = getattr(context, field)
            if value is not None and tuple(value.shape) != tuple(tokens.shape[:2]):
                raise ValueError(f"{kind} expects {field} of shape {tuple(tokens.shape[:2])}, got {tuple(value.shape)}")

    @abstractmethod
    def _mix(
        self, tokens: Tensor, mask: Tensor | None, context: MixerContext, return_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The arithmetic: ``(batch, tokens, dim)`` (padding may hold anything) and the maps, where asked for."""

    def mix_map(
        self, x: Float[Tensor, "batch dim height width"], context: MixerContext | None = None
    ) -> Float[Tensor, "batch dim height width"]:
        """Mix the cells of a feature map, taken as tokens row by row."""
        grid = Grid(*x.shape[2:])
        context = (context or MixerContext()).replace(grid=grid, prefix=0)
        return self(x.flatten(2).transpose(1, 2), None, context).transpose(1, 2).unflatten(2, tuple(grid))

    @classmethod
    def from_reference(cls, state_dict: dict[str, Tensor], **config: Any) -> Mixer:
        """Build from weights in the official code's key names, with the official code's behaviour."""
        raise NotImplementedError(f"{cls.__name__} has no official checkpoint format")


class MapMixer(Mixer):
    """A mixer of feature maps: a subclass implements :meth:`_mix_map`. Tokens are laid on the grid and taken back.

    Prefix tokens have no cell: they neither mix nor are seen, and come out as 0. Where the number of tokens is that
    of the cells (and the prefix), a masked token is an empty cell; where there are more, the real ones fill the grid.
    """

    needs = frozenset({"grid"})
    projections: ClassVar[Literal["own", "none"]] = "none"

    def _mix(
        self, tokens: Tensor, mask: Tensor | None, context: MixerContext, return_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        prefix, patches = context.prefix, tokens[:, context.prefix :]
        patch_mask = None if mask is None else mask[:, prefix:]
        cells = locate(patches.shape[1], patch_mask, context.grid)
        keep = None
        if patch_mask is not None and cells.cell is None:
            keep = patch_mask.unflatten(1, (cells.height, cells.width))
        mixed = from_map(self._mix_map(to_map(patches, cells, patch_mask), keep), cells)
        return torch.cat([torch.zeros_like(tokens[:, :prefix]), mixed], dim=1), None

    @abstractmethod
    def _mix_map(
        self, x: Float[Tensor, "batch dim height width"], keep: Bool[Tensor, "batch height width"] | None
    ) -> Tensor:
        """The arithmetic on a map whose cells outside ``keep`` hold 0 and must not be seen."""

    def mix_map(
        self, x: Float[Tensor, "batch dim height width"], context: MixerContext | None = None
    ) -> Float[Tensor, "batch dim height width"]:
        """Mix the cells of a feature map."""
        if x.ndim != 4 or x.shape[1] != self.dim:
            raise ValueError(
                f"{type(self).__name__} was built for maps (batch, {self.dim}, height, width), got {tuple(x.shape)}"
            )
        return self._mix_map(x, None)


class RecurrentMixer(Mixer):
    """A causal mixer with three calls that agree: the whole sequence, a stretch of it, one token.

    - ``mix(tokens, mask, context)`` or :meth:`parallel`: all at once, from an empty past.
    - :meth:`chunk`: a stretch of tokens and the state before it; gives the outputs and the state after it.
    - :meth:`step`: one token and the state before it.

    Cutting a sequence anywhere and handing the state on gives the same outputs. Padding leaves the state as it was,
    whichever side it stands on. A state is a tuple of tensors with the batch in front; sums over the past are float32
    or better, kept tokens (keys and values of attention) of the tokens' own type.
    """

    causal = True
    recurrent = True

    def parallel(self, tokens: Tensor, mask: Tensor | None = None, context: MixerContext | None = None) -> Tensor:
        """The whole sequence at once, ``(batch, tokens, dim)``."""
        return self(tokens, mask, context)

    def packed(self, tokens: Float[Tensor, "total dim"], cu_seqlens: Int[Tensor, "ends"]) -> Float[Tensor, "total dim"]:
        """Whole sequences that stand end to end, none of which sees another.

        Args:
            tokens: of all sequences.
            cu_seqlens: where each sequence begins, and after the last its end, as in flash-linear-attention.

        Raises:
            ValueError: boundaries that do not grow from 0 to the number of tokens.
        """
        padded, mask = unpack(tokens, cu_seqlens)
        return self(padded, mask)[mask]

    def chunk(
        self,
        tokens: Tensor,
        state: State | None = None,
        mask: Tensor | None = None,
        context: MixerContext | None = None,
    ) -> tuple[Tensor, State]:
        """Outputs ``(batch, tokens, dim)`` of a stretch of tokens and the state after it; ``None`` is an empty past."""
        context = MixerContext() if context is None else context
        self.check(tokens, None, context)  # a stretch may be all padding
        if mask is not None and (mask.dtype != torch.bool or tuple(mask.shape) != tuple(tokens.shape[:2])):
            raise ValueError(
                f"{type(self).__name__} expects a boolean mask of shape {tuple(tokens.shape[:2])}, "
                f"got {mask.dtype} {tuple(mask.shape)}"
            )
        state = self.initial_state(tokens) if state is None else state
        mixed, state = self._chunk(zero_padding(tokens, mask), state, mask, context)
        return zero_padding(mixed, mask), state

    def step(
        self, token: Float[Tensor, "batch dim"], state: State | None = None, context: MixerContext | None = None
    ) -> tuple[Float[Tensor, "batch dim"], State]:
        """Output of one more token and the state after it; a chunk of one unless there is a shorter way."""
        mixed, state = self.chunk(token[:, None], state, None, context)
        return mixed[:, 0], state

    @abstractmethod
    def initial_state(self, tokens: Float[Tensor, "batch tokens dim"]) -> State:
        """The state of an empty past, for the batch and device of these tokens."""

    @abstractmethod
    def _chunk(self, tokens: Tensor, state: State, mask: Tensor | None, context: MixerContext) -> tuple[Tensor, State]:
        """The arithmetic of :meth:`chunk`."""
