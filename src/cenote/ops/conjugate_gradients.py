"""Many small positive definite systems at once, known by their products; and a check for those that are singular."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

Product = Callable[[Tensor], Tensor]


def conjugate_gradients(
    product: Product, target: Float[Tensor, "*batch n"], start: Float[Tensor, "*batch n"] | None, iterations: int
) -> Float[Tensor, "*batch n"]:
    """``x`` with ``A x = b`` for each of a batch of symmetric positive definite matrices A, known by their products.

    Exact after ``n`` iterations but for rounding, sooner where eigenvalues cluster. A system that has converged to
    rounding is left alone, so further iterations cost time and change nothing.

    Args:
        product: ``A x`` of a batch of vectors.
        target: the right sides b.
        start: the first guess; ``None`` for 0, which spares a product.
        iterations: products to spend.

    Raises:
        ValueError: no iteration.
    """
    if iterations < 1:
        raise ValueError(f"conjugate gradients need at least one iteration, got {iterations}")
    x, residual = (torch.zeros_like(target), target) if start is None else (start, target - product(start))
    direction, rest = residual, residual.square().sum(dim=-1, keepdim=True)
    # Squared norms are compared: one rounding of b, squared.
    enough = target.detach().square().sum(dim=-1, keepdim=True) * torch.finfo(target.dtype).eps ** 2
    for _ in range(iterations):
        image = product(direction)
        curvature = (direction * image).sum(dim=-1, keepdim=True)
        going = (rest > enough) & (curvature > 0)
        # The inner where keeps the branch not taken from dividing by 0, whose gradient would be NaN.
        length = torch.where(going, rest / torch.where(going, curvature, 1.0), 0.0)
        x, residual = x + length * direction, residual - length * image
        left = residual.square().sum(dim=-1, keepdim=True)
        turn = torch.where(going, left / torch.where(going, rest, 1.0), 0.0)
        direction, rest = residual + turn * direction, torch.where(going, left, rest)
    return x


def require_definite(matrix: Float[Tensor, "*batch n n"], kind: str, reason: str) -> None:
    """Raise ``ValueError`` with this reason if a matrix is singular to rounding; nothing is read while compiling."""
    if torch.compiler.is_compiling():
        return
    values = torch.linalg.eigvalsh(matrix.detach())
    bound = values[..., -1] * torch.finfo(matrix.dtype).eps * matrix.shape[-1]
    if bool((values[..., 0] <= bound).any()):
        raise ValueError(f"{kind}: {reason}")
