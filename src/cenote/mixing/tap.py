"""Token-aware average pooling: what attention reads is a mixture of averages of each token's surroundings."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from cenote.mixing.base import Mixer, MixerContext
from cenote.mixing.metaformer import MetaFormerBlock
from cenote.mixing.registry import create_mixer
from cenote.ops.dilated_average import dilated_average
from cenote.ops.masked import masked_batch_norm, widen, zero_padding
from cenote.ops.token_grid import from_map, locate, to_map


class TokenAwarePooling(nn.Module):
    """``z = sum_i p_i f_i``: each token becomes a mixture of averages around it, mixed as the token itself asks.

    ``f_0`` is the token, ``f_i`` the mean of the 3 x 3 cells at dilation i (:func:`cenote.ops.dilated_average`), and
    ``p = softmax(conv3x3(BatchNorm(conv3x3(x))) / temperature)`` over the K scales, without an activation between. It
    belongs in front of an attention whose residual adds to what was there before the pooling. With K = 1 it changes
    nothing. Paper: "Robustifying Token Attention for Vision Transformers" (arXiv 2303.11126). Keys are those of the
    official ``dilation_predictor`` (``proj.{0,1,2}``).

    Unlike the official code the grid is given, may have any sides, and prefix tokens (class token, registers) stay as
    they are instead of breaking it. A masked token is an empty cell: nothing reads it, neither averages nor predictor.
    The batch norm makes items of a batch depend on each other in training (use ``nn.SyncBatchNorm`` for few items a
    device), never in eval.

    Args:
        dim: token width C.
        num_scales: K, dilations 0 .. K - 1. Adds ``9 C K + 9 K^2 + 2 K`` parameters (and 2 K statistics).
        temperature: divides the logits of the mixture.
        count_include_pad: divide border averages by 9 as published weights expect, which lets them fall towards 0;
            otherwise by the cells that there are.

    Raises:
        ValueError: ``num_scales`` below 1, a temperature that is not positive.
    """

    def __init__(self, dim: int, num_scales: int = 4, temperature: float = 1.0, count_include_pad: bool = True) -> None:
        super().__init__()
        if num_scales < 1 or not temperature > 0:
            raise ValueError(
                f"expected num_scales of at least 1 and a positive temperature, got {num_scales} and {temperature}"
            )
        self.dim, self.num_scales, self.temperature = dim, num_scales, temperature
        self.count_include_pad = count_include_pad
        self.proj = nn.Sequential(
            nn.Conv2d(dim, num_scales, 3, padding=1, bias=False),
            nn.BatchNorm2d(num_scales),
            nn.Conv2d(num_scales, num_scales, 3, padding=1, bias=False),
        )

    def forward(
        self,
        tokens: Float[Tensor, "batch tokens dim"],
        grid: tuple[int, int],
        mask: Bool[Tensor, "batch tokens"] | None = None,
        prefix: int = 0,
    ) -> Float[Tensor, "batch tokens dim"]:
        """The tokens pooled; the ``prefix`` in front as it was, padding 0.

        Raises:
            ValueError: tokens that do not fill the grid.
        """
        patches = zero_padding(tokens[:, prefix:], None if mask is None else mask[:, prefix:])
        patch_mask = None if mask is None else mask[:, prefix:]
        cells = locate(patches.shape[1], patch_mask, grid)
        keep = None
        if patch_mask is not None and cells.cell is None:
            keep = patch_mask.unflatten(1, (cells.height, cells.width))
        pooled = from_map(self.pool_map(to_map(patches, cells, patch_mask), keep), cells)
        return torch.cat([zero_padding(tokens[:, :prefix], None if mask is None else mask[:, :prefix]), pooled], dim=1)

    def pool_map(
        self, x: Float[Tensor, "batch dim height width"], keep: Bool[Tensor, "batch height width"] | None = None
    ) -> Float[Tensor, "batch dim height width"]:
        """A feature map pooled; cells outside ``keep`` are not there and come out 0."""
        self._warn_of_small(x.shape[2], x.shape[3])
        if keep is not None:
            x = x.masked_fill(~keep[:, None], 0.0)
        shares = self.scale_probs(x, keep).to(x.dtype)
        pooled = x * shares[:, None, ..., 0]
        for dilation in range(1, self.num_scales):
            average = dilated_average(x, dilation, count_include_pad=self.count_include_pad, keep=keep)
            pooled = torch.addcmul(pooled, average, shares[:, None, ..., dilation])
        return pooled if keep is None else pooled.masked_fill(~keep[:, None], 0.0)

    def scale_probs(
        self, x: Float[Tensor, "batch dim height width"], keep: Bool[Tensor, "batch height width"] | None = None
    ) -> Float[Tensor, "batch height width scales"]:
        """The share of each scale at each cell; sums to 1, float32 or better."""
        first, norm, second = self.proj
        scores = first(x)
        if keep is None:
            scores = norm(scores)
        else:  # statistics over the cells that there are, and 0 outside of them as outside of a map
            assert isinstance(norm, nn.BatchNorm2d | nn.SyncBatchNorm)
            assert norm.running_mean is not None
            assert norm.running_var is not None
            if self.training and norm.num_batches_tracked is not None:
                norm.num_batches_tracked.add_(1)
            flat = masked_batch_norm(
                scores.flatten(2).transpose(1, 2), norm.running_mean, norm.running_var, keep.flatten(1),
                norm.weight, norm.bias, self.training, 0.1 if norm.momentum is None else norm.momentum, norm.eps,
            )  # fmt: skip
            scores = zero_padding(flat, keep.flatten(1)).transpose(1, 2).unflatten(2, tuple(keep.shape[1:]))
        logits = widen(second(scores)) / self.temperature
        return logits.softmax(dim=1).permute(0, 2, 3, 1)

    def _warn_of_small(self, height: int, width: int) -> None:
        if self.num_scales > min(height, width) and not torch.compiler.is_compiling():
            warnings.warn(
                f"on a grid of {height} x {width} cells no neighbour at dilation {self.num_scales - 1} lies inside "
                f"along the shorter side: use num_scales of at most {min(height, width)}",
                stacklevel=4,
            )


class TAP(Mixer):
    """Any mixer on tokens that :class:`TokenAwarePooling` has pooled: ``M(TAP(x))``.

    In a :class:`~cenote.mixing.MetaFormerBlock` it pools behind the block's norm, ``x + M(TAP(norm(x)))``. The paper
    pools in front of it, ``x + M(norm(TAP(x)))``: for that, and for published weights, take :class:`TAPBlock`. Paper:
    "Robustifying Token Attention for Vision Transformers" (arXiv 2303.11126).

    Args:
        dim: token width.
        mixer: spec of the mixer that reads the pooled tokens, or a mixer.
        num_scales, temperature, count_include_pad: see :class:`TokenAwarePooling`.
        num_heads: heads of the inner mixer, where it has heads and its spec says nothing.
    """

    name = "tap"
    paper = "tap-adl"

    def __init__(
        self,
        dim: int,
        mixer: str | Mixer = "softmax_attention",
        num_scales: int = 4,
        temperature: float = 1.0,
        count_include_pad: bool = True,
        num_heads: int | None = None,
    ) -> None:
        super().__init__(dim)
        self.dilation_predictor = TokenAwarePooling(dim, num_scales, temperature, count_include_pad)
        if isinstance(mixer, str):
            offered = {} if num_heads is None else {"num_heads": num_heads}
            mixer = create_mixer(mixer, dim=dim, defaults=offered)
        if mixer.dim != dim:
            raise ValueError(f"the inner mixer has width {mixer.dim}, expected {dim}")
        self.mixer = mixer
        self.needs = mixer.needs | {"grid"}  # type: ignore[misc]
        self.projections = mixer.projections  # type: ignore[misc]
        self.attends = mixer.attends

    def _mix(
        self, tokens: Tensor, mask: Tensor | None, context: MixerContext, return_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        assert context.grid is not None
        pooled = self.dilation_predictor(tokens, context.grid, mask, context.prefix)
        if return_weights:
            return self.mixer(pooled, mask, context, return_weights=True)
        return self.mixer(pooled, mask, context), None


class TAPBlock(MetaFormerBlock):
    """A block whose attention reads pooled tokens while the residual keeps the others.

    ``x = x + s1 * M(N1(TAP(x))); x = x + s2 * F(N2(x))``, the order of the paper.

    Args:
        mixer: any mixer.
        num_scales, temperature, count_include_pad: see :class:`TokenAwarePooling`.
        **block: settings of :class:`~cenote.mixing.MetaFormerBlock`.
    """

    def __init__(
        self,
        mixer: Mixer,
        *,
        num_scales: int = 4,
        temperature: float = 1.0,
        count_include_pad: bool = True,
        **block: Any,
    ) -> None:
        super().__init__(mixer, **block)
        self.dilation_predictor = TokenAwarePooling(mixer.dim, num_scales, temperature, count_include_pad)

    def forward(self, x: Tensor, mask: Tensor | None = None, context: MixerContext | None = None) -> Tensor:
        """The same shape, mixed; for tokens the context names the grid.

        Raises:
            ValueError: tokens without a grid.
        """
        if self.layout == "map":
            return self._rest(x, self._run_map(self.norm1(self.dilation_predictor.pool_map(x)), context))
        if context is None or context.grid is None:
            raise ValueError("TAPBlock needs the grid: pass MixerContext(grid=...)")
        pooled = self.dilation_predictor(x, context.grid, mask, context.prefix)
        return self._rest(x, self._run_tokens(self.norm1(pooled), mask, context))

    def chunk(self, *args: Any, **kwargs: Any) -> Any:
        """There is none: a token's surroundings lie on both sides of it."""
        raise ValueError("TAPBlock pools over the whole grid, so it has no recurrent form")
