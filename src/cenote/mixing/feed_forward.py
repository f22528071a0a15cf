"""The feed-forward half of a block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

FeedForwardKind = Literal["gelu", "relu", "silu", "swiglu", "none"]


class FeedForward(nn.Module):
    """``W2 act(W1 x + b1) + b2``, or ``W2 (silu(Wg x) * W1 x)`` for ``"swiglu"`` (no biases).

    Args:
        dim: token width.
        hidden: inner width.
        kind: activation (GELU exact).
        layout: ``"map"`` for feature maps, whose linear maps are 1 x 1 convolutions.
        dropout: after the activation and after the second map, in training.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        kind: FeedForwardKind = "gelu",
        layout: Literal["tokens", "map"] = "tokens",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        gated = kind == "swiglu"

        def linear(wide: int, out: int) -> nn.Module:
            return nn.Conv2d(wide, out, 1, bias=not gated) if layout == "map" else nn.Linear(wide, out, bias=not gated)

        activations: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu}
        self.act = activations.get(kind, F.silu)
        self.fc1, self.fc2 = linear(dim, hidden), linear(hidden, dim)
        self.gate = linear(dim, hidden) if gated else None
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.act(self.fc1(x)) if self.gate is None else self.act(self.gate(x)) * self.fc1(x)
        return self.dropout(self.fc2(self.dropout(inner)))
