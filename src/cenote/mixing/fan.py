"""The block of FAN, fully attentional networks, with token-aware pooling in front of its token attention."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from cenote.mixing.tap import TokenAwarePooling
from cenote.ops.drop_path import drop_path
from cenote.ops.masked import widen
from cenote.ops.token_grid import locate


class TokenAttention(nn.Module):
    """Softmax attention with one map for queries and one for keys and values.

    Args:
        dim: token width.
        num_heads: heads.
        qkv_bias: bias of the query, key and value maps.

    Raises:
        ValueError: a width that the heads do not divide.
    """

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"dim={dim} is not divisible by num_heads={num_heads}")
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(
        self, x: Float[Tensor, "batch tokens dim"], return_weights: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Mixed tokens, and the maps ``(batch, heads, tokens, tokens)`` where asked for."""
        query = self.q(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        key, value = self.kv(x).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        if return_weights:
            weights = (widen(query) * query.shape[-1] ** -0.5 @ widen(key).transpose(-1, -2)).softmax(dim=-1)
            mixed = weights.to(value.dtype) @ value
        else:
            weights, mixed = None, F.scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(1, 2).flatten(2)), weights


class DepthwiseConv(nn.Module):
    """A 3 x 3 convolution of each channel over the grid."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.dwconv(x.transpose(1, 2).unflatten(2, grid)).flatten(2).transpose(1, 2)


class ValueMlp(nn.Module):
    """``fc2(h + gamma * dw3x3(h))``, ``h = fc1(x)``; the activation that the official code declares never runs."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.dwconv = DepthwiseConv(hidden)
        self.gamma = nn.Parameter(torch.ones(hidden))

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        hidden = self.fc1(x)
        return self.fc2(hidden + self.gamma * self.dwconv(hidden, grid))


class ChannelAttention(nn.Module):
    """``a * LayerNorm(MLP(x))``, one weight a channel: ``a = temperature * sigmoid(softmax(q)^T mean_c softmax(k))``.

    Keys are the tokens themselves, each softmax runs over tokens and the mean over the channels of a head, so a
    channel weighs the more the better its queries agree with where its head is large.

    Args:
        dim: token width.
        num_heads: heads.
        hidden: inner width of the MLP.
        bias: bias of the query map.
    """

    def __init__(self, dim: int, num_heads: int, hidden: int, bias: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.temperature = nn.Parameter(torch.ones(num_heads, 1, 1))
        self.mlp_v = ValueMlp(dim, hidden)
        self.norm_v = nn.LayerNorm(dim)
        self.q = nn.Linear(dim, dim, bias=bias)

    def forward(self, x: Float[Tensor, "batch tokens dim"], grid: tuple[int, int]) -> Float[Tensor, "batch tokens dim"]:
        query, key = (
            widen(each).unflatten(-1, (self.num_heads, -1)).permute(0, 2, 1, 3).softmax(dim=2)
            for each in (self.q(x), x)
        )  # (batch, heads, tokens, head_dim)
        gates = (query.transpose(-1, -2) @ key.mean(dim=-1, keepdim=True)).sigmoid() * self.temperature
        return self.norm_v(self.mlp_v(x, grid)) * gates.flatten(1).unsqueeze(1).to(x.dtype)


class FANBlock(nn.Module):
    """``x = x + gamma1 * Attn(norm1(TAP(x))); x = x + gamma2 * ChannelAttn(norm2(x))``.

    Keys are the official ones. Only the token attention has maps for the diversification loss. Papers: "Understanding
    The Robustness in Vision Transformers" (arXiv 2204.12451), "Robustifying Token Attention for Vision Transformers"
    (2303.11126). The grid may have any sides; the official TAP takes the square root of the number of tokens.

    Args:
        dim: token width.
        num_heads: heads of the token attention.
        mlp_ratio: inner width of the MLP over ``dim``.
        qkv_bias: bias of the query, key and value maps.
        num_scales: of :class:`~cenote.mixing.tap.TokenAwarePooling`; 1 is the plain FAN block.
        eta: start of gamma1 and gamma2.
        channel_heads: heads of the channel attention; ``num_heads`` by default.
        norm_eps: of norm1 and norm2; 1e-6 inside the published models.
        drop_path: chance that an item skips a half in training.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        num_scales: int = 4,
        eta: float = 1.0,
        channel_heads: int | None = None,
        norm_eps: float = 1e-5,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = TokenAttention(dim, num_heads, qkv_bias)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = ChannelAttention(dim, channel_heads or num_heads, int(dim * mlp_ratio), qkv_bias)
        self.gamma1 = nn.Parameter(torch.full((dim,), float(eta)))
        self.gamma2 = nn.Parameter(torch.full((dim,), float(eta)))
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
        mixed, weights = self.attn(self.norm1(self.dilation_predictor(x, grid)), return_weights)
        x = x + drop_path(self.gamma1 * mixed, self.drop_rate, self.training)
        x = x + drop_path(self.gamma2 * self.mlp(self.norm2(x), grid), self.drop_rate, self.training)
        return (x, weights) if return_weights else x

    @classmethod
    def from_reference(cls, state_dict: dict[str, Tensor], **config: Any) -> FANBlock:
        """Build from official weights; the heads of the channel attention are read from them."""
        block = cls(**config, channel_heads=state_dict["mlp.temperature"].shape[0])
        block.load_state_dict(state_dict)
        return block
