"""The reference tensors of the source checkout, as findings."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import torch

from cenote.reproductions.base import Finding, finding

TESTS = Path(__file__).resolve().parents[3] / "tests"


def golden_findings(paper: str) -> list[Finding]:
    """One finding on the tensors that official code made for a paper; none outside of a source checkout.

    The value is the largest share of a file's own tolerance that any entry uses, 0 for bit-equal results.
    """
    if not (TESTS / "golden" / "cases.py").is_file():
        return []
    sys.path.insert(0, str(TESTS))
    try:
        cases = importlib.import_module("golden.cases")
        run = importlib.import_module(f"golden.adapters.{paper.replace('-', '_')}").run
        files = [
            case
            for path in sorted(cases.GOLDEN_DIR.glob("*.safetensors"))
            if (case := cases.read_case(path)).paper == paper
        ]
        shares = {case.path.stem: _share(case, run(case)) for case in files}
    finally:
        sys.path.remove(str(TESTS))
    note = "Share of the tolerance by file: " + ", ".join(f"{name} {share:.2g}" for name, share in shares.items()) + "."
    return [
        finding(
            f"All outputs of the reference files ({len(shares)}) are met.",
            "at most 1 (share of each file's tolerance)",
            max(shares.values()),
            lambda share: share <= 1,
            unit="of the tolerance",
            note=note,
        )
    ]


def _share(case, results: dict[str, torch.Tensor]) -> float:
    worst = 0.0
    for name, expected in case.outputs.items():
        wanted = expected.double()
        error = (results[name].detach().to(expected.dtype).double() - wanted).abs()
        allowed = case.atol + case.rtol * wanted.abs()
        share = torch.where(error > 0, error / allowed, torch.zeros_like(error))
        worst = max(worst, float(share.max()))
    return worst
