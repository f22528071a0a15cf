"""The skeleton of a transformer with any token mixers: a block, and a stack of blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cenote.mixing.base import Mixer, MixerContext, RecurrentMixer, State
from cenote.mixing.feed_forward import FeedForward, FeedForwardKind
from cenote.mixing.norms import NormKind, make_norm
from cenote.mixing.registry import create_mixer, expand_pattern
from cenote.ops.drop_path import drop_path

Layout = Literal["tokens", "map"]


class MetaFormerBlock(nn.Module):
    """``x = x + s1 * M(N1(x)); x = x + s2 * F(N2(x))`` with a mixer M, norms N and a feed-forward network F.

    Args:
        mixer: any mixer; the block has its width.
        layout: ``"tokens"`` for ``(batch, tokens, dim)``, ``"map"`` for ``(batch, dim, height, width)``.
        norm: see :func:`cenote.mixing.norms.make_norm`.
        norm_eps: added to the variance.
        feed_forward: see :class:`cenote.mixing.feed_forward.FeedForward`; ``"none"`` leaves the second half out.
        mlp_ratio: inner width of the feed-forward network over ``dim``.
        layer_scale: start of the learned factors s1 and s2, one a channel; ``None`` fixes them at 1.
        drop_path: chance that an item skips a half in training.
        residual: whether each half is added to its input; without, it takes its place.

    Raises:
        ValueError: a drop rate outside [0, 1).
    """

    def __init__(
        self,
        mixer: Mixer,
        *,
        layout: Layout = "tokens",
        norm: NormKind = "layer",
        norm_eps: float = 1e-5,
        feed_forward: FeedForwardKind = "gelu",
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        residual: bool = True,
    ) -> None:
        super().__init__()
        if not 0 <= drop_path < 1:
            raise ValueError(f"drop_path must lie in [0, 1), got {drop_path}")
        dim = mixer.dim
        self.layout, self.residual, self.drop_rate = layout, residual, drop_path
        self.norm1 = make_norm(norm, dim, layout, norm_eps)
        self.token_mixer = mixer
        self.norm2 = nn.Identity() if feed_forward == "none" else make_norm(norm, dim, layout, norm_eps)
        self.mlp = (
            None
            if feed_forward == "none"
            else FeedForward(dim, int(dim * mlp_ratio), feed_forward, layout, dropout=dropout)
        )
        scales = [None if layer_scale is None else nn.Parameter(torch.full((dim,), layer_scale)) for _ in range(2)]
        self.layer_scale_1, self.layer_scale_2 = scales

    def forward(self, x: Tensor, mask: Tensor | None = None, context: MixerContext | None = None) -> Tensor:
        """The same shape, mixed."""
        normed = self.norm1(x)
        mixed = self._run_map(normed, context) if self.layout == "map" else self._run_tokens(normed, mask, context)
        return self._rest(x, mixed)

    def chunk(
        self, x: Tensor, state: State | None = None, mask: Tensor | None = None, context: MixerContext | None = None
    ) -> tuple[Tensor, State]:
        """A stretch of tokens and the mixer's state before it; gives the state after it."""
        if not isinstance(self.token_mixer, RecurrentMixer):
            raise ValueError(f"{type(self.token_mixer).__name__} has no recurrent form, so the stack has no chunks")
        mixed, state = self.token_mixer.chunk(self.norm1(x), state, mask, self._normed(context))
        return self._rest(x, mixed), state

    def _run_map(self, normed: Tensor, context: MixerContext | None) -> Tensor:
        return self.token_mixer.mix_map(normed, context)

    def _run_tokens(self, normed: Tensor, mask: Tensor | None, context: MixerContext | None) -> Tensor:
        return self.token_mixer(normed, mask, self._normed(context))

    def _normed(self, context: MixerContext | None) -> MixerContext | None:
        """A second stream is read behind the same norm as the first."""
        if context is None or context.stream is None:
            return context
        return context.replace(stream=self.norm1(context.stream))

    def _rest(self, x: Tensor, mixed: Tensor) -> Tensor:
        x = self._add(x, mixed, self.layer_scale_1)
        return x if self.mlp is None else self._add(x, self.mlp(self.norm2(x)), self.layer_scale_2)

    def _add(self, x: Tensor, change: Tensor, scale: Tensor | None) -> Tensor:
        change = drop_path(change, self.drop_rate, self.training)
        if scale is not None:
            scale = scale[:, None, None] if self.layout == "map" else scale
            return torch.addcmul(x, change, scale) if self.residual else change * scale
        return x + change if self.residual else change


class MetaFormer(nn.Module):
    """A stack of :class:`MetaFormerBlock` of one width: tokens in, tokens out.

    Where a mixer asks for ``embeddings`` the stack gives what entered it. A context with a ``stream`` has that stream
    run through the same blocks by itself, one block behind the other, so that every block sees both at its depth.

    Args:
        dim: token width.
        depth: number of blocks.
        mixers: a pattern for :func:`cenote.mixing.expand_pattern`: ``"delta_rule*2, softmax_attention"``.
        causal: ask every mixer for its causal form and refuse those that have none.
        options: options for the mixers that take them, such as ``{"num_heads": 4}``.
        norm: of blocks and of the output.
        final_norm: norm of the output.
        drop_path: rate of the last block, growing from 0 at the first.
        **block: further settings of the blocks.

    Raises:
        ValueError: a mixer that is not causal in a causal stack.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        mixers: str | Sequence[str] = "softmax_attention",
        *,
        causal: bool = False,
        options: Mapping[str, Any] | None = None,
        norm: NormKind = "layer",
        final_norm: bool = True,
        drop_path: float = 0.0,
        **block: Any,
    ) -> None:
        super().__init__()
        self.dim, self.causal, self.mixers = dim, causal, expand_pattern(mixers, depth)
        offered = {"causal": causal, **(options or {})}
        made = [create_mixer(spec, dim=dim, defaults=offered) for spec in self.mixers]
        wrong = sorted({type(mixer).__name__ for mixer in made if causal and not mixer.causal})
        if wrong:
            raise ValueError(f"{', '.join(wrong)} see(s) later tokens and cannot stand in a causal stack")
        self.blocks = nn.ModuleList(
            MetaFormerBlock(mixer, norm=norm, drop_path=drop_path * layer / max(depth - 1, 1), **block)
            for layer, mixer in enumerate(made)
        )
        self.norm = make_norm(norm, dim, "tokens") if final_norm else nn.Identity()

    def forward(
        self,
        tokens: Float[Tensor, "batch tokens dim"],
        mask: Tensor | None = None,
        context: MixerContext | None = None,
    ) -> Float[Tensor, "batch tokens dim"]:
        """The tokens behind the last block and the final norm."""
        context = self._begin(tokens, context)
        beside = self._beside(context)
        for block in self.blocks:
            tokens = block(tokens, mask, context.replace(stream=None if beside is None else beside.stream))
            beside = self._advance(block, beside)
        return self.norm(tokens)

    def chunk(
        self,
        tokens: Float[Tensor, "batch tokens dim"],
        states: Sequence[State] | None = None,
        mask: Tensor | None = None,
        context: MixerContext | None = None,
    ) -> tuple[Float[Tensor, "batch tokens dim"], tuple[State, ...]]:
        """A stretch of tokens and the states before it, one a block; gives the states after it."""
        context = self._begin(tokens, context)
        after: list[State] = []
        beside = self._beside(context)
        for block, state in zip(self.blocks, states or [None] * len(self.blocks), strict=True):
            assert isinstance(block, MetaFormerBlock)
            here = context.replace(stream=None if beside is None else beside.stream)
            tokens, state = block.chunk(tokens, state, mask, here)
            beside = self._advance(block, beside)
            after.append(state)
        return self.norm(tokens), tuple(after)

    def step(
        self,
        token: Float[Tensor, "batch dim"],
        states: Sequence[State] | None = None,
        context: MixerContext | None = None,
    ) -> tuple[Float[Tensor, "batch dim"], tuple[State, ...]]:
        """One more token."""
        mixed, after = self.chunk(token[:, None], states, None, context)
        return mixed[:, 0], after

    @staticmethod
    def _beside(context: MixerContext) -> MixerContext | None:
        """What the stream itself is given on its way: it lends to itself, and its start are its embeddings."""
        stream = context.stream
        return None if stream is None else MixerContext(embeddings=stream, stream=stream)

    @staticmethod
    def _advance(block: nn.Module, beside: MixerContext | None) -> MixerContext | None:
        """The stream behind one more block."""
        if beside is None:
            return None
        return beside.replace(stream=block(beside.stream, None, beside))

    @staticmethod
    def _begin(tokens: Tensor, context: MixerContext | None) -> MixerContext:
        context = MixerContext() if context is None else context
        return context if context.embeddings is not None else context.replace(embeddings=tokens)
