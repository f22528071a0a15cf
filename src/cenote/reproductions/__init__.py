"""One file a paper: its claim as a runnable experiment with a verdict. ``reproduce("ggem").verdict``."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cenote.reproductions.all import Overview, reproduce_all
    from cenote.reproductions.run import ReproductionResult, available, reproduce

__all__ = ["Overview", "ReproductionResult", "available", "reproduce", "reproduce_all"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        file = "all" if name in ("Overview", "reproduce_all") else "run"
        return getattr(importlib.import_module(f"cenote.reproductions.{file}"), name)
    raise AttributeError(f"module 'cenote.reproductions' has no attribute {name!r}")
