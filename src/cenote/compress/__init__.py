"""Measures recipes against the dense model: quality, time, memory."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cenote.compress.result import CompressResult, Row
    from cenote.compress.run import compress
    from cenote.compress.teacher_forced import teacher_forced_logits

__all__ = ["CompressResult", "Row", "compress", "teacher_forced_logits"]

_FILES = {"CompressResult": "result", "Row": "result", "compress": "run", "teacher_forced_logits": "teacher_forced"}


def __getattr__(name: str) -> Any:
    if name not in _FILES:
        raise AttributeError(f"module 'cenote.compress' has no attribute {name!r}")
    return getattr(importlib.import_module(f"cenote.compress.{_FILES[name]}"), name)
