"""Reducing layer by layer inside the backbone holds one layer's tokens, however many layers there are."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def benchmark():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        patch.delitem(sys.modules, "common", raising=False)
        spec = importlib.util.spec_from_file_location("streaming", BENCHMARKS / "streaming_reduction.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module


def test_bytes_are_counted_from_making_to_release(benchmark):
    def call():
        a = torch.zeros(1000)  # 4000 bytes
        b = a[:10].add_(1)  # a view, in place: nothing new
        c = a + 1
        del a, b
        return torch.cat([c, c])

    assert benchmark.peak(call) == 4000 + 8000
    assert benchmark.peak(lambda: [torch.zeros(1000).sum() for _ in range(5)]) == 4000 + 5 * 4


def test_memory_does_not_grow_with_tokens_times_layers(benchmark):
    torch.manual_seed(0)
    rows = {(side, layers): benchmark.row(side, layers) for side in (4, 8) for layers in (3, 9)}
    vectors = benchmark.BATCH * benchmark.DIM * 4 / 1e3  # kB of one vector a row
    for (side, layers), row in rows.items():
        tokens = side * side + 1
        assert row["streaming beyond it, kB"] <= 2.1 * layers * vectors  # what is asked for, and its stack
        # At its peak a forward pass stands in a layer, behind which the peer has kept all others.
        assert row["kept beyond it, kB"] >= 0.99 * (layers - 2) * tokens * vectors
    assert rows[8, 9]["streaming beyond it, kB"] == pytest.approx(
        rows[4, 9]["streaming beyond it, kB"], abs=2 * vectors
    )
