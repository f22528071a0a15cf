"""Procedures that read a model: what it knows, what it looks at, and what it has never seen."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cenote.inspection.open_set import CoStarr
    from cenote.inspection.open_set_base import OpenSetScore
    from cenote.inspection.open_set_registry import OPEN_SET_SCORES, create_open_set_score, load_open_set_score

__all__ = ["OPEN_SET_SCORES", "CoStarr", "OpenSetScore", "create_open_set_score", "load_open_set_score"]

_HOMES = {
    "OPEN_SET_SCORES": "open_set_registry",
    "CoStarr": "open_set",
    "OpenSetScore": "open_set_base",
    "create_open_set_score": "open_set_registry",
    "load_open_set_score": "open_set_registry",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
