"""ViM: what of a feature lies outside the space that training features fill."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from cenote.inspection.open_set_base import OpenSetScore


class ViM(OpenSetScore):
    """Energy less the norm of the residual, as if it were one more logit (arXiv 2203.10807).

    ``logsumexp(l) - alpha |R^T (F - u)|`` with the origin ``u = -pinv(W) b``, R the eigenvectors of
    ``mean (F - u)(F - u)^T`` beyond the ``dim`` largest, and ``alpha = mean(max l) / mean|R^T (F - u)|`` over training
    items.

    Everything runs in float64 with a symmetric eigensolver: where the rows of W nearly depend on each other the origin
    lies far out, and float32 loses two digits. OpenOOD uses float32 and the general solver.

    Args:
        weight, bias: the linear head.
        dim: dimensions of the principal space; by default 1000 for widths from 2048, 512 from 768, else half.

    Raises:
        ValueError: as :class:`OpenSetScore`; ``dim`` not between 0 and the width; training features without residual.
    """

    name, passes = "vim", 2

    def __init__(
        self,
        weight: Float[Tensor, "classes dim"],
        bias: Float[Tensor, "classes"] | None = None,
        *,
        dim: int | None = None,
    ) -> None:
        width = weight.shape[-1]
        chosen = (1000 if width >= 2048 else 512 if width >= 768 else width // 2) if dim is None else dim
        if not 0 <= chosen < width:
            raise ValueError(f"dim must lie in 0..{width - 1}, below the width of the features, got {chosen}")
        super().__init__(weight, bias, dim=chosen)
        self.origin = -torch.linalg.pinv(self.weight.double()) @ self.bias.double()

    def _begin(self) -> None:
        self._second = torch.zeros(self.dim, self.dim, dtype=torch.float64, device=self.weight.device)
        self._top, self._residual, self._items = 0.0, 0.0, 0

    def _observe(self, number: int, features: Tensor, labels: Tensor, logits: Tensor) -> None:
        moved = features.double() - self.origin
        if number == 0:
            self._second += moved.T @ moved
            self._items += len(features)
        else:
            self._top += float(logits.amax(dim=1).double().sum())
            self._residual += float((moved @ self.state["residual"]).norm(dim=1).sum())

    def _end(self, number: int) -> None:
        if number == 0:
            vectors = torch.linalg.eigh(self._second / self._items).eigenvectors  # eigenvalues ascend
            self.state = {"residual": vectors[:, : self.dim - self.settings["dim"]].contiguous()}
            return
        if not self._residual > 0:
            raise ValueError(f"all training features lie in {self.settings['dim']} dimensions: choose a smaller dim")
        self.state["alpha"] = self._second.new_tensor([self._top / self._residual])

    def _score(self, features: Tensor, logits: Tensor) -> Tensor:
        residual = ((features.double() - self.origin) @ self.state["residual"]).norm(dim=1)
        return (logits.double().logsumexp(dim=1) - self.state["alpha"] * residual).to(features.dtype)
