import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cenote.ops.gather_attention import (
    Positions,
    decode_attention,
    decode_logits,
    gather_attention,
    gather_tokens,
    topk_positions,
    weigh_values,
)


def masked_dense(query, key, value, chosen, scale):
    """``softmax`` over all keys, what is not chosen hidden. ``chosen`` has one set a query head."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    logits = (query @ key.transpose(-1, -2) * scale).masked_fill(~chosen.unsqueeze(2), float("-inf"))
    return logits.softmax(-1) @ value


@st.composite
def cases(draw):
    batch, kv_heads, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    keys, head_dim, width = draw(st.integers(1, 23)), draw(st.integers(1, 9)), draw(st.integers(1, 9))
    sets = kv_heads * (groups if draw(st.booleans()) else 1)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    # A cache's view: a buffer with more room than is used, sometimes cut in front too.
    room, front = draw(st.integers(0, 5)), draw(st.integers(0, 2))
    query = torch.randn(batch, kv_heads * groups, 1, head_dim, generator=generator)
    key = torch.randn(batch, kv_heads, front + keys + room, head_dim, generator=generator)[:, :, front : front + keys]
    value = torch.randn(batch, kv_heads, front + keys + room, width, generator=generator)[:, :, front : front + keys]
    chosen = torch.rand(batch, sets, keys, generator=generator) < draw(st.sampled_from([0.1, 0.5, 0.9, 1.0]))
    first = torch.randint(keys, (batch, sets, 1), generator=generator)
    return query, key, value, chosen.scatter(-1, first, True)


@given(cases(), st.sampled_from([None, 0.3]))
@settings(max_examples=60, deadline=None)
def test_equals_masked_dense_attention_for_every_mask(case, scale):
    query, key, value, chosen = case
    got = gather_attention(query, key, value, Positions.from_mask(chosen), scale)
    per_head = chosen.repeat_interleave(query.shape[1] // chosen.shape[1], dim=1)
    expected = masked_dense(query, key, value, per_head, query.shape[-1] ** -0.5 if scale is None else scale)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@given(cases())
@settings(max_examples=40, deadline=None)
def test_positions_and_masks_say_the_same(case):
    chosen = case[3]
    positions = Positions.from_mask(chosen)
    assert torch.equal(positions.to_mask(chosen.shape[-1]), chosen)
    visible = torch.rand(chosen.shape[0], chosen.shape[-1]) < 0.5
    both = positions.with_visible(visible).to_mask(chosen.shape[-1])
    assert torch.equal(both, chosen & visible[:, None])


@given(cases(), st.integers(1, 30), st.booleans(), st.booleans())
@settings(max_examples=60, deadline=None)
def test_topk_takes_the_best_visible_ones_or_all(case, k, hide, by_row):
    scores = torch.rand(case[3].shape)
    batch, sets, keys = scores.shape
    visible = (torch.rand(batch, keys) < 0.5).scatter(1, torch.randint(keys, (batch, 1)), True) if hide else None
    numbers = torch.randint(1, k + 1, (batch,)) if by_row else torch.full((batch,), k)
    got = topk_positions(scores, numbers if by_row else k, visible).to_mask(keys)
    for row in range(batch):
        allowed = torch.arange(keys) if visible is None else visible[row].nonzero().flatten()
        for one in range(sets):
            best = allowed[scores[row, one, allowed].argsort(descending=True)[: int(numbers[row])]]
            assert torch.equal(got[row, one].nonzero().flatten(), best.sort().values)


@given(cases(), st.booleans())
@settings(max_examples=30, deadline=None)
def test_dense_decoding_equals_masked_dense_attention(case, hide):
    query, key, value, _ = case
    batch, heads, keys = query.shape[0], query.shape[1], key.shape[2]
    visible = (torch.rand(batch, keys) < 0.5).scatter(1, torch.randint(keys, (batch, 1)), True) if hide else None
    output, weights = decode_attention(query, key, value, visible, 0.4)
    seen = torch.ones(batch, keys, dtype=torch.bool) if visible is None else visible
    expected = masked_dense(query, key, value, seen[:, None].expand(-1, heads, -1), 0.4)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weights.sum(-1), torch.ones(batch, heads))
    assert not weights.masked_select(~seen[:, None].expand_as(weights)).any()
    torch.testing.assert_close(weigh_values(weights, value), output)
    if visible is None:
        torch.testing.assert_close(decode_logits(query, key, 0.4).softmax(-1), weights)


@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x,
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: x[..., ::2],
        lambda x: x.expand(3, -1, -1, -1),
    ],
)
def test_rows_are_read_whatever_the_layout_of_memory(layout):
    x = layout(torch.randn(1, 2, 9, 6))
    index = torch.randint(9, (x.shape[0], 4, 5))
    expected = x.repeat_interleave(2, dim=1).gather(2, index[..., None].expand(-1, -1, -1, x.shape[-1]))
    assert torch.equal(gather_tokens(x, index), expected)


def test_gradients_reach_the_chosen_rows_only():
    query, key, value = torch.randn(1, 2, 1, 4), torch.randn(1, 2, 6, 4), torch.randn(1, 2, 6, 4)
    leaves = [x.double().requires_grad_() for x in (query, key, value)]
    chosen = torch.tensor([[[1, 0, 1, 0, 0, 1]] * 2]).bool()
    positions = Positions.from_mask(chosen)
    assert torch.autograd.gradcheck(lambda *x: gather_attention(*x, positions, 0.5), leaves, atol=1e-3, eps=1e-3)
    gather_attention(*leaves, positions).sum().backward()
    assert not leaves[2].grad[~chosen].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_like_dense_attention(dtype):
    query, key, value = torch.randn(2, 4, 1, 16), torch.randn(2, 2, 50, 16), torch.randn(2, 2, 50, 16)
    chosen = torch.rand(2, 4, 50) < 0.3
    exact = masked_dense(query, key, value, chosen, 0.25)
    got = gather_attention(*(x.to(dtype) for x in (query, key, value)), Positions.from_mask(chosen))
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), exact, rtol=0.02, atol=0.02)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="at least one position"):
        Positions.from_mask(torch.zeros(1, 2, 3, dtype=torch.bool))
    scores = torch.rand(2, 1, 3)
    for k in (0, torch.tensor([1, 0])):
        with pytest.raises(ValueError, match="at least 1, got 0"):
            topk_positions(scores, k)
    with pytest.raises(ValueError, match="sees no position"):
        topk_positions(scores, 1, torch.tensor([[True, False, False], [False, False, False]]))
    x, index = torch.randn(1, 2, 4, 3), torch.zeros(1, 3, 2, dtype=torch.long)
    with pytest.raises(ValueError, match="3 sets of positions do not fit 2 heads"):
        gather_tokens(x, index)
    with pytest.raises(ValueError, match="2 key and value heads or 6 query heads"):
        gather_attention(torch.randn(1, 6, 1, 3), x, x, Positions(torch.zeros(1, 4, 2, dtype=torch.long)))
