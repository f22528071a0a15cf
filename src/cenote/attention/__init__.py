"""Recipes that make a transformers model attend differently: sparse, reused, shared, redistributed."""

import importlib
from typing import Any

_PUBLIC = {
    "BlockHeuristic": "block_heuristic",
    "EchoAtt": "echo_att",
    "H2O": "h2o",
    "HyLRA": "hylra",
    "LayerPlan": "plan",
    "PreallocatedLayer": "cache",
    "Quest": "quest",
    "Recipe": "base",
    "RectifiedSpaAttn": "rectified_spaattn",
    "SeerAttention": "seer_attention",
    "SeerDecode": "seer_decode",
    "TidalDecode": "tidal_decode",
    "VisualAttentionRedistribution": "visual_attention_redistribution",
    "Window": "window",
    "create_recipe": "registry",
    "list_recipes": "registry",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"cenote.attention.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module 'cenote.attention' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
