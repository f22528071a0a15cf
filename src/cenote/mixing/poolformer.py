"""MetaFormers in stages on feature maps, and PoolFormer as settings of them."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cenote.mixing.feed_forward import PointwiseConv
from cenote.mixing.metaformer import MetaFormerBlock
from cenote.mixing.norms import NormKind, make_norm
from cenote.mixing.registry import create_mixer, expand_pattern
from cenote.mixing.softmax_attention import SoftmaxAttention

Patch = tuple[int, int, int]
"""Kernel, stride and padding of a convolution that makes a smaller map."""


class PatchEmbedding(nn.Module):
    """A convolution from one map to a smaller one."""

    def __init__(self, dim: int, out: int, patch: Patch) -> None:
        super().__init__()
        kernel, stride, padding = patch
        self.proj = nn.Conv2d(dim, out, kernel, stride, padding)

    def forward(self, x: Float[Tensor, "batch dim height width"]) -> Float[Tensor, "batch out rows columns"]:
        return self.proj(x)


class PositionMap(nn.Module):
    """A learned map, 0 at first, that is added to maps of one size; ``ValueError`` for others."""

    def __init__(self, dim: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(1, dim, *grid))

    def forward(self, x: Float[Tensor, "batch dim height width"]) -> Float[Tensor, "batch dim height width"]:
        if x.shape[2:] != self.pos_embed.shape[2:]:
            wanted, came = tuple(self.pos_embed.shape[2:]), tuple(x.shape[2:])
            raise ValueError(f"the position embedding was built for maps of {wanted}, got {came}")
        return x + self.pos_embed


class StagedMetaFormer(nn.Module):
    """Images through stages of :class:`cenote.mixing.MetaFormerBlock`, each on a smaller and wider map.

    A stem convolution, then in each stage blocks with the stage's mixers, with a convolution between stages; the head
    is norm, mean over cells, linear layer, in this order. With the mixer ``pool`` everywhere it is PoolFormer. Source:
    "MetaFormer Is Actually What You Need for Vision" (arXiv 2111.11418). Names of parameters are those of the
    official code (``network`` counts stages, position maps and convolutions together), so that its checkpoints load
    as they are. What is otherwise: mixers come by name or pattern and may change within a stage; cells lie channels
    last in memory, pooling is a depthwise convolution on the CPU and inference holds part of the MLP's inner width at
    a time, all of which change nothing but rounding and time.

    A norm of kind ``group`` takes the mean of the whole map, so that padding around an image changes every cell, and
    there is no mask: give images of one size or one at a time.

    Args:
        layers: blocks of each stage.
        dims: channels of each stage.
        mixers: a pattern for all stages (:func:`cenote.mixing.expand_pattern`), or a list with one for each:
            ``["pool", "pool", "pool*5, softmax_attention", "softmax_attention(head_dim=32)"]``.
        options: options for the mixers that take them, such as ``{"pool_size": 5}``.
        num_classes: outputs of the head; with 0 the result is the pooled vector.
        in_channels: of the images.
        stem: kernel, stride and padding of the first convolution.
        downsample: the same of those between stages.
        downsamples: whether there is one behind each stage; it always is where the width changes, and never behind
            the last.
        positions: grid of a learned position map in front of each stage, or ``None`` where there is none.
        norm: ``group`` (one group; PoolFormer), ``layer`` (over channels; hybrids with attention), ``batch``, ``none``.
        mlp_ratio: inner width over channels, one number or one a stage.
        layer_scale: start of LayerScale; ``None`` for none.
        drop_path: rate of the last block, growing evenly from 0 at the first.
        fork_feat: no head; the result is the list of all stages' maps, each behind a norm of its own.
        **block: further settings of the blocks (``feed_forward``, ``residual``, ``dropout``, ``norm_eps``).

    Raises:
        ValueError: lengths that differ, a drop rate outside [0, 1), what mixers refuse; in use an image that is not
            ``(batch, in_channels, height, width)`` or smaller than :attr:`stride`.
    """

    def __init__(
        self,
        layers: Sequence[int],
        dims: Sequence[int],
        mixers: str | Sequence[str] = "pool",
        *,
        options: Mapping[str, Any] | None = None,
        num_classes: int = 1000,
        in_channels: int = 3,
        stem: Patch = (7, 4, 2),
        downsample: Patch = (3, 2, 1),
        downsamples: Sequence[bool] | None = None,
        positions: Sequence[tuple[int, int] | None] | None = None,
        norm: NormKind = "group",
        mlp_ratio: float | Sequence[float] = 4.0,
        layer_scale: float | None = 1e-5,
        drop_path: float = 0.0,
        fork_feat: bool = False,
        **block: Any,
    ) -> None:
        super().__init__()
        stages = len(layers)
        if not layers or min(layers) < 1:
            raise ValueError(f"every stage needs at least one block, got layers={list(layers)}")
        if not 0 <= drop_path < 1:
            raise ValueError(f"drop_path must lie in [0, 1), got {drop_path}")
        mixers = [mixers] * stages if isinstance(mixers, str) else mixers
        ratios = [mlp_ratio] * stages if isinstance(mlp_ratio, int | float) else mlp_ratio
        positions = [None] * stages if positions is None else positions
        downsamples = [True] * stages if downsamples is None else downsamples
        lengths = {"dims": dims, "mixers": mixers, "mlp_ratio": ratios, "positions": positions}
        for name, given in {**lengths, "downsamples": downsamples}.items():
            if len(given) != stages:
                raise ValueError(f"{name} must have one entry for each of {stages} stages, got {len(given)}")
        self.layers, self.dims, self.in_channels = tuple(layers), tuple(dims), in_channels
        self.num_classes, self.num_features, self.fork_feat = num_classes, dims[-1], fork_feat
        self.mixers = tuple(expand_pattern(pattern, depth) for pattern, depth in zip(mixers, layers, strict=True))

        self.patch_embed = PatchEmbedding(in_channels, dims[0], stem)
        rates = iter([drop_path * number / max(sum(layers) - 1, 1) for number in range(sum(layers))])
        self.network = nn.ModuleList()
        strides, ends = [stem[1]], []
        for stage, dim in enumerate(dims):
            grid = positions[stage]
            if grid is not None:
                self.network.append(PositionMap(dim, grid))
            made = [create_mixer(spec, dim=dim, defaults=options) for spec in self.mixers[stage]]
            shape = {"norm": norm, "mlp_ratio": ratios[stage], "layer_scale": layer_scale, **block}
            blocks = [MetaFormerBlock(mixer, layout="map", drop_path=next(rates), **shape) for mixer in made]
            ends.append(len(self.network))
            self.network.append(nn.Sequential(*blocks))
            if stage + 1 < stages and (downsamples[stage] or dim != dims[stage + 1]):
                self.network.append(PatchEmbedding(dim, dims[stage + 1], downsample))
                strides.append(downsample[1])
        self.stage_ends = tuple(ends)
        self.stride = prod(strides)
        eps = {"eps": block["norm_eps"]} if "norm_eps" in block else {}
        if fork_feat:
            for end, dim in zip(ends, dims, strict=True):
                self.add_module(f"norm{end}", make_norm(norm, dim, "map", **eps))
        else:
            self.norm = make_norm(norm, dims[-1], "map", **eps)
            self.head = nn.Linear(dims[-1], num_classes) if num_classes else nn.Identity()
        self._initialise()

    def _initialise(self) -> None:
        """As the official code: MLPs and linear maps from a truncated normal of 0.02, convolutions as torch does.

        Mixers of other papers keep the start that they gave themselves.
        """
        linear: list[nn.Module] = [each for each in self.modules() if isinstance(each, PointwiseConv)]
        for attention in (each for each in self.modules() if isinstance(each, SoftmaxAttention)):
            linear += [attention.qkv, attention.proj]
        if not self.fork_feat:
            linear.append(self.head)
        for each in linear:
            if isinstance(each, PointwiseConv | nn.Linear):
                nn.init.trunc_normal_(each.weight, std=0.02)
                if each.bias is not None:
                    nn.init.zeros_(each.bias)

    def forward_stages(self, x: Float[Tensor, "batch channels height width"]) -> list[Float[Tensor, "batch _ _ _"]]:
        """The map behind the last block of every stage, without norm."""
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"expected images (batch, {self.in_channels}, height, width), got {tuple(x.shape)}")
        if min(x.shape[2:]) < self.stride:
            raise ValueError(f"images must be at least {self.stride} pixels a side, got {tuple(x.shape[2:])}")
        x = self.patch_embed(x).contiguous(memory_format=torch.channels_last)
        maps = []
        for number, part in enumerate(self.network):
            x = part(x)
            if number in self.stage_ends:
                maps.append(x)
        return maps

    def forward_features(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch dim rows columns"]:
        """The map behind the last block, without norm."""
        return self.forward_stages(x)[-1]

    def forward_head(
        self, x: Float[Tensor, "batch dim rows columns"], pre_logits: bool = False
    ) -> Float[Tensor, "batch out"]:
        """Norm, mean over cells, and the classifier unless ``pre_logits``."""
        if self.fork_feat:
            raise ValueError("a network with fork_feat has no head")
        pooled = self.norm(x).mean(dim=(2, 3))
        return pooled if pre_logits else self.head(pooled)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Any:
        """Logits ``(batch, num_classes)``, or with ``fork_feat`` the list of normed maps, one a stage."""
        if not self.fork_feat:
            return self.forward_head(self.forward_features(x))
        return [
            self.get_submodule(f"norm{end}")(each)
            for end, each in zip(self.stage_ends, self.forward_stages(x), strict=True)
        ]


@dataclass(frozen=True)
class Size:
    """Published settings of a network: see the fields of :class:`StagedMetaFormer`; ``crop`` is the test crop."""

    layers: tuple[int, ...]
    dims: tuple[int, ...]
    layer_scale: float
    drop_path: float
    crop: float = 0.9
    mixers: tuple[str, ...] = ("pool",) * 4
    norm: NormKind = "group"
    positions: tuple[tuple[int, int] | None, ...] = (None,) * 4


_SMALL, _MEDIUM = (64, 128, 320, 512), (96, 192, 384, 768)
_ATTENTION = "softmax_attention(head_dim=32)"
_S12 = Size((2, 2, 6, 2), _SMALL, 1e-5, 0.1)
SIZES: dict[str, Size] = {
    "s12": _S12,
    "s24": Size((4, 4, 12, 4), _SMALL, 1e-5, 0.1),
    "s36": Size((6, 6, 18, 6), _SMALL, 1e-6, 0.2),
    "m36": Size((6, 6, 18, 6), _MEDIUM, 1e-6, 0.3, crop=0.95),
    "m48": Size((8, 8, 24, 8), _MEDIUM, 1e-6, 0.4, crop=0.95),
    "id_s12": replace(_S12, mixers=("identity",) * 4),
    "pppa_s12_224": replace(
        _S12, mixers=("pool", "pool", "pool", _ATTENTION), norm="layer", positions=(None, None, None, (7, 7))
    ),
    "ppaa_s12_224": replace(
        _S12, mixers=("pool", "pool", _ATTENTION, _ATTENTION), norm="layer", positions=(None, None, (14, 14), None)
    ),
    "pppf_s12_224": replace(_S12, mixers=("pool", "pool", "pool", "spatial_fc(grid=(7, 7))")),
    "ppff_s12_224": replace(
        _S12, mixers=("pool", "pool", "spatial_fc(grid=(14, 14))", "spatial_fc(grid=(7, 7))")
    ),
}  # fmt: skip
"""Published networks by name; letters of hybrids are pool, attention, fully connected, identity."""


def poolformer(name: str, **changes: Any) -> StagedMetaFormer:
    """A published network with random weights: ``poolformer("s12", num_classes=10, drop_path=0.0)``.

    Args:
        name: of :data:`SIZES`, with or without ``poolformer_`` or ``metaformer_`` in front.
        **changes: settings of :class:`StagedMetaFormer` in place of the published ones.

    Raises:
        ValueError: unknown name (nearest names suggested).
    """
    short = name.lower().removeprefix("poolformer_").removeprefix("metaformer_")
    if short not in SIZES:
        near = difflib.get_close_matches(short, SIZES, n=3, cutoff=0.3) or list(SIZES)
        raise ValueError(f"unknown PoolFormer {name!r}; did you mean {', '.join(near)}?")
    size = SIZES[short]
    published: dict[str, Any] = {
        "layers": size.layers, "dims": size.dims, "mixers": size.mixers, "layer_scale": size.layer_scale,
        "drop_path": size.drop_path, "norm": size.norm, "positions": size.positions,
    }  # fmt: skip
    return StagedMetaFormer(**{**published, **changes})
