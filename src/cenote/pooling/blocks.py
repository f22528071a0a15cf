"""Small modules that several poolings contain."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from cenote.ops.masked import masked_batch_norm, masked_softmax, widen


class MLP(nn.Module):
    """``W_2 gelu(W_1 x + b_1) + b_2`` with the exact GELU."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def hidden(self, x: Tensor) -> Tensor:
        """What enters the second layer."""
        return nn.functional.gelu(self.fc1(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.hidden(x))


def attention_scores(
    query: Float[Tensor, "*batch queries dim"], key: Float[Tensor, "*batch tokens dim"]
) -> Float[Tensor, "*batch queries tokens"]:
    """``query key^T / sqrt(dim)`` in float32 or better, under autocast too.

    The products are quadratic in the tokens, so where nothing normalises those they leave the range of float16.
    """

    def product() -> Tensor:
        return (widen(query) * query.shape[-1] ** -0.5) @ widen(key).transpose(-1, -2)

    if not torch.is_autocast_enabled(query.device.type):
        return product()
    with torch.autocast(query.device.type, enabled=False):
        return product()


class SelfAttention(nn.Module):
    """Multi-head self-attention among the real tokens, with an output projection."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=qkv_bias), nn.Linear(dim, dim)

    def forward(
        self, x: Float[Tensor, "batch tokens dim"], mask: Bool[Tensor, "batch tokens"] | None = None
    ) -> Float[Tensor, "batch tokens dim"]:
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        weights = masked_softmax(attention_scores(query, key), mask)
        return self.proj((weights.to(value.dtype) @ value).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A pre-norm transformer block: ``x + Attn(LN(x))``, then ``y + MLP(LN(y))``."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float = 4.0, qkv_bias: bool = False) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim), SelfAttention(dim, num_heads, qkv_bias)
        self.norm2, self.mlp = nn.LayerNorm(dim), MLP(dim, int(dim * mlp_ratio))

    def attend(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The first half of the block."""
        return x + self.attn(self.norm1(x), mask)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.attend(x, mask)
        return x + self.mlp(self.norm2(x))


class MaskedBatchNorm(nn.BatchNorm1d):
    """Batch normalisation of token channels ``(batch, tokens, dim)`` that leaves padding out of the statistics."""

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if self.training:
            self.num_batches_tracked.add_(1)
        momentum = 0.1 if self.momentum is None else self.momentum
        statistics = self.running_mean, self.running_var
        return masked_batch_norm(x, *statistics, mask, self.weight, self.bias, self.training, momentum, self.eps)


def check_heads(dim: int, num_heads: int) -> None:
    """Raise ``ValueError`` naming the admissible numbers of heads unless ``num_heads`` divides ``dim``."""
    if not isinstance(dim, int) or dim < 1:
        raise ValueError(f"dim must be a positive integer, got {dim!r}")
    if num_heads < 1 or dim % num_heads:
        divisors = [n for n in range(1, min(dim, 64) + 1) if dim % n == 0]
        raise ValueError(f"num_heads must divide dim={dim}, got {num_heads}; {', '.join(map(str, divisors))} would")


def rename(entries: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Entries under new names, keys matched by the longest beginning that ``names`` lists.

    A beginning renamed to ``""`` drops the entry; ``ValueError`` for keys that nothing matches.
    """
    renamed = {}
    for key, value in entries.items():
        old = max((name for name in names if key == name or key.startswith(name + ".")), key=len, default=None)
        if old is None:
            raise ValueError(f"unknown key {key!r}; expected {', '.join(sorted(names))}")
        if names[old]:
            renamed[names[old] + key[len(old) :]] = value
    return renamed
