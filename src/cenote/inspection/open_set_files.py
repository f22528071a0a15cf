"""A fitted open-set score as two files: tensors and settings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from cenote.files import write_all

FORMAT, WEIGHTS, CONFIG = 1, "open_set.safetensors", "open_set.json"


def write_score(folder: str | Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Write both files, or none."""
    packed = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    write_all(folder, {WEIGHTS: save(packed), CONFIG: json.dumps({"format": FORMAT, **config}, indent=2) + "\n"})


def read_config(folder: str | Path) -> dict[str, Any]:
    """Method, settings and notes; ``ValueError`` when they are missing or not of this library."""
    try:
        config = json.loads((Path(folder) / CONFIG).read_text())
        if config["format"] != FORMAT:
            raise ValueError(f"it has format {config['format']!r} and this version reads {FORMAT}")
        return {key: config[key] for key in ("method", "settings", "notes")}
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder} holds no open-set score: {error}") from None


def read_tensors(folder: str | Path) -> dict[str, Tensor]:
    """Everything that was fitted; ``ValueError`` when the file is missing or damaged."""
    try:
        return load((Path(folder) / WEIGHTS).read_bytes())
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{folder} holds no readable {WEIGHTS}: {error}") from None
