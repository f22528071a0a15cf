"""Every registered mixer under torch.compile and torch.export: one graph, the same numbers.

Runs with ``CENOTE_TYPECHECK=0``: the run-time checks of annotations cannot be traced.
"""

import pytest
import torch
from torch import nn

from properties.mixer_options import DIM, GRID, SPECS, context_for, make

pytestmark = pytest.mark.compiled
CELLS = GRID[0] * GRID[1]
every_mixer = pytest.mark.parametrize("spec", SPECS)


class Alone(nn.Module):
    """A mixer with its context bound, so that tensors are all that goes in."""

    def __init__(self, mixer, context):
        super().__init__()
        self.mixer, self.context = mixer, context

    def forward(self, tokens, mask=None):
        return self.mixer(tokens, mask, self.context)


def build(spec, batch=2):
    torch.manual_seed(0)
    mixer = make(spec).eval()
    pad = 0 if "grid" in mixer.needs else 3
    tokens = torch.randn(batch, CELLS + pad, DIM)
    mask = torch.ones(batch, CELLS + pad, dtype=torch.bool)
    mask[1:, CELLS:] = False
    return mixer, tokens, mask


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@every_mixer
def test_compiled_in_one_graph_equals_eager(spec):
    mixer, tokens, mask = build(spec)
    torch.compiler.reset()
    for given in (mask, None):
        alone = Alone(mixer, context_for(mixer, tokens, given))
        compiled = torch.compile(alone, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            close(compiled(tokens, given), alone(tokens, given))


@every_mixer
def test_compiled_gradients_equal_eager(spec):
    mixer, tokens, mask = build(spec)
    torch.compiler.reset()
    alone = Alone(mixer, context_for(mixer, tokens, mask))
    inputs = [tokens.requires_grad_(), *(p for p in mixer.parameters() if p.requires_grad)]

    def gradients(call):
        return torch.autograd.grad(call(tokens, mask).sin().sum(), inputs, allow_unused=True)

    compiled = torch.compile(alone, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(gradients(compiled), gradients(alone), strict=True):
        if theirs is None:
            assert ours is None
        else:
            close(ours, theirs)


@every_mixer
def test_exported_equals_eager(spec):
    mixer, tokens, mask = build(spec)
    alone = Alone(mixer, context_for(mixer, tokens, mask))
    exported = torch.export.export(alone, (tokens, mask)).module()
    with torch.no_grad():
        close(exported(tokens, mask), alone(tokens, mask))
