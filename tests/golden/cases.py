"""Golden files: inputs, weights in official key names and outputs of the papers' official code."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

GOLDEN_DIR = Path(os.environ.get("GOLDEN_DIR", Path(__file__).parent / "data"))


@dataclass(frozen=True)
class Case:
    """One golden file, prefixes stripped: ``inputs`` (``in.*``), ``state`` (``state.*``), ``outputs`` (``out.*``)."""

    path: Path
    paper: str
    case: str
    target: str
    config: dict
    rtol: float
    atol: float
    inputs: dict[str, Tensor]
    state: dict[str, Tensor]
    outputs: dict[str, Tensor]


def read_case(path: Path) -> Case:
    with safe_open(path, framework="pt") as file:
        meta = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118

    def part(prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}

    return Case(
        path=path,
        paper=meta["paper"],
        case=meta["case"],
        target=meta["target"],
        config=json.loads(meta["config"]),
        rtol=float(meta["rtol"]),
        atol=float(meta["atol"]),
        inputs=part("in."),
        state=part("state."),
        outputs=part("out."),
    )
