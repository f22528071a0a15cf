"""What every registered pooling must do: a new method is tested the moment it has a name in the registry."""

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cenote.pooling.registry import pooling_class
from properties.options import DIM, GRID, LAYERS, OWN_KEY, SPECS, UNNORMALISED, base_name, make

CELLS = GRID[0] * GRID[1]
every_pooling = pytest.mark.parametrize("spec", SPECS)


def build(spec, seed=0):
    """A pooling in eval mode, no parameter at a special value, with batch statistics of some data where it has them."""
    torch.manual_seed(seed)
    pool = make(spec)
    with torch.no_grad():
        for parameter in pool.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        for _ in range(3):
            pool.train()(items(pool, [CELLS] * 4, seed=7)[0])
    return pool.eval()


def grid_bound(pool):
    """Whether the number of real tokens is fixed by the grid."""
    return "grid" in inspect.signature(type(getattr(pool, "pooling", pool))).parameters


def items(pool, counts, pads=None, garbage=0.0, seed=0, scale=1.0):
    """Tokens with ``counts[b]`` real ones in row b, ``pads[b]`` tokens of garbage before and after, and their mask."""
    generator = torch.Generator().manual_seed(seed)
    pads = pads or [(0, max(counts) - count) for count in counts]
    width = max(count + left + right for count, (left, right) in zip(counts, pads, strict=True))
    axes = (LAYERS,) if pool.layers == "all" else ()
    tokens, mask = (
        torch.full((len(counts), *axes, width, DIM), garbage),
        torch.zeros(len(counts), width, dtype=torch.bool),
    )
    for b, (count, (left, _)) in enumerate(zip(counts, pads, strict=True)):
        tokens[b, ..., left : left + count, :] = scale * torch.randn(*axes, count, DIM, generator=generator)
        mask[b, left : left + count] = True
    return tokens, mask


def some_counts(pool):
    return [CELLS] * 3 if grid_bound(pool) else [5, CELLS, 1]


def close(actual, expected, rtol=1e-4, atol=1e-4):
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


@every_pooling
def test_vector_has_the_stated_width_and_one_row_an_item(spec):
    pool = build(spec)
    tokens, _ = items(pool, [CELLS] * 3)
    vector = pool(tokens)
    assert vector.shape == (3, pool.out_dim)
    assert vector.dtype == torch.float32
    close(pool(tokens[:1]), vector[:1])
    close(pool(tokens, torch.ones(3, CELLS, dtype=torch.bool)), vector)


pads = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=3, max_size=3)


@every_pooling
@settings(deadline=None, max_examples=8, derandomize=True)
@given(pads=pads, garbage=st.sampled_from([0.0, -30.0, 1e4]))
def test_an_item_alone_equals_the_same_item_padded_in_a_batch(spec, pads, garbage):
    pool = build(spec)
    counts = some_counts(pool)
    tokens, mask = items(pool, counts, pads, garbage)
    with torch.no_grad():
        batch = pool(tokens, mask)
        alone = torch.cat([pool(tokens[b : b + 1, ..., mask[b], :]) for b in range(3)])
    close(batch, alone)


@every_pooling
def test_padding_does_not_reach_batch_statistics(spec):
    pool = build(spec).train()
    counts, state = some_counts(pool), {k: v.clone() for k, v in pool.state_dict().items()}
    results = []
    for pads, garbage in (((0, 3), 0.0), ((4, 1), 1e4)):
        pool.load_state_dict(state)
        results.append(
            (pool(*items(pool, counts, [pads] * 3, garbage)), {k: v.clone() for k, v in pool.state_dict().items()})
        )
    (vector, after), (other, other_after) = results
    close(other, vector)
    close(other_after, after)


@every_pooling
def test_token_order_matters_where_it_is_said_to(spec):
    pool = build(spec)
    tokens, _ = items(pool, [CELLS] * 2)
    order = torch.roll(torch.randperm(CELLS, generator=torch.Generator().manual_seed(1)), 1)
    vector, permuted = pool(tokens), pool(tokens[..., order, :])
    if pool.permutation_invariant:
        close(permuted, vector)
    else:
        assert (permuted - vector).abs().max() > 1e-3


@every_pooling
@pytest.mark.parametrize("training", [False, True])
def test_gradients_are_finite_and_padding_gets_none(spec, training):
    pool = build(spec).train(training)
    tokens, mask = items(pool, some_counts(pool), [(1, 2), (0, 4), (3, 0)], garbage=3.0)
    tokens.requires_grad_()
    pool(tokens, mask).square().sum().backward()
    for name, parameter in pool.named_parameters():
        assert parameter.grad is None or bool(parameter.grad.isfinite().all()), name
    assert bool(tokens.grad.isfinite().all())
    assert tokens.grad.abs().max() > 0
    per_token = tokens.grad.abs().amax(-1)
    padding = ~(mask.unsqueeze(1).expand_as(per_token) if per_token.ndim == 3 else mask)
    assert bool((per_token[padding] == 0).all())


def distance(vector, reference):
    return ((vector.float() - reference).norm() / reference.norm()).item()


@every_pooling
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 3e-2), (torch.float16, 5e-3)])
def test_half_precision(spec, dtype, tolerance):
    pool = build(spec)
    tokens, mask = items(pool, some_counts(pool), [(1, 2), (0, 4), (3, 0)])
    with torch.no_grad():
        reference = pool(tokens, mask)
        with torch.autocast("cpu", dtype=dtype):
            assert distance(pool(tokens, mask), reference) < tolerance
            assert bool(pool(300 * tokens, mask).isfinite().all())
        narrow = build(spec).to(dtype)(tokens.to(dtype), mask)
    assert narrow.dtype == dtype
    assert distance(narrow, reference) < 2 * tolerance


@every_pooling
def test_state_dict_round_trip(spec):
    pool, other = build(spec, seed=0), build(spec, seed=1)
    tokens, mask = items(pool, some_counts(pool))
    if list(pool.parameters()):
        assert not torch.equal(other(tokens, mask), pool(tokens, mask))
    other.load_state_dict(pool.state_dict())
    assert torch.equal(other(tokens, mask), pool(tokens, mask))


@every_pooling
def test_weights_are_a_distribution_over_real_tokens(spec):
    pool = build(spec)
    tokens, mask = items(pool, some_counts(pool), [(1, 2), (0, 4), (3, 0)], garbage=3.0)
    if not pool.attends:
        with pytest.raises(ValueError, match="does not attend"):
            pool(tokens, mask, return_weights=True)
        return
    vector, weights = pool(tokens, mask, return_weights=True)
    assert torch.equal(vector, pool(tokens, mask))
    assert weights.ndim == 3
    assert (weights.shape[0], weights.shape[2]) == tuple(mask.shape)
    assert bool((weights >= 0).all())
    assert bool((weights.masked_select(~mask.unsqueeze(1)) == 0).all())
    total = weights.sum(-1)
    if base_name(spec) in OWN_KEY:
        assert bool((total < 1).all())
    elif base_name(spec) not in UNNORMALISED:
        close(total, torch.ones_like(total))


@every_pooling
def test_bad_input_is_refused(spec):
    pool = build(spec)
    tokens, mask = items(pool, [CELLS] * 2)
    kind = "ComposedPooling" if ">" in spec else pooling_class(base_name(spec)).__name__
    empty = mask.clone()
    empty[1] = False
    for bad, bad_mask, error, message in (
        (tokens[..., :-1], mask, ValueError, f"{kind} was built for dim={DIM}, got tokens of width {DIM - 1}"),
        (tokens[0], mask, ValueError, f"{kind} expects tokens \\("),
        (tokens.unsqueeze(0), mask, ValueError, f"{kind} expects tokens \\("),
        (tokens[..., :0, :], None, ValueError, f"{kind} needs at least one token"),
        (tokens.long(), mask, TypeError, f"{kind} expects floating-point tokens, got torch.int64"),
        (tokens, mask.float(), TypeError, f"{kind} expects a boolean mask"),
        (tokens, mask[:, :-1], ValueError, f"{kind} expects a mask of shape"),
        (tokens, mask[:1], ValueError, f"{kind} expects a mask of shape"),
        (tokens, empty, ValueError, r"row\(s\) \[1\]"),
    ):
        with pytest.raises(error, match=message):
            pool(bad, bad_mask)


@every_pooling
def test_named_parameters_exist(spec):
    pool = make(spec)
    names = {name for name, _ in pool.named_parameters()}
    assert set(pool.query_parameters) <= names
    if pool.no_weight_decay_parameters:
        assert set(pool.no_weight_decay_parameters) & names
