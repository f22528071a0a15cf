"""Layer reductions: hidden states of all layers to one set of tokens, in front of any token reduction."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn


class LayerReduction(nn.Module):
    """``(batch, layers, tokens, dim)`` to ``(batch, tokens, out_dim)``.

    Args:
        dim: width of the hidden states.
        num_layers: length of the layer axis.
    """

    name: ClassVar[str]

    def __init__(self, dim: int, num_layers: int) -> None:
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"num_layers must be at least 1, got {num_layers}")
        self.dim, self.num_layers, self.out_dim = dim, num_layers, dim

    def forward(self, hidden: Tensor) -> Tensor:
        """Reduce the layer axis; raises ``ValueError`` when its length is not the one built for."""
        if hidden.ndim != 4 or hidden.shape[1] != self.num_layers:
            raise ValueError(
                f"{type(self).__name__} was built for {self.num_layers} layers and expects "
                f"(batch, layers, tokens, dim), got shape {tuple(hidden.shape)}"
            )
        return self._reduce(hidden)

    @abstractmethod
    def _reduce(self, hidden: Tensor) -> Tensor: ...


class OneLayer(LayerReduction):
    """The tokens of one entry of the layer axis (-1 = the last)."""

    name = "one_layer"

    def __init__(self, dim: int, num_layers: int, layer: int = -1) -> None:
        super().__init__(dim, num_layers)
        if not -num_layers <= layer < num_layers:
            raise ValueError(f"layer must index one of {num_layers} layers, got {layer}")
        self.layer = layer

    def _reduce(self, hidden: Tensor) -> Tensor:
        return hidden[:, self.layer]


class MeanLayers(LayerReduction):
    """The mean over layers, ``1/L sum_l h_l``."""

    name = "mean_layers"

    def _reduce(self, hidden: Tensor) -> Tensor:
        return hidden.float().mean(dim=1).to(hidden.dtype)


class WeightedLayers(LayerReduction):
    """Learned weighted sum of layers, ``sum_l softmax(w)_l h_l``, uniform at the start (ELMo, SUPERB)."""

    name = "weighted_layers"

    def __init__(self, dim: int, num_layers: int) -> None:
        super().__init__(dim, num_layers)
        self.weight = nn.Parameter(torch.zeros(num_layers))

    def _reduce(self, hidden: Tensor) -> Tensor:
        weights = self.weight.float().softmax(dim=0).to(hidden.dtype)
        return torch.einsum("l,blnd->bnd", weights, hidden)


class ConcatLayers(LayerReduction):
    """Layers side by side: ``(batch, tokens, layers * dim)``, layer-major."""

    name = "concat_layers"

    def __init__(self, dim: int, num_layers: int) -> None:
        super().__init__(dim, num_layers)
        self.out_dim = dim * num_layers

    def _reduce(self, hidden: Tensor) -> Tensor:
        return hidden.transpose(1, 2).flatten(2)
