"""Procedures that change weights: ``from cenote.tuning import quantize_rsq``."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cenote.tuning.rsq import quantize_gptq, quantize_rsq, quantize_rtn
    from cenote.tuning.rsq_calibration import cut_sequences
    from cenote.tuning.rsq_importance import Importance
    from cenote.tuning.rsq_result import RSQResult, load_quantized
    from cenote.tuning.rsq_rotation import rotate_model

_FILES = {
    "Importance": "rsq_importance",
    "RSQResult": "rsq_result",
    "cut_sequences": "rsq_calibration",
    "load_quantized": "rsq_result",
    "quantize_gptq": "rsq",
    "quantize_rsq": "rsq",
    "quantize_rtn": "rsq",
    "rotate_model": "rsq_rotation",
}

__all__ = [
    "Importance",
    "RSQResult",
    "cut_sequences",
    "load_quantized",
    "quantize_gptq",
    "quantize_rsq",
    "quantize_rtn",
    "rotate_model",
]


def __getattr__(name: str) -> Any:
    if name in _FILES:
        return getattr(importlib.import_module(f"cenote.tuning.{_FILES[name]}"), name)
    raise AttributeError(f"module 'cenote.tuning' has no attribute {name!r}")
