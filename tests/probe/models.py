"""Small readouts with generic weights, and a backbone for them that looks at real images or strings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from cenote.backbones.base import Backbone
from cenote.probe.readout import Readout, ReadoutConfig
from cenote.types import Features, Grid


class PatchBackbone(Backbone):
    """Brightness of the four quarters of an image, or lengths of the words of a text, through two fixed linear
    blocks.
    """

    dim, num_layers, prefix = 4, 2, 1

    def __init__(self, modality: str = "image", weights: int = 0) -> None:
        self.modality, self.spec, self.weights = modality, f"fake:{modality}", weights  # type: ignore[assignment]
        self.grid = Grid(2, 2) if modality == "image" else None
        self.pooled_dim = 4
        self.module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).eval()
        generator = torch.Generator().manual_seed(weights)
        for parameter in self.module.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)
        self.seen: list[int] = []

    def collate(self, items: Sequence[Any]) -> dict[str, torch.Tensor]:
        self.seen.append(len(items))
        if self.modality == "image":
            values = [self._quarters(item) for item in items]
        else:
            values = [torch.tensor([float(len(word)) for word in item.split()]) for item in items]
        tokens = nn.utils.rnn.pad_sequence([v[:, None] * torch.ones(4) / 8 for v in values], batch_first=True)
        mask = torch.tensor([[k < len(v) for k in range(tokens.shape[1])] for v in values])
        return {"tokens": tokens, "mask": mask}

    @staticmethod
    def _quarters(image: Any) -> torch.Tensor:
        pixels = torch.from_numpy(np.asarray(image.convert("L").resize((2, 2)), dtype=np.float32)).flatten() / 32
        return torch.cat([pixels.mean()[None], pixels])

    def encode(self, batch, layers, reduce):
        states, hidden = [batch["tokens"]], batch["tokens"]
        for block in self.module:
            hidden = torch.tanh(block(hidden))
            states.append(hidden)
        return Features(
            torch.stack([states[n] for n in layers], dim=1),
            batch["mask"],
            layers,
            self.grid,
            self.prefix,
            pooled=hidden[:, 0],
        )

    def transform_id(self) -> str:
        return "quarters"

    def fingerprint(self) -> str:
        return f"{self.weights:064x}"


def make_readout(
    host: Backbone, pooling: str = "efficient_probing(num_queries=2)", seed: int = 0, **changes: Any
) -> Readout:
    """A readout whose every parameter and statistic differs from its default."""
    layers = changes.pop("layers", (host.num_layers,))
    values: dict[str, Any] = {
        "pooling": pooling,
        "dim": host.dim,
        "layers": layers,
        "tokens": "patches",
        "task": "classification",
        "outputs": 3,
        "backbone": host.spec,
        "backbone_fingerprint": host.fingerprint(),
        "grid": host.grid,
        "classes": ("cat", "dog", "cow"),
    }
    readout = Readout(ReadoutConfig(**{**values, **changes}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in readout.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        readout.norm.running_mean.copy_(0.3 * torch.randn(readout.norm.num_features, generator=generator))
        readout.norm.running_var.copy_(0.5 + torch.rand(readout.norm.num_features, generator=generator))
    return readout
