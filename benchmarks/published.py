"""The default grid's readouts as their papers' code computes them, with weights that ours can take over.

The poolings in the published order of operations are those that the tests hold ours against.
"""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cenote.pooling import Pooling
from cenote.pooling.layers import WeightedLayers
from cenote.pooling.registry import pooling_class
from cenote.probe.plan import Candidate

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from reference import latent_heads
from reference.attentive import REFERENCES, fill

# What the official code calls our options.
WIDTH = {
    "cait": "embed_dim",
    "jepa": "embed_dim",
    "clip": "in_features",
    "siglip": "in_features",
    "cbam": "channels",
    "dinovit": "d_model",
    "dolg": "in_c",
}
LATENT = ("latent_attention", "latent_pooling", "multi_layer_pooling")


class LatentHead(nn.Module):
    """One of the heads with learned latents, on parameters in the official key names."""

    def __init__(
        self, name: str, dim: int, num_latents: int, num_heads: int, head_dim: int, num_layers: int, seed: int
    ) -> None:
        super().__init__()
        self.name, self.heads = name, num_heads
        state = latent_heads.random_state(dim, num_latents, num_heads, head_dim, seed=seed)
        if name == "multi_layer_pooling":
            state["pos_emb.weight"] = torch.randn(num_layers, dim, generator=torch.Generator().manual_seed(seed))
        self.keys = list(state)
        self.weights = nn.ParameterList(state.values())

    def official(self) -> dict[str, Tensor]:
        """The state dict in the official key names."""
        return dict(zip(self.keys, self.weights, strict=True))

    def forward(self, x: Tensor) -> Tensor:
        state = self.official()
        if self.name == "latent_attention":
            return latent_heads.latent_attention(state, x, x.new_ones(x.shape[:2], dtype=torch.bool), self.heads, False)
        if self.name == "multi_layer_pooling":
            x = x.mean(dim=2) + state["pos_emb.weight"]
        return latent_heads.latent_pooling(state, x, self.heads, normalize=False)

    def queries(self) -> list[nn.Parameter]:
        """The learned queries: the latents, in the heads that read with them."""
        return [] if self.name == "latent_attention" else [self.weights[0]]


class Attentive(nn.Module):
    """An attentive pooling, behind a learned weighted sum of layers or not."""

    def __init__(self, name: str, config: dict[str, Any], layers: nn.Module | None, seed: int) -> None:
        super().__init__()
        self.layers, self.pooling = layers, fill(REFERENCES[name](**config), seed)

    def forward(self, x: Tensor) -> Tensor:
        return self.pooling(x if self.layers is None else self.layers(x))[0]

    def queries(self) -> list[nn.Parameter]:
        """The learned queries, by the names that the official codes give them."""
        names = ("cls_token", "latent", "img_queries", "query_token", "query_tokens")
        return [p for name, p in self.pooling.named_parameters() if name in names]


def published(candidate: Candidate, dim: int, seed: int) -> tuple[nn.Module, Pooling] | None:
    """The published form of a candidate and ours with the same weights; ``None`` if there is none."""
    spec, options = candidate.readout, dict(candidate.options)
    name = spec.split(">")[-1].strip()
    if name in LATENT:
        sizes = {key: options[key] for key in ("num_latents", "num_heads", "head_dim")}
        head = LatentHead(name, dim, **sizes, num_layers=len(candidate.layers), seed=seed)
        plain = {"output_normalize": False} if name == "latent_attention" else {"normalize": False}
        heads = {"num_cross_heads" if name == "latent_attention" else "num_heads": options["num_heads"]}
        return head, pooling_class(name).from_reference(head.official(), **heads, **plain)
    if name not in REFERENCES:
        return None
    offered = {**options, WIDTH.get(name, "dim"): dim, "feat_size": options.get("grid")}
    config = {key: value for key, value in offered.items() if key in inspect.signature(REFERENCES[name]).parameters}
    layers = WeightedLayers(dim, len(candidate.layers)) if spec.startswith("weighted_layers") else None
    peer = Attentive(name, {k: v for k, v in config.items() if k != "grid"}, layers, seed)
    inner = pooling_class(name).from_reference(peer.pooling.state_dict(), **config)
    if layers is None:
        return peer, inner
    ours = candidate.make(dim)
    ours.load_state_dict(
        {
            **{f"reduction.{k}": v for k, v in layers.state_dict().items()},
            **{f"pooling.{k}": v for k, v in inner.state_dict().items()},
        }
    )
    return peer, ours
