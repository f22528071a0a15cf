"""RVT, the robust vision transformer, with token-aware pooling in front of its attention."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from cenote.mixing.base import MixerContext
from cenote.mixing.softmax_attention import SoftmaxAttention
from cenote.mixing.tap import TokenAwarePooling
from cenote.ops.drop_path import drop_path
from cenote.ops.masked import widen
from cenote.ops.token_grid import locate
from cenote.types import Grid

RVT_SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"base_dims": (32, 32), "depth": (10, 2), "heads": (6, 12)},
    "tiny_plus": {"base_dims": (32, 32), "depth": (10, 2), "heads": (6, 12), "masked_blocks": 10},
    "small": {"base_dims": (64,), "depth": (12,), "heads": (6,)},
    "small_plus": {"base_dims": (64,), "depth": (12,), "heads": (6,), "masked_blocks": 5},
    "base": {"base_dims": (64,), "depth": (12,), "heads": (12,)},
    "base_plus": {"base_dims": (64,), "depth": (12,), "heads": (12,), "masked_blocks": 5},
}
"""The published sizes, all with ``patch_size=16`` and ``mlp_ratio=4``."""


class PositionAwareAttention(SoftmaxAttention):
    """Softmax attention whose logits a learned mask scales by position: ``softmax(sigmoid(W) * Q K^T / sqrt(d)) V``.

    Args:
        dim: token width.
        num_heads: heads.
        qkv_bias: bias of the query, key and value maps.
        max_tokens: side of the mask ``att_mask (heads, max_tokens, max_tokens)``; fewer tokens use its upper left
            corner. ``None`` for no mask, which is plain attention.

    Raises:
        ValueError: more tokens than the mask has.
    """

    name = "position_aware_attention"
    att_mask: nn.Parameter | None

    def __init__(self, dim: int, num_heads: int = 8, qkv_bias: bool = True, max_tokens: int | None = None) -> None:
        super().__init__(dim, num_heads, qkv_bias=qkv_bias)
        self.permutation_equivariant = max_tokens is None
        weight = None if max_tokens is None else nn.Parameter(torch.empty(num_heads, max_tokens, max_tokens))
        self.register_parameter("att_mask", weight)
        if weight is not None:
            nn.init.trunc_normal_(weight, std=0.02, a=-0.02, b=0.02)

    def _mix(
        self, tokens: Tensor, mask: Tensor | None, context: MixerContext, return_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        if self.att_mask is None:
            return super()._mix(tokens, mask, context, return_weights)
        count = tokens.shape[1]
        if count > self.att_mask.shape[1]:
            raise ValueError(f"the position mask holds {self.att_mask.shape[1]} tokens, got {count}")
        query, key, value = self.qkv(tokens).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        logits = widen(query) @ widen(key).transpose(-1, -2) * query.shape[-1] ** -0.5
        logits = logits * widen(self.att_mask)[:, :count, :count].sigmoid()
        if mask is not None:
            logits = logits.masked_fill(~mask[:, None, None], float("-inf"))
        weights = logits.softmax(dim=-1)
        return self._merge(weights.to(value.dtype) @ value), weights


class ConvMlp(nn.Module):
    """``BN(fc2 gelu(BN(dw3x3 gelu(BN(fc1 x)))))`` on the grid; the linear maps are 1 x 1 convolutions.

    Args:
        dim: token width.
        hidden: inner width.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.bn1 = nn.Conv2d(dim, hidden, 1), nn.BatchNorm2d(hidden)
        self.dwconv, self.bn2 = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden), nn.BatchNorm2d(hidden)
        self.fc2, self.bn3 = nn.Conv2d(hidden, dim, 1), nn.BatchNorm2d(dim)

    def forward(self, x: Float[Tensor, "batch tokens dim"], grid: tuple[int, int]) -> Float[Tensor, "batch tokens dim"]:
        cells = x.transpose(1, 2).unflatten(2, grid)
        cells = F.gelu(self.bn2(self.dwconv(F.gelu(self.bn1(self.fc1(cells))))))
        return self.bn3(self.fc2(cells)).flatten(2).transpose(1, 2)


class RVTBlock(nn.Module):
    """``x = x + Attn(norm1(TAP(x))); x = x + ConvMlp(norm2(x))``.

    Keys are the official ones (``norm1, attn.{qkv, proj, att_mask}, norm2, mlp.*, dilation_predictor.proj.*``). The
    grid may have any sides; the official code takes the square root of the number of tokens.

    Args:
        dim: token width.
        num_heads: heads.
        mlp_ratio: inner width of the MLP over ``dim``.
        qkv_bias: bias of the query, key and value maps.
        num_scales: of :class:`~cenote.mixing.tap.TokenAwarePooling`; 1 is the plain RVT block.
        max_tokens: side of the position-aware mask ("plus" models); ``None`` for none.
        norm_eps: 1e-6 inside the published models.
        drop_path: chance that an item skips a half in training.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        num_scales: int = 4,
        max_tokens: int | None = None,
        norm_eps: float = 1e-5,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = PositionAwareAttention(dim, num_heads, qkv_bias, max_tokens)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = ConvMlp(dim, int(dim * mlp_ratio))
        self.dilation_predictor = TokenAwarePooling(dim, num_scales)
        self.drop_rate = drop_path

    def forward(
        self, x: Float[Tensor, "batch tokens dim"], grid: tuple[int, int] | None = None, return_weights: bool = False
    ) -> Any:
        """Tokens ``(batch, tokens, dim)``, with ``return_weights`` also the maps ``(batch, heads, tokens, tokens)``.

        Args:
            x: tokens of the grid, row by row.
            grid: rows and columns; a square where it is not given.
            return_weights: also return the attention maps.
        """
        cells = locate(x.shape[1], None, grid)
        grid = (cells.height, cells.width)
        mixed = self.attn(self.norm1(self.dilation_predictor(x, grid)), return_weights=return_weights)
        mixed, weights = mixed if return_weights else (mixed, None)
        x = x + drop_path(mixed, self.drop_rate, self.training)
        x = x + drop_path(self.mlp(self.norm2(x), grid), self.drop_rate, self.training)
        return (x, weights) if return_weights else x

    @classmethod
    def from_reference(cls, state_dict: dict[str, Tensor], **config: Any) -> RVTBlock:
        """Build from official weights; whether there is a position-aware mask is read from them."""
        mask = state_dict.get("attn.att_mask")
        block = cls(**config, max_tokens=None if mask is None else mask.shape[-1])
        block.load_state_dict(state_dict)
        return block


class Stem(nn.Module):
    """Images to patches: conv 7 x 7 by 2, batch norm, max pooling by 2, then a convolution of ``patch_size / 4``."""

    def __init__(self, channels: int, dim: int, patch_size: int) -> None:
        super().__init__()
        last = 1 if patch_size == 4 else 4
        self.proj = nn.Sequential(
            nn.Conv2d(channels, 32, 7, stride=2, padding=2),
            nn.BatchNorm2d(32),
            nn.MaxPool2d(3, stride=2, padding=1),
            nn.Conv2d(32, dim, last, stride=last),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class Stage(nn.Module):
    """Blocks of one width."""

    def __init__(self, blocks: Sequence[RVTBlock]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)


class Shrink(nn.Module):
    """Half the sides, more channels: a 3 x 3 convolution with one group an input channel."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, out_dim, 3, stride=2, padding=1, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class RVT(nn.Module):
    """RVT with TAP: stem, stages of :class:`RVTBlock` joined by :class:`Shrink`, mean over cells, norm, classifier.

    ``RVT(**RVT_SIZES["base_plus"], num_scales=4)`` is the paper's; keys are the official ones. Papers: "Towards Robust
    Vision Transformer" (arXiv 2105.07926) and "Robustifying Token Attention for Vision Transformers" (2303.11126).
    Images may have any sides (those of models with a position-aware mask at most ``max_tokens`` patches).

    Args:
        base_dims: width of a head, one a stage; ``base_dims[i] * heads[i]`` is the stage's width.
        depth: blocks, one a stage.
        heads: heads, one a stage.
        mlp_ratio: inner width of the MLPs over the stage's.
        num_classes: of the classifier; 0 for none.
        in_channels: of the images.
        patch_size: 16, or 4 for small images.
        num_scales: of TAP; 1 is plain RVT.
        masked_blocks: the first blocks of the first stage that have a position-aware mask.
        max_tokens: side of that mask.
        drop_path: rate that the blocks' rates grow towards, ``drop_path * i / blocks``.

    Raises:
        ValueError: settings of different numbers of stages, a patch size that is neither 4 nor 16.
    """

    def __init__(
        self,
        base_dims: Sequence[int],
        depth: Sequence[int],
        heads: Sequence[int],
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        in_channels: int = 3,
        patch_size: int = 16,
        num_scales: int = 4,
        masked_blocks: int = 0,
        max_tokens: int = 196,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        if not len(base_dims) == len(depth) == len(heads) > 0:
            raise ValueError(f"expected one entry a stage, got {base_dims}, {depth}, {heads}")
        if patch_size not in (4, 16):
            raise ValueError(f"patch_size must be 4 or 16, got {patch_size}")
        dims, total = [base * head for base, head in zip(base_dims, heads, strict=True)], sum(depth)
        self.patch_embed = Stem(in_channels, dims[0], patch_size)
        made = [
            RVTBlock(
                dims[stage], heads[stage], mlp_ratio, True, num_scales,
                max_tokens if stage == 0 and block < masked_blocks else None,
                1e-6, drop_path * (sum(depth[:stage]) + block) / total,
            )
            for stage in range(len(depth)) for block in range(depth[stage])
        ]  # fmt: skip
        cuts = [sum(depth[:stage]) for stage in range(len(depth) + 1)]
        self.transformers = nn.ModuleList(Stage(made[a:b]) for a, b in itertools.pairwise(cuts))
        self.pools = nn.ModuleList(Shrink(a, b) for a, b in itertools.pairwise(dims))
        self.norm = nn.LayerNorm(dims[-1], eps=1e-6)
        self.head = nn.Linear(dims[-1], num_classes) if num_classes > 0 else nn.Identity()

    def forward(self, images: Float[Tensor, "batch channels height width"], return_weights: bool = False) -> Any:
        """Logits ``(batch, classes)``; with ``return_weights`` also the list of attention maps, one a block."""
        x, maps = self.patch_embed(images), []
        for number, stage in enumerate(self.transformers):
            if number:
                x = self.pools[number - 1](x)
            grid = Grid(*x.shape[2:])
            tokens = x.flatten(2).transpose(1, 2)
            assert isinstance(stage, Stage)
            for block in stage.blocks:
                tokens = block(tokens, grid, return_weights)
                if return_weights:
                    tokens, weights = tokens
                    maps.append(weights)
            x = tokens.transpose(1, 2).unflatten(2, tuple(grid))
        logits = self.head(self.norm(x.mean(dim=(2, 3))))
        return (logits, maps) if return_weights else logits

    @classmethod
    def from_reference(cls, state_dict: dict[str, Tensor], **config: Any) -> RVT:
        """Build from official weights, such as those under ``model`` of the release; a mask is read from them."""
        masks = [key for key in state_dict if re.fullmatch(r"transformers\.0\.blocks\.\d+\.attn\.att_mask", key)]
        side = state_dict[masks[0]].shape[-1] if masks else 196
        model = cls(**config, max_tokens=side, masked_blocks=len(masks))
        model.load_state_dict(state_dict)
        return model
