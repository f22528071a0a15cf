"""Poolings by name: ``create_pooling("weighted_layers > efficient_probing", dim=384, num_layers=12)``."""

from __future__ import annotations

import importlib
from typing import Any

from torch import Tensor

from cenote.pooling.base import Pooling
from cenote.pooling.layers import ConcatLayers, LayerReduction, MeanLayers, OneLayer, WeightedLayers
from cenote.specs import accepted, check_options, parse_spec, unknown_name

_FILES = {
    "attentive_statistics": "attentive_statistics:AttentiveStatistics",
    "cls": "cls:Cls",
    "gem": "gem:GeM",
    "ggem": "ggem:GGeM",
    "histograph": "histograph:HistoGraph",
    "l_tdnn": "l_tdnn:LTDNN",
    "last_token": "last_token:LastToken",
    "latent_attention": "latent_attention:LatentAttention",
    "latent_pooling": "multi_layer:LatentPooling",
    "max": "max:Max",
    "mean": "mean:Mean",
    "multi_layer_pooling": "multi_layer:MultiLayerPooling",
    "spp": "spp:SPP",
    "weighted_mean": "weighted_mean:WeightedMean",
    "efficient_probing": "efficient_probing:EfficientProbing",
    "abmilp": "abmilp:AbMILP",
    "aim": "aim:AIM",
    "cae": "cae:CAE",
    "cait": "cait:CaiT",
    "cbam": "cbam:CBAM",
    "clip": "clip:ClipPooling",
    "coca": "coca:CoCa",
    "dinovit": "dinovit:DINOViT",
    "dolg": "dolg:DOLG",
    "esimpool": "esimpool:ESimPool",
    "jepa": "jepa:JEPA",
    "siglip": "siglip:SigLIPPooling",
    "simpool": "simpool:SimPool",
}
_ALIASES = {"ep": "efficient_probing"}
_LAYER_REDUCTIONS: dict[str, type[LayerReduction]] = {
    cls.name: cls for cls in (OneLayer, MeanLayers, WeightedLayers, ConcatLayers)
}


def list_poolings() -> list[str]:
    """Names that :func:`create_pooling` knows, token reductions only."""
    return sorted(_FILES)


def list_layer_reductions() -> list[str]:
    """Names of the layer reductions that may stand in front of ``>``."""
    return sorted(_LAYER_REDUCTIONS)


def pooling_class(name: str) -> type[Pooling]:
    """The class behind a pooling name or alias; ``ValueError`` with the nearest names if there is none."""
    name = _ALIASES.get(name, name)
    if name not in _FILES:
        raise unknown_name("pooling", name, [*_FILES, *_ALIASES, *_LAYER_REDUCTIONS], list_poolings())
    file, _, attribute = _FILES[name].partition(":")
    return getattr(importlib.import_module(f"cenote.pooling.{file}"), attribute)


class ComposedPooling(Pooling):
    """A layer reduction, then a token reduction."""

    name = "composed"
    layers = "all"

    def __init__(self, reduction: LayerReduction, pooling: Pooling) -> None:
        super().__init__(reduction.dim, pooling.out_dim)
        self.reduction, self.pooling = reduction, pooling
        self.attends = pooling.attends  # type: ignore[misc]
        self.permutation_invariant = pooling.permutation_invariant  # type: ignore[misc]
        self.paper = pooling.paper  # type: ignore[misc]
        self.query_parameters = tuple(f"pooling.{name}" for name in pooling.query_parameters)  # type: ignore[misc]
        self.no_weight_decay_parameters = tuple(f"pooling.{name}" for name in pooling.no_weight_decay_parameters)  # type: ignore[misc]

    def _pool(self, tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.pooling._pool(self.reduction(tokens), mask)


def create_pooling(spec: str, *, dim: int, **options: Any) -> Pooling:
    """Build a pooling from its name.

    Args:
        spec: a name of :func:`list_poolings`, optionally with options, ``"efficient_probing(num_queries=8)"``,
            optionally behind a layer reduction, ``"weighted_layers > mean"``.
        dim: token width of the backbone.
        **options: options by keyword; each goes to the part of the composition that takes it. ``num_layers`` and
            ``grid`` are offered to every part and may go unused.

    Raises:
        ValueError: unknown name (nearest names suggested), malformed spec, an option that no part takes.
    """
    parts = [parse_spec(part) for part in spec.split(">")]
    if len(parts) > 2:
        raise ValueError(f"a spec is 'pooling' or 'layer_reduction > pooling', got {spec!r}")
    reduction: LayerReduction | None = None
    width, unused = dim, set(options) - {"num_layers", "grid"}
    if len(parts) == 2:
        name, inline = parts[0]
        if name not in _LAYER_REDUCTIONS:
            raise unknown_name("layer reduction", name, _LAYER_REDUCTIONS)
        reduction_class = _LAYER_REDUCTIONS[name]
        if "num_layers" not in options | inline:
            raise ValueError(f"{name} needs num_layers")
        chosen = accepted(reduction_class, options)
        unused -= set(chosen)
        reduction = reduction_class(dim, **{**chosen, **inline})
        width = reduction.out_dim
    name, inline = parts[-1]
    cls = pooling_class(name)
    chosen = accepted(cls, options)
    unused -= set(chosen)
    if unused:
        raise ValueError(f"no part of {spec!r} takes the option(s) {', '.join(sorted(unused))}")
    check_options(name, cls, inline)
    pooling = cls(width, **{**chosen, **inline})
    if reduction is None:
        return pooling
    if pooling.layers != "last":
        raise ValueError(f"{name} reads all layers itself, so no layer reduction can stand in front of it")
    return ComposedPooling(reduction, pooling)
