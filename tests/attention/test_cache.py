import copy
import gc
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from attention_hosts import decoder, padded
from cenote.attention import PreallocatedLayer
from cenote.attention.host import cache_argument, give_cache_layers


def tokens(count, batch=2, heads=2, dim=3):
    return torch.randn(batch, heads, count, dim)


def both(layers, operation):
    """Do it to each layer and compare what they hold."""
    for layer in layers:
        operation(layer)
    ours, theirs = layers
    assert ours.get_seq_length() == theirs.get_seq_length()
    assert ours.get_mask_sizes(3) == theirs.get_mask_sizes(3)
    if theirs.get_seq_length():
        assert torch.equal(ours.keys, theirs.keys)
        assert torch.equal(ours.values, theirs.values)


OPERATIONS = st.one_of(
    st.tuples(st.just("update"), st.integers(1, 90)),
    st.tuples(st.just("crop"), st.integers(0, 40)),
    st.tuples(st.sampled_from(["reorder", "select", "repeat", "pick"]), st.integers(0, 2**16)),
    st.tuples(st.sampled_from(["evict", "evict in steps", "replace", "reset"]), st.just(0)),
)


@given(st.lists(OPERATIONS, min_size=1, max_size=14), st.sampled_from([0, 7, 200]))
@settings(max_examples=80, deadline=None)
def test_equals_a_growing_layer_in_every_operation(operations, capacity):
    layers = (PreallocatedLayer(capacity=capacity), DynamicLayer())
    for name, number in [("update", 5), *operations, ("update", 1)]:
        length = layers[1].get_seq_length()
        batch = layers[1].keys.shape[0] if layers[1].is_initialized else 2
        if name == "update":
            new = tokens(number, batch), tokens(number, batch)
            returned = [layer.update(*new) for layer in layers]
            for ours, theirs in zip(*returned, strict=True):
                assert torch.equal(ours, theirs)
            both(layers, lambda layer: None)
        elif name == "crop":
            count = min(number, length)
            both(layers, lambda layer, count=count: layer.crop(-count))
        elif name in ("reorder", "select", "pick"):
            generator = torch.Generator().manual_seed(number)
            if name == "pick":
                rows = torch.rand(batch, generator=generator).argsort() < max(1, batch - 1)
            else:
                rows = torch.randint(batch, (batch,), generator=generator)
            call = "reorder_cache" if name == "reorder" else "batch_select_indices"
            both(layers, lambda layer, rows=rows, call=call: getattr(layer, call)(rows))
        elif name == "repeat" and batch < 6:
            both(layers, lambda layer: layer.batch_repeat_interleave(2))
        elif name == "reset":
            both(layers, lambda layer: layer.reset())
        elif length:

            def cut(layer, name=name):
                kept = {"evict": slice(1, None), "evict in steps": slice(None, None, 2)}.get(name, slice(None))
                layer.keys, layer.values = (x[:, :, kept] for x in (layer.keys, layer.values))
                if name == "replace":
                    layer.keys, layer.values = layer.keys.clone(), layer.values + 1

            both(layers, cut)


def test_steps_write_in_place_and_full_buffers_grow_by_half():
    layer = PreallocatedLayer()
    layer.update(tokens(100), tokens(100))
    place, moves, rooms = layer.keys.data_ptr(), 0, []
    for _ in range(400):
        layer.update(tokens(1), tokens(1))
        if layer.keys.data_ptr() != place:
            place, moves = layer.keys.data_ptr(), moves + 1
            rooms.append(layer.keys.stride(1) // 3)
    assert rooms == [165 + 82, 248 + 124, 373 + 186]
    assert moves == 3


def test_a_capacity_is_allocated_at_once():
    layer = PreallocatedLayer(capacity=300)
    layer.update(tokens(10), tokens(10))
    place = layer.keys.data_ptr()
    for _ in range(290):
        layer.update(tokens(1), tokens(1))
    assert layer.keys.data_ptr() == place
    assert layer.keys.shape[2] == 300


def test_old_buffers_are_let_go():
    layer = PreallocatedLayer()
    layer.update(tokens(5), tokens(5))
    first = weakref.ref(layer._buffers[0])
    layer.update(tokens(200), tokens(200))
    gc.collect()
    assert first() is None


def test_layers_have_lengths_of_their_own():
    cache = DynamicCache()
    cache.layers = [PreallocatedLayer(), PreallocatedLayer()]
    cache.update(tokens(9), tokens(9), 0)
    cache.update(tokens(4), tokens(4), 1)
    cache.layers[0].keys, cache.layers[0].values = (x[:, :, 6:] for x in (cache.layers[0].keys, cache.layers[0].values))
    cache.update(tokens(1), tokens(1), 0)
    cache.update(tokens(1), tokens(1), 1)
    assert [cache.get_seq_length(layer) for layer in (0, 1)] == [4, 5]


def test_copies_are_independent():
    layer = PreallocatedLayer()
    layer.update(tokens(5), tokens(5))
    twin = copy.deepcopy(layer)
    held = twin.keys.clone()
    layer.crop(-2)
    layer.update(tokens(3), tokens(3))
    assert torch.equal(twin.keys, held)
    new = tokens(1)
    assert torch.equal(twin.update(new, new)[0], torch.cat([held, new], dim=2))


def test_what_was_made_in_inference_mode_can_be_continued_outside():
    layer, first, new = PreallocatedLayer(), tokens(5), tokens(1)
    with torch.inference_mode():
        layer.update(first, first)
    with torch.no_grad():
        assert torch.equal(layer.update(new, new)[0], torch.cat([first, new], dim=2))


def test_gradients_flow_as_through_a_growing_layer():
    first, second = tokens(5).requires_grad_(), tokens(2).requires_grad_()
    found = []
    for layer in (PreallocatedLayer(), DynamicLayer()):
        layer.update(first, first * 2)
        keys, values = layer.update(second, second)
        loss = (keys.square() + values.pow(3)).sum()
        with torch.no_grad():  # a step without gradients may follow before the backward pass
            layer.update(tokens(1), tokens(1))
        found.append(torch.autograd.grad(loss, (first, second)))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)
    layer = PreallocatedLayer()
    layer.update(first, first)
    keys, _ = layer.update(tokens(1), tokens(1))  # what comes has no gradient, what is held has
    loss = keys.square().sum()
    layer.update(tokens(1), tokens(1))
    torch.testing.assert_close(torch.autograd.grad(loss, first)[0], 2 * first)


class State:
    def __init__(self):
        self.calls = []

    def select(self, rows):
        self.calls.append(("select", rows.tolist()))

    def crop(self, length):
        self.calls.append(("crop", length))


def test_state_follows_the_rows_and_tokens():
    layer = PreallocatedLayer()
    layer.update(tokens(5), tokens(5))
    layer.state = state = State()
    layer.reorder_cache(torch.tensor([1, 1]))
    layer.batch_repeat_interleave(2)
    layer.batch_select_indices(torch.tensor([True, False, False, True]))
    layer.crop(-2)
    layer.crop(0)
    expected = [("select", [1, 1]), ("select", [0, 0, 1, 1]), ("select", [0, 3]), ("crop", 3)]
    assert state.calls == expected
    layer.reset()
    assert layer.state is None


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_a_model_says_the_same_with_either_cache(family):
    model = decoder(family)
    ids, mask = padded((20, 12))
    said = []
    for ours in (True, False):
        cache = DynamicCache(config=model.config)
        if ours:
            give_cache_layers(cache, PreallocatedLayer, 4, static=False)
        settings = {"max_new_tokens": 8, "num_beams": 2, "do_sample": False}
        said.append(model.generate(ids, attention_mask=mask, **cache_argument(cache), **settings))
    assert torch.equal(*said)
