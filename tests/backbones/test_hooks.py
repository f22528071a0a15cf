import weakref

import pytest
import torch
from torch import nn

from cenote.backbones.collect import collect
from cenote.backbones.hooks import find_blocks, hidden_states


class Stack(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(1, 1) for _ in range(depth + 1))
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_the_blocks_are_found_by_count_and_by_weight():
    stack = Stack(4)
    assert find_blocks(stack, 4) is stack.layers
    assert find_blocks(stack, 5) is stack.heads
    assert find_blocks(stack) is stack.layers
    with pytest.raises(ValueError, match="no list of 7 blocks"):
        find_blocks(stack, 7)


def test_hooks_are_removed_also_after_an_exception():
    stack = Stack(3)
    with pytest.raises(RuntimeError, match="stop"), hidden_states(stack.layers, (0, 1, 2), lambda n, h: None):
        raise RuntimeError("stop")
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in stack.layers)


@pytest.mark.parametrize("depth", [4, 12])
def test_streaming_holds_no_more_hidden_states_whatever_the_depth(depth):
    stack = Stack(depth)
    alive: list[weakref.ref] = []
    most = 0

    def reduce(hidden, mask):
        nonlocal most
        alive.append(weakref.ref(hidden))
        most = max(most, sum(ref() is not None for ref in alive))
        return hidden.mean(1, keepdim=True)

    with torch.inference_mode():
        x = torch.randn(2, 5, 8)
        features = collect(lambda: (stack(x), None), stack.layers, tuple(range(1, depth + 1)), reduce)
    assert len(alive) == depth
    assert most <= 2, "the hidden state at hand and the one the next block still reads"
    assert features.hidden.shape == (2, depth, 1, 8)


def test_order_and_repeats_of_layers():
    stack = Stack(3)
    with torch.inference_mode():
        x = torch.randn(2, 5, 8)
        features = collect(lambda: (stack(x), None), stack.layers, (3, 0, 3), None)
        torch.testing.assert_close(features.hidden[:, 1], x)
        torch.testing.assert_close(features.hidden[:, 0], stack(x))
        torch.testing.assert_close(features.hidden[:, 2], stack(x))
