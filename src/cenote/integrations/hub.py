"""A pooling as a model of the Hugging Face hub."""

from __future__ import annotations

from typing import Any

from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from cenote.pooling import create_pooling


class HubPooling(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="cenote",
    tags=["pooling"],
    pipeline_tag="feature-extraction",
):
    """Any pooling with ``save_pretrained``, ``from_pretrained`` and ``push_to_hub`` of ``PyTorchModelHubMixin``.

    What rebuilds it is in ``config.json`` (the spec and its options), the weights in ``model.safetensors``. A readout
    that a probe has trained has the same three methods with its head and its backbone recorded:
    :class:`cenote.probe.Readout`.

    Args:
        spec: as :func:`cenote.pooling.create_pooling` reads it.
        dim: token width.
        options: of the pooling, JSON-able.

    Raises:
        ValueError: as :func:`cenote.pooling.create_pooling` does.
    """

    def __init__(self, spec: str, dim: int, options: dict[str, Any] | None = None) -> None:
        super().__init__()
        chosen = {key: tuple(v) if isinstance(v, list) else v for key, v in (options or {}).items()}
        self.pooling = create_pooling(spec, dim=dim, **chosen)
        self.out_dim = self.pooling.out_dim

    def forward(self, tokens: Tensor, mask: Tensor | None = None, return_weights: bool = False) -> Any:
        """As :meth:`cenote.pooling.Pooling.forward`."""
        return self.pooling(tokens, mask, return_weights=return_weights)
