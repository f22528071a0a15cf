"""Finished layers of a quantisation that may be interrupted."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from cenote.files import write_whole
from cenote.tuning.rsq_calibration import CalibrationBatch
from cenote.tuning.rsq_importance import Importance
from cenote.tuning.rsq_linear import QuantizedLinear, linears_from_tensors, linears_to_tensors


class WorkFolder:
    """One file a layer, valid for one model, one calibration set and one choice of settings.

    Args:
        folder: made if it is not there.
        model: before anything is done to it.
        settings: of the run.
        batches: calibration data.
        rule: of the importance; ready weights are part of the data.

    Raises:
        ValueError: the folder belongs to another run.
    """

    def __init__(
        self,
        folder: str | Path,
        model: Any,
        settings: dict[str, Any],
        batches: list[CalibrationBatch],
        rule: Importance | list[Tensor],
    ) -> None:
        self.folder = Path(folder)
        run = {"settings": settings, "inputs": _digest(model, batches, [] if isinstance(rule, Importance) else rule)}
        text = json.dumps(run, indent=2, sort_keys=True) + "\n"
        record = self.folder / "run.json"
        if record.is_file():
            if record.read_text() != text:
                raise ValueError(
                    f"{self.folder} holds layers of another run (other settings, calibration data or model weights): "
                    "pass the original model and the same settings, or another folder"
                )
        else:
            write_whole(self._made() / record.name, text)

    def read(self, number: int) -> list[QuantizedLinear] | None:
        """The linear layers of a finished decoder layer, or ``None``."""
        path = self._file(number)
        if not path.is_file():
            return None
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return linears_from_tensors(tensors, json.loads(file.metadata()["linears"]))

    def write(self, number: int, linears: list[QuantizedLinear]) -> None:
        """Keep a finished decoder layer."""
        tensors, facts = linears_to_tensors(linears)
        write_whole(self._file(number), save(tensors, {"linears": json.dumps(facts)}))

    def _file(self, number: int) -> Path:
        return self.folder / f"layer_{number:04d}.safetensors"

    def _made(self) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder


def _digest(model: Any, batches: list[CalibrationBatch], ready: list[Tensor]) -> str:
    digest = hashlib.sha256()

    def add(name: str, value: Tensor | None) -> None:
        digest.update(f"{name}:{None if value is None else (value.dtype, tuple(value.shape))}\n".encode())
        if value is not None:
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)

    for name, value in model.state_dict().items():
        add(name, value)
    for batch in batches:
        add("ids", batch.ids)
        add("mask", batch.mask)
    for part in ready:
        add("importance", part)
    return digest.hexdigest()
