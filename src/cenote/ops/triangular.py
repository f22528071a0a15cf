"""Many small triangular systems at once."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

BLOCK = 16
"""Rows of the blocks on the diagonal that are inverted; a size that it divides is solved fastest."""


def solve_unit_lower(
    lower: Float[Tensor, "systems size size"], right: Float[Tensor, "systems size width"]
) -> Float[Tensor, "systems size width"]:
    """``x`` with ``(I + strict_lower(lower)) x = right``; what stands on and above the diagonal is not read.

    Forward substitution by halves, ``x_2 = solve(L_22, r_2 - L_21 x_1)``, down to blocks whose inverses are taken
    together. All but those small inverses are matrix products, several times as fast on a CPU as a library's
    substitution for many systems, and as stable. The gradient solves one transposed system.
    """
    return _Solve.apply(lower, right)


class _Solve(torch.autograd.Function):
    @staticmethod
    def forward(lower: Tensor, right: Tensor) -> Tensor:
        if lower.shape[-1] % BLOCK:
            return torch.linalg.solve_triangular(lower, right, upper=False, unitriangular=True)
        blocks = lower.unflatten(2, (-1, BLOCK)).unflatten(1, (-1, BLOCK)).diagonal(dim1=1, dim2=3).movedim(-1, 1)
        one = torch.eye(BLOCK, dtype=lower.dtype, device=lower.device).expand_as(blocks)
        return _halves(lower, torch.linalg.solve_triangular(blocks, one, upper=False, unitriangular=True), right)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        lower, solution = ctx.saved_tensors
        # Backwards in both axes, the transposed (upper) system is a lower one again.
        right = _Solve.apply(lower.mT.flip(1, 2), grad.flip(1)).flip(1)
        return -(right @ solution.mT).tril(-1), right


def _halves(lower: Tensor, inverse: Tensor, right: Tensor) -> Tensor:
    count = inverse.shape[1]
    if count == 1:
        return inverse[:, 0] @ right
    middle = (count + 1) // 2
    cut = middle * BLOCK
    first = _halves(lower[:, :cut, :cut], inverse[:, :middle], right[:, :cut])
    rest = torch.baddbmm(right[:, cut:], lower[:, cut:, :cut], first, alpha=-1)
    second = _halves(lower[:, cut:, cut:], inverse[:, middle:], rest)
    return torch.cat([first, second], dim=1)
