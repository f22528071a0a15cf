"""Every registered pooling under torch.compile and torch.export: one graph, the same numbers.

Runs with ``CENOTE_TYPECHECK=0``: the run-time checks of annotations cannot be traced.
"""

import pytest
import torch

from properties.options import DIM, GRID, LAYERS, SPECS, make

pytestmark = pytest.mark.compiled
CELLS = GRID[0] * GRID[1]
every_pooling = pytest.mark.parametrize("spec", SPECS)


def build(spec, batch=3):
    torch.manual_seed(0)
    pool = make(spec).eval()
    axes = (LAYERS,) if pool.layers == "all" else ()
    tokens = torch.randn(batch, *axes, CELLS + 3, DIM)
    mask = torch.zeros(batch, CELLS + 3, dtype=torch.bool)
    for b in range(batch):
        mask[b, b % 3 : b % 3 + CELLS] = True
    return pool, tokens, mask


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@every_pooling
def test_compiled_in_one_graph_equals_eager(spec):
    pool, tokens, mask = build(spec)
    torch.compiler.reset()
    compiled = torch.compile(pool, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        close(compiled(tokens, mask), pool(tokens, mask))
        close(compiled(tokens[..., :CELLS, :]), pool(tokens[..., :CELLS, :]))


@every_pooling
def test_exported_for_any_batch_size_equals_eager(spec):
    pool, tokens, mask = build(spec)
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(pool, (tokens, mask), dynamic_shapes=({0: batch}, {0: batch})).module()
    for size in (1, 3, 5):
        _, tokens, mask = build(spec, size)
        with torch.no_grad():
            close(exported(tokens, mask), pool(tokens, mask))
