"""The one face of a frozen pretrained network."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from cenote.types import Features, Grid, Modality, resolve_layers

LayerReducer = Callable[[Tensor, Tensor], Tensor]
"""``reduce(hidden (batch, tokens, dim), mask (batch, tokens)) -> (batch, tokens', dim')``, applied layer by layer."""


class Backbone(ABC):
    """A frozen network that turns raw items into :class:`~cenote.types.Features`.

    Always in eval mode, never keeps a graph. Items are PIL images for ``modality == "image"``, strings for
    ``"text"``, :class:`~cenote.types.Audio` for ``"audio"`` and ``torch_geometric.data.Data`` for ``"graph"``.

    Attributes:
        spec: what :func:`cenote.backbones.load_backbone` was given, normalised (``"hf:bert-base-uncased"``).
        module: the network itself.
        modality: ``"image"``, ``"text"``, ``"audio"`` or ``"graph"``.
        dim: width of the hidden states.
        num_layers: number of blocks; hidden states are numbered 0 (embeddings) to ``num_layers``.
        prefix: non-patch tokens in front of every row (0 for decoders).
        grid: patch grid at the backbone's own input size, or ``None``.
        pooled_dim: width of the encoder's own pooled output, or ``None``.
    """

    spec: str
    module: torch.nn.Module
    modality: Modality
    dim: int
    num_layers: int
    prefix: int = 0
    grid: Grid | None = None
    pooled_dim: int | None = None

    @abstractmethod
    def collate(self, items: Sequence[Any]) -> dict[str, Tensor]:
        """Raw items to the tensors that :meth:`__call__` takes (the backbone's own transform or tokenizer)."""

    @abstractmethod
    def encode(self, batch: dict[str, Tensor], layers: tuple[int, ...], reduce: LayerReducer | None) -> Features:
        """One forward pass; see :meth:`__call__`."""

    @abstractmethod
    def transform_id(self) -> str:
        """A string that changes whenever :meth:`collate` would give other tensors for the same items."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A hexadecimal digest of the weights and the configuration."""

    def input_image(self, item: Any) -> Image.Image:
        """An image as the network sees it, after resizing and cropping; for pictures of what a readout looks at."""
        raise TypeError(f"{self.spec} takes {self.modality}s, not images")

    def token_strings(self, item: Any) -> list[str]:
        """What each token of an item stands for: pieces of a text, times of a clip, nodes of a graph."""
        raise TypeError(f"{self.spec} takes {self.modality}s, whose tokens have no names")

    @torch.inference_mode()
    def __call__(
        self,
        batch: dict[str, Tensor],
        layers: str | int | Sequence[int] = "last",
        reduce: LayerReducer | None = None,
    ) -> Features:
        """Hidden states of the chosen layers.

        Args:
            batch: what :meth:`collate` returned.
            layers: ``"last"``, ``"all"``, ``"12,18"`` or numbers.
            reduce: applied to each chosen layer as it comes, so that memory does not grow with tokens times layers; the
                features then hold what it returned, with an all-true mask.
        """
        return self.encode(batch, resolve_layers(layers, self.num_layers), reduce)
