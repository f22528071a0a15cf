"""What a run's settings record, whichever the task: everything that determines its numbers, ready for JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from cenote.backbones.base import Backbone


def backbone_settings(backbone: Backbone, options: dict[str, Any] | None) -> dict[str, Any]:
    """The backbone, how it was loaded (not where it runs or which revision) and its weights."""
    chosen = {k: v for k, v in (options or {}).items() if k not in ("device", "device_map", "revision")}
    return {
        "backbone": backbone.spec,
        "backbone_options": {
            k: v if isinstance(v, bool | int | float | str | None) else str(v) for k, v in chosen.items()
        },
        "backbone_fingerprint": backbone.fingerprint(),
    }


def grid_settings(
    readouts: str | Sequence[str],
    wanted: Sequence[int],
    stored: Sequence[int],
    tokens: str | Sequence[str],
    lrs: Sequence[float] | None,
    query_factors: Sequence[float] | None,
    seeds: int,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """What is compared: readouts, layers, tokens, rates and seeds."""
    return {
        "readouts": listed(readouts),
        "layers": list(wanted),
        "stored_layers": list(stored),
        "tokens": listed(tokens),
        "lrs": listed(lrs),
        "query_factors": listed(query_factors),
        "seeds": seeds,
        "dtype": str(dtype).removeprefix("torch."),
    }


def listed(value: Any) -> Any:
    """A sequence as a list; names and ``None`` as they are."""
    return value if value is None or isinstance(value, str) else list(value)
