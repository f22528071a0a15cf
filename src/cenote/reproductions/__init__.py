"""One file a paper: its claim as a runnable experiment with a verdict. ``reproduce("ggem").verdict``."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cenote.reproductions.run import ReproductionResult, available, reproduce

__all__ = ["ReproductionResult", "available", "reproduce"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from cenote.reproductions import run

        return getattr(run, name)
    raise AttributeError(f"module 'cenote.reproductions' has no attribute {name!r}")
