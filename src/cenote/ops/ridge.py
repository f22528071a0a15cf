"""Ridge regression for a whole grid of penalties from one eigendecomposition."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class RidgePath:
    """``argmin_v ||y - Phi v||^2 / n + penalty ||v||^2`` for any penalty, without another decomposition.

    Attributes:
        features: ``Phi``, ``(items, features)``.
        values: eigenvalues of the smaller of ``Phi Phi^T / n`` and ``Phi^T Phi / n``.
        vectors: their eigenvectors in columns.
        rotated: ``vectors^T y / n`` or ``vectors^T Phi^T y / n``, ``(rank, columns)``.
        targets: ``y``, ``(items, columns)``.
        dual: whether the decomposition is that of the items.
    """

    features: Float[Tensor, "items features"]
    values: Float[Tensor, "rank"]
    vectors: Float[Tensor, "side rank"]
    rotated: Float[Tensor, "rank columns"]
    targets: Float[Tensor, "items columns"]
    dual: bool

    def coefficients(self, penalty: float) -> Float[Tensor, "features columns"]:
        """The solution ``v``; ``ValueError`` for a negative penalty.

        With penalty 0 it is the one of least norm.
        """
        solved = self.vectors @ (self._shrunk(penalty) * self.rotated)
        return self.features.T @ solved if self.dual else solved

    def leave_one_out(self, penalty: float) -> Float[Tensor, "items columns"]:
        """What each item's residual would be had the fit not seen it, ``(y_i - f(x_i)) / (1 - H_ii)``, exactly."""
        count = len(self.features)
        basis = self.vectors if self.dual else self.features @ self.vectors
        shrunk = self._shrunk(penalty)
        weight = self.values[:, None] * shrunk if self.dual else shrunk / count
        fitted = basis @ (weight * (basis.T @ self.targets))
        leverage = (basis.square() @ weight).clamp(max=1 - 1e-12)
        return (self.targets - fitted) / (1 - leverage)

    def _shrunk(self, penalty: float) -> Tensor:
        if not penalty >= 0:
            raise ValueError(f"a ridge penalty is not negative, got {penalty}")
        floor = torch.finfo(self.values.dtype).eps * len(self.values) * self.values.max()
        total = self.values + penalty
        return torch.where(self.values > floor, 1 / total, (penalty > 0) / total.clamp(min=floor))[:, None]


def ridge_path(features: Float[Tensor, "items features"], targets: Float[Tensor, "items columns"]) -> RidgePath:
    """Decompose once, in float64, the smaller of the two Gram matrices.

    Raises:
        ValueError: no items, or numbers that are not finite.
    """
    phi, y = features.double(), targets.double()
    if not len(phi):
        raise ValueError("ridge regression needs at least one item")
    if not bool(phi.isfinite().all() & y.isfinite().all()):
        raise ValueError("ridge regression got numbers that are not finite")
    dual = phi.shape[0] <= phi.shape[1]
    gram = (phi @ phi.T if dual else phi.T @ phi) / len(phi)
    values, vectors = torch.linalg.eigh(gram)
    rotated = vectors.T @ (y if dual else phi.T @ y) / len(phi)
    return RidgePath(phi, values.clamp(min=0), vectors, rotated, y, dual)
