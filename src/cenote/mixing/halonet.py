"""HaloNet: residual networks whose 3 x 3 convolutions are blocked local attention."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor, nn

from cenote.mixing.halo_attention import HaloAttention
from cenote.ops.drop_path import drop_path

_ACTS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "silu": nn.SiLU, "gelu": nn.GELU}
_STEMS = {"7x7": (7, (1.0,)), "3x3": (3, (1.0,)), "tiered": (3, (3 / 8, 1 / 2, 1.0)), "deep": (3, (1.0, 1.0, 1.0))}
"""Kernel, and width of each convolution over the last one's."""


@dataclass(frozen=True)
class HaloBlock:
    """Settings of one bottleneck block.

    Attributes:
        kind: ``"attention"``, or ``"convolution"`` for a 3 x 3 one.
        inner: width between the 1 x 1 convolutions: of queries and keys, or of the 3 x 3 convolution.
        out: width of the block's output.
        stride: 2 halves the map.
        values: width of the attention's values; ``inner`` unless given.
        groups: of the 3 x 3 convolution.
        attention: further options of :class:`cenote.mixing.halo_attention.HaloAttention`.
    """

    kind: Literal["attention", "convolution"]
    inner: int
    out: int
    stride: int = 1
    values: int | None = None
    groups: int = 1
    attention: Mapping[str, Any] = field(default_factory=dict)


class ConvNorm(nn.Module):
    """Convolution without bias, batch norm, activation."""

    def __init__(
        self, dim: int, out: int, kernel: int = 1, stride: int = 1, groups: int = 1, act: str | None = None
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, out, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(out)
        self.act = nn.Identity() if act is None else _ACTS[act]()

    def forward(self, x: Float[Tensor, "batch dim height width"]) -> Float[Tensor, "batch out rows columns"]:
        return self.act(self.bn(self.conv(x)))


class HaloBottleneck(nn.Module):
    """``act(shortcut(x) + conv3(mix(conv1(x))))`` with 1 x 1 convolutions around attention or a 3 x 3 convolution.

    The shortcut is a 1 x 1 convolution with batch norm where width or size change, else the identity.

    Args:
        dim: width of the input.
        block: settings.
        act: activation: relu, silu or gelu.
        drop_path: chance that an item skips the block's inside in training.
    """

    def __init__(self, dim: int, block: HaloBlock, act: str = "relu", drop_path: float = 0.0) -> None:
        super().__init__()
        changes = dim != block.out or block.stride != 1
        self.shortcut = ConvNorm(dim, block.out, stride=block.stride) if changes else nn.Identity()
        self.conv1_1x1 = ConvNorm(dim, block.inner, act=act)
        self.drop_rate, self.attends = drop_path, block.kind == "attention"
        width = block.inner
        if self.attends:
            width = block.values or block.inner
            self.self_attn = HaloAttention(block.inner, width, block.stride, **block.attention)
            self.post_attn, self.post_act = nn.BatchNorm2d(width), _ACTS[act]()
        else:
            self.conv2_kxk = ConvNorm(width, width, 3, block.stride, block.groups, act)
        self.conv3_1x1 = ConvNorm(width, block.out)
        self.act = _ACTS[act]()

    def forward(self, x: Float[Tensor, "batch dim height width"]) -> Float[Tensor, "batch out rows columns"]:
        inside = self.conv1_1x1(x)
        inside = self.post_act(self.post_attn(self.self_attn(inside))) if self.attends else self.conv2_kxk(inside)
        return self.act(self.shortcut(x) + drop_path(self.conv3_1x1(inside), self.drop_rate, self.training))


class HaloNet(nn.Module):
    """Stem, stages of :class:`HaloBottleneck`, an optional 1 x 1 convolution, mean over cells, linear classifier.

    Key names are those of timm's ``ByobNet``, so that its halo checkpoints load
    (:func:`cenote.mixing.halo_timm.halonet_from_timm`). The paper's family: :func:`create_halonet`.

    Args:
        stages: settings of the blocks, stage by stage.
        stem: ``"7x7"``, ``"3x3"`` (one convolution), ``"tiered"`` or ``"deep"`` (three of 3 x 3).
        stem_width: width of its last convolution.
        stem_pool: a 3 x 3 maximum with stride 2 behind it; without, the map is twice as large.
        act: activation of stem and blocks: ``"relu"``, ``"silu"`` or ``"gelu"``.
        num_features: width of the 1 x 1 convolution behind the last stage; ``None`` for none.
        num_classes: 0 for no classifier.
        in_chans: channels of the image.
        drop_path: rate of the last block, growing from 0 at the first.

    Raises:
        ValueError: an unknown stem or activation, or no block.
    """

    def __init__(
        self,
        stages: Sequence[Sequence[HaloBlock]],
        *,
        stem: str = "7x7",
        stem_width: int = 64,
        stem_pool: bool = True,
        act: str = "relu",
        num_features: int | None = None,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        if stem not in _STEMS or act not in _ACTS:
            raise ValueError(f"stem must be one of {list(_STEMS)} and act one of {list(_ACTS)}, got {stem!r}, {act!r}")
        if not stages or not all(stages):
            raise ValueError("every stage needs at least one block")
        kernel, shares = _STEMS[stem]
        parts: OrderedDict[str, nn.Module] = OrderedDict()
        dim = in_chans
        for number, share in enumerate(shares, start=1):
            width = int(stem_width * share)
            parts[f"conv{number}"] = ConvNorm(dim, width, kernel, 2 if number == 1 else 1, act=act)
            dim = width
        if stem_pool:
            parts["pool"] = nn.MaxPool2d(3, 2, padding=1)
        self.stem = nn.Sequential(parts)
        count = sum(map(len, stages))
        rates = iter(drop_path * number / max(count - 1, 1) for number in range(count))
        made: list[nn.Module] = []
        for stage in stages:
            blocks = []
            for block in stage:
                blocks.append(HaloBottleneck(dim, block, act, next(rates)))
                dim = block.out
            made.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*made)
        self.final_conv = ConvNorm(dim, num_features, act=act) if num_features else nn.Identity()
        self.num_features = num_features or dim
        classifier = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.head = nn.Sequential(OrderedDict(fc=classifier))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """He initialisation of convolutions by fan-out; the last norm of each block's inside starts at 0."""
        for module in self.modules():
            if isinstance(module, ConvNorm):
                conv = module.conv
                fan_out = conv.kernel_size[0] ** 2 * conv.out_channels // conv.groups
                nn.init.normal_(conv.weight, std=math.sqrt(2 / fan_out))
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, HaloBottleneck):
                nn.init.zeros_(module.conv3_1x1.bn.weight)

    def stage_maps(self, images: Float[Tensor, "batch channels height width"]) -> list[Tensor]:
        """The map behind each stage, fine to coarse: what dense prediction reads."""
        maps = [self.stem(images)]
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        return maps[1:]

    def forward_features(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch dim r c"]:
        """The last map, ``(batch, num_features, rows, columns)``."""
        return self.final_conv(self.stage_maps(images)[-1])

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Logits; mean features where there is no classifier."""
        return self.head(self.forward_features(images).mean(dim=(2, 3)))


@dataclass(frozen=True)
class HaloNetSize:
    """A member of the paper's family.

    Attributes:
        block: side of a block.
        halo: cells around it.
        value_ratio: width of the values over that of queries and keys.
        out_ratio: width of a block's output over that of queries and keys.
        depth: blocks in the third stage.
        num_features: width of the last 1 x 1 convolution, or ``None``.
        image: side of the training images.
    """

    block: int
    halo: int
    value_ratio: float
    out_ratio: float
    depth: int
    num_features: int | None
    image: int


HALONETS = {
    "h0": HaloNetSize(8, 3, 1, 0.5, 7, None, 256),
    "h1": HaloNetSize(8, 3, 1, 1, 10, None, 256),
    "h2": HaloNetSize(8, 3, 1, 1.25, 11, None, 256),
    "h3": HaloNetSize(10, 3, 1, 1.5, 12, 1024, 320),
    "h4": HaloNetSize(12, 2, 1, 3, 12, 1280, 384),
    "h5": HaloNetSize(14, 2, 2.5, 2, 23, 1536, 448),
    "h6": HaloNetSize(8, 4, 3, 2.75, 24, 1536, 512),
    "h7": HaloNetSize(10, 3, 4, 3.5, 26, 2048, 600),
}


def create_halonet(
    size: str,
    *,
    num_heads: int | Sequence[int] = 8,
    attention: Mapping[str, Any] | None = None,
    **options: Any,
) -> HaloNet:
    """A network of the paper's family, H0 to H7, at random weights (the authors published none).

    Stages of 3, 3, ``depth`` and 3 attention blocks with 64, 128, 256 and 512 query and key channels. The table is
    reconstructed from the published numbers of parameters. Heads are not known; 8 is timm's choice for H1. Any image
    size goes, since the layers pad (``auto_pad``); H7's own 600 pixels need that.

    Args:
        size: ``"h0"`` to ``"h7"``.
        num_heads: of every stage, or one number a stage.
        attention: options of all :class:`cenote.mixing.halo_attention.HaloAttention` layers.
        **options: of :class:`HaloNet`, such as ``num_classes``.

    Raises:
        ValueError: unknown size, or not one number of heads a stage.
    """
    if size.lower() not in HALONETS:
        raise ValueError(f"size must be one of {', '.join(HALONETS)}, got {size!r}")
    chosen = HALONETS[size.lower()]
    heads = [num_heads] * 4 if isinstance(num_heads, int) else list(num_heads)
    if len(heads) != 4:
        raise ValueError(f"num_heads is one number, or one for each of the four stages, got {num_heads}")
    stages = []
    for stage, (depth, width) in enumerate(zip((3, 3, chosen.depth, 3), (64, 128, 256, 512), strict=True)):
        settings = {
            "num_heads": heads[stage], "dim_head": width // heads[stage], "block_size": chosen.block,
            "halo_size": chosen.halo, "auto_pad": True, **(attention or {}),
        }  # fmt: skip
        out, values = round(width * chosen.out_ratio), round(width * chosen.value_ratio)
        stages.append(
            [
                HaloBlock("attention", width, out, 2 if stage and not block else 1, values, attention=settings)
                for block in range(depth)
            ]
        )
    return HaloNet(stages, **{"num_features": chosen.num_features, **options})
