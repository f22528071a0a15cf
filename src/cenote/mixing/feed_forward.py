"""The feed-forward half of a block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

FeedForwardKind = Literal["gelu", "relu", "silu", "swiglu", "none"]
ROWS = 1024
"""Tokens whose inner width is held at once in :meth:`FeedForward._by_rows`: about what a core's cache takes."""


class PointwiseConv(nn.Conv2d):
    """A 1 x 1 convolution computed as the linear map that it is; the output is laid out channels last."""

    def __init__(self, dim: int, out: int, bias: bool = True) -> None:
        super().__init__(dim, out, 1, bias=bias)

    def forward(self, input: Float[Tensor, "batch dim height width"]) -> Float[Tensor, "batch out height width"]:
        return F.linear(input.movedim(1, -1), self.weight.flatten(1), self.bias).movedim(-1, 1)


class FeedForward(nn.Module):
    """``W2 act(W1 x + b1) + b2``, or ``W2 (silu(Wg x) * W1 x)`` for ``"swiglu"`` (no biases).

    Args:
        dim: token width.
        hidden: inner width.
        kind: activation (GELU exact).
        layout: ``"map"`` for feature maps, whose linear maps are 1 x 1 convolutions.
        dropout: after the activation and after the second map, in training.

    Raises:
        ValueError: an unknown kind.
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
        activations: dict[str, Callable[[Tensor], Tensor]] = {
            "gelu": F.gelu, "relu": F.relu, "silu": F.silu, "swiglu": F.silu,
        }  # fmt: skip
        if kind not in activations:
            raise ValueError(f"kind must be one of {', '.join(activations)}, got {kind!r}")
        self.layout = layout
        gated = kind == "swiglu"

        def linear(wide: int, out: int) -> nn.Module:
            return PointwiseConv(wide, out, bias=not gated) if layout == "map" else nn.Linear(wide, out, bias=not gated)

        self.act = activations[kind]
        self.fc1, self.fc2 = linear(dim, hidden), linear(hidden, dim)
        self.gate = linear(dim, hidden) if gated else None
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        if self.layout == "map" and self._inference(x):
            return self._by_rows(x)
        inner = self.act(self.fc1(x)) if self.gate is None else self.act(self.gate(x)) * self.fc1(x)
        return self.dropout(self.fc2(self.dropout(inner)))

    def _inference(self, x: Tensor) -> bool:
        """Whether nothing but the output is wanted: no gradient, no hook, no dropout, plain float32 on the CPU."""
        linears = (self.fc1, self.fc2)
        return (
            not torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
            and not torch.is_autocast_enabled("cpu")
            and self.gate is None
            and self.act is F.gelu
            and not (self.training and self.dropout.p > 0)
            and all(type(linear) is PointwiseConv and not linear._forward_hooks for linear in linears)
            and x.device.type == "cpu"
            and x.dtype == torch.float32
        )

    def _by_rows(self, x: Tensor) -> Tensor:
        """The same, some cells at a time, so that what the inner width takes stays in the cache."""
        cells = x.movedim(1, -1)
        flat = cells.reshape(-1, cells.shape[-1])
        wide, narrow = (each.get_parameter("weight").flatten(1) for each in (self.fc1, self.fc2))
        wide_bias, bias = (each.get_parameter("bias") for each in (self.fc1, self.fc2))
        out = torch.empty_like(flat)
        for start in range(0, len(flat), ROWS):
            inner = torch.ops.aten.gelu_(F.linear(flat[start : start + ROWS], wide, wide_bias))
            torch.addmm(bias, inner, narrow.mT, out=out[start : start + ROWS])
        return out.view(cells.shape).movedim(-1, 1)
