"""The attention diversification loss: values that can be said in advance, and the form that never stores maps."""

import pytest
import torch
from torch.nn import functional as F

from cenote.ops.attention_diversity import (
    QueryKey,
    attention_diversification_loss,
    attention_similarity,
    head_mean_map,
    row_similarity,
)

ADL = attention_diversification_loss


def maps(batch=2, heads=3, tokens=16, sharp=2.0):
    return (sharp * torch.randn(batch, heads, tokens, tokens)).softmax(dim=-1)


def reference(layers, threshold):
    """One item, one layer, one row at a time."""
    values = []
    for layer in layers:
        tokens = layer.shape[-1]
        for item in layer:
            mean_map = item.mean(dim=0)
            mean = mean_map.mean(dim=0)
            mean = mean * (mean > threshold / tokens)
            for row in mean_map:
                row = row * (row > threshold / tokens)
                product = mean.norm() * row.norm()
                values.append((mean @ row / product if product > 0 else mean.sum() * 0) / (len(layer) * tokens))
    return sum(values) / (len(layers) + 1e-6)


def test_agrees_with_the_sum_over_rows_and_its_gradient():
    layers = [maps(tokens=16).requires_grad_(), maps(tokens=9, heads=2).requires_grad_()]
    loss, expected = ADL(layers, 1.3), reference(layers, 1.3)
    torch.testing.assert_close(loss, expected)
    assert 0.05 < loss.item() < 0.95
    for ours, plain in zip(torch.autograd.grad(loss, layers), torch.autograd.grad(expected, layers), strict=True):
        torch.testing.assert_close(ours, plain)


def test_an_item_counts_the_same_alone():
    """The official code squeezes a batch of one away and gives 0."""
    layers = [maps(batch=3, sharp=4.0), maps(batch=3, tokens=9, sharp=4.0)]
    items = ADL(layers, 1.2, reduction="none")
    assert items.max() > 0
    alone = torch.stack([ADL([layer[i : i + 1] for layer in layers], 1.2) for i in range(3)])
    torch.testing.assert_close(items, alone)
    torch.testing.assert_close(ADL(layers, 1.2), items.mean())
    sink = torch.zeros(1, 3, 16, 16)
    sink[..., 4] = 3
    layer = (sink + torch.randn_like(sink)).softmax(dim=-1).requires_grad_()
    assert ADL([layer]).item() > 0.5
    assert torch.autograd.grad(ADL([layer]), layer)[0].abs().max() > 0


def test_values_that_can_be_said_in_advance():
    tokens = 12
    sink = F.one_hot(torch.full((1, 2, tokens), 5), tokens).float()
    assert float(ADL([sink])) == pytest.approx(1, abs=2e-6)
    uniform = torch.full((1, 2, tokens, tokens), 1 / tokens)
    assert float(ADL([uniform])) == 0
    assert float(attention_similarity([uniform])) == pytest.approx(1)
    own = torch.eye(tokens).expand(1, 2, -1, -1)
    assert float(ADL([own])) == 0  # no token receives more than the average
    assert float(attention_similarity([own])) == pytest.approx(tokens**-0.5)
    smaller = torch.eye(4 * tokens).expand(1, 2, -1, -1)
    assert float(attention_similarity([smaller])) == pytest.approx((4 * tokens) ** -0.5)


def test_disjoint_groups_fall_with_their_number():
    """Queries of a group share one key; with g groups of N / g queries the value is 1 / sqrt(g)."""
    values = []
    for groups in (1, 2, 4, 8):
        key = torch.arange(32) // (32 // groups)
        values.append(float(ADL([F.one_hot(key, 32).float().expand(1, 2, -1, -1)])))
    assert values == pytest.approx([1, 2**-0.5, 0.5, 8**-0.5], abs=1e-5)


def test_heads_may_be_permuted_and_values_lie_between_0_and_1():
    for sharp in (0.0, 1.0, 3.0, 20.0):
        layer = maps(batch=4, heads=4, sharp=sharp)
        items = ADL([layer], reduction="none")
        assert items.min() >= 0
        assert items.max() <= 1
        torch.testing.assert_close(ADL([layer[:, torch.randperm(4)]], reduction="none"), items)


def test_gates_keep_values_and_stop_nothing_but_the_comparison():
    mean_map = maps(heads=1).squeeze(1).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda m: row_similarity(m, 1.2), mean_map)


def test_padding_neither_counts_nor_is_counted():
    layer = maps(batch=2, tokens=9, sharp=3.0)
    padded = torch.zeros(2, 3, 12, 12)
    padded[:, :, :9, :9] = layer
    padded[:, :, 9:] = 1 / 12  # what padding asks for
    mask = (torch.arange(12) < 9).expand(2, -1)
    torch.testing.assert_close(ADL([padded], mask=mask), ADL([layer]))
    torch.testing.assert_close(attention_similarity([padded], mask=mask), attention_similarity([layer]))


@pytest.mark.parametrize("block", [1, 5, 16, 64])
@pytest.mark.parametrize("bias_shape", [None, (16, 16), (2, 1, 1, 16), (1, 3, 16, 16)])
def test_streamed_mean_map_and_gradients(block, bias_shape):
    query, key = (torch.randn(2, 3, 16, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    bias = None if bias_shape is None else torch.randn(bias_shape, dtype=torch.float64, requires_grad=True)
    inputs = [each for each in (query, key, bias) if each is not None]
    logits = query @ key.transpose(-1, -2) * 0.7
    plain = (logits if bias is None else logits + bias).softmax(dim=-1).mean(dim=1)
    ours = head_mean_map(QueryKey(query, key, 0.7, bias), block)
    torch.testing.assert_close(ours, plain)
    weight = torch.randn(2, 16, 16, dtype=torch.float64)
    for a, b in zip(
        torch.autograd.grad((ours * weight).sum(), inputs),
        torch.autograd.grad((plain * weight).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_streaming_equals_maps():
    pairs = [[torch.randn(2, 3, n, 8, requires_grad=True) for _ in range(2)] for n in (150, 20)]
    stored = [(2 * q @ k.transpose(-1, -2)).softmax(dim=-1) for q, k in pairs]
    streamed = [QueryKey(q, k, 2.0) for q, k in pairs]
    torch.testing.assert_close(ADL(streamed), ADL(stored))
    torch.testing.assert_close(attention_similarity(streamed), attention_similarity(stored))
    flat = [each for pair in pairs for each in pair]
    gradients = zip(torch.autograd.grad(ADL(streamed), flat), torch.autograd.grad(ADL(stored), flat), strict=True)
    for ours, plain in gradients:
        torch.testing.assert_close(ours, plain)


def test_streaming_keeps_only_queries_and_keys():
    """What autograd holds on to, and the largest tensor ever made, on the way forward and back."""
    from torch.utils._python_dispatch import TorchDispatchMode

    tokens, heads = 128, 8
    query, key = (torch.randn(1, heads, tokens, 4, requires_grad=True) for _ in range(2))
    kept, largest = {}, 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for each in result if isinstance(result, tuple | list) else [result]:
                if isinstance(each, torch.Tensor):
                    largest = max(largest, each.numel())
            return result

    def pack(tensor):
        kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with Largest():
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = ADL([QueryKey(query, key)], 1.0)
        loss.backward()
    assert sum(kept.values()) == query.numel() + key.numel() < tokens * tokens
    assert largest <= heads * 64 * tokens  # a block of 64 queries, where maps of all heads have 128
    assert query.grad.abs().max() > 0


def test_features_compare_tokens_with_their_mean():
    x = torch.randn(2, 10, 6)
    expected = F.cosine_similarity(x, x.mean(dim=1, keepdim=True), dim=-1).mean()
    torch.testing.assert_close(ADL([x, x], on="features") * (2 + 1e-6) / 2, expected)
    assert float(ADL([torch.ones(2, 10, 6)], on="features")) == pytest.approx(1, abs=2e-6)


def test_half_precision_is_reduced_in_single():
    layer = maps(sharp=3.0)
    rounded = layer.bfloat16()
    assert (rounded.float().sum(dim=-1) - 1).abs().max() > 1e-3  # as far from 1 as rounding takes it, and no error
    assert ADL([rounded]).dtype == torch.float32
    torch.testing.assert_close(ADL([rounded]), ADL([layer]), atol=2e-2, rtol=0)
    with pytest.raises(ValueError, match="rows of an attention map sum to 1"):
        ADL([1.02 * rounded])


def test_bad_input():
    good = maps()
    with pytest.raises(ValueError, match="at least one layer"):
        ADL([])
    with pytest.raises(TypeError, match="attention maps needed: use the eager path"):
        ADL([good, None])
    for threshold in (0, -1, 16, 20.0):
        with pytest.raises(ValueError, match="between 0 and the number of tokens, 16"):
            ADL([good], threshold)
    with pytest.raises(ValueError, match="rows of an attention map sum to 1"):
        ADL([good * 1.01])
    with pytest.raises(ValueError, match="rows of an attention map sum to 1"):
        ADL([torch.randn(1, 2, 4, 4)])
    ADL([good * 1.0005])
    with pytest.raises(ValueError, match="self-attention maps"):
        ADL([good[..., :5]])
    with pytest.raises(ValueError, match="queries and keys"):
        ADL([QueryKey(torch.randn(1, 2, 4, 3), torch.randn(1, 2, 5, 3))])
    with pytest.raises((ValueError, TypeError), match="features"):
        ADL([good], on="values")
    with pytest.raises(ValueError, match="token features"):
        ADL([good], on="features")
