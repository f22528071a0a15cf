"""Data sets behind one face; the `datasets` library does the loading."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cenote.data.base import Data, Items, Skipped, Split
    from cenote.data.load import load_data

__all__ = ["Data", "Items", "Skipped", "Split", "load_data"]

_HOMES = {"Data": "base", "Items": "base", "Skipped": "base", "Split": "base", "load_data": "load"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
