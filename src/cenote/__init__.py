"""cenote: from a pretrained network's tokens to the answer a user needs.

Rooms are imported when first touched, so that ``import cenote`` does not import torch.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_ROOMS = (
    "attention",
    "backbones",
    "catalog",
    "compress",
    "data",
    "inspection",
    "integrations",
    "mixing",
    "ops",
    "pooling",
    "probe",
    "report",
    "reproductions",
    "tuning",
    "types",
    "worlds",
)

__all__ = ["__version__", *_ROOMS]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"cenote.{name}")
    raise AttributeError(f"module 'cenote' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
