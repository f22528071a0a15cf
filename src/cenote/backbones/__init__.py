"""Pretrained networks behind one face."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cenote.backbones.base import Backbone, LayerReducer
    from cenote.backbones.load import load_backbone

__all__ = ["Backbone", "LayerReducer", "load_backbone"]

_HOMES = {"Backbone": "base", "LayerReducer": "base", "load_backbone": "load"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
