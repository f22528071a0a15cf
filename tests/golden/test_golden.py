"""Every golden file of GOLDEN_DIR against the library, each output at the file's own tolerance."""

import importlib

import pytest
import torch

from golden.cases import GOLDEN_DIR, read_case


@pytest.mark.parametrize("path", sorted(GOLDEN_DIR.glob("*.safetensors")), ids=lambda path: path.stem)
def test_agrees_with_official_code(path):
    case = read_case(path)
    adapter = importlib.import_module(f"golden.adapters.{case.paper.replace('-', '_')}")
    results = adapter.run(case)
    missing = set(case.outputs) - set(results)
    assert not missing, f"the adapter for {case.paper} ({case.target}) gives no {sorted(missing)}"
    for name, expected in case.outputs.items():
        torch.testing.assert_close(
            results[name].detach().to(expected.dtype),
            expected,
            rtol=case.rtol,
            atol=case.atol,
            msg=lambda m, n=name: f"out.{n}: {m}",
        )


def test_there_are_golden_files():
    assert any(GOLDEN_DIR.glob("*.safetensors")), f"no golden files in {GOLDEN_DIR}"
