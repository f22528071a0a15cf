"""PoNet against the plain form, its invariances and what it refuses."""

import pytest
import torch

from cenote.mixing import MixerContext, create_mixer
from cenote.mixing.ponet import PoNet, PoNetLRA
from cenote.ops.ponet import fuse_pools, global_aggregation, local_pool
from reference.ponet import ponet

DIM, HEADS = 12, 3


def world(rows=3, tokens=11, side="right"):
    """Tokens, mask, segments and special tokens of rows of different lengths and numbers of segments."""
    x, lengths = torch.randn(rows, tokens, DIM), [tokens, 5, 1]
    mask = torch.stack([torch.arange(tokens) < lengths[row % 3] for row in range(rows)])
    mask = mask.flip(1) if side == "left" else mask
    ids = torch.stack([torch.arange(tokens) // step for step in (4, 2, 1)])
    special = torch.rand(rows, tokens) < 0.3
    return x, mask, ids, special


@pytest.mark.parametrize("guard", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_agrees_with_the_plain_form(guard, side):
    mix = PoNet(DIM, HEADS, guard).double()
    x, mask, ids, special = world(side=side)
    out = mix(x.double(), mask, MixerContext(segment_ids=ids, special_mask=special))
    torch.testing.assert_close(out, ponet(mix, x.double(), mask, ids, special))
    assert not out[~mask].any()


def test_gradients_are_those_of_the_plain_form():
    mix = PoNet(DIM, HEADS).double()
    x, mask, ids, special = world()
    weight = torch.randn(x.shape, dtype=torch.double)
    grads = []
    for run in (lambda y: mix(y, mask, MixerContext(segment_ids=ids, special_mask=special)),
                lambda y: ponet(mix, y, mask, ids, special)):  # fmt: skip
        y = x.double().requires_grad_()
        wanted = [y, *mix.parameters()]
        grads.append(torch.autograd.grad((run(y) * weight).sum(), wanted))
    for ours, plain in zip(*grads, strict=True):
        torch.testing.assert_close(ours, plain)


def test_keys_need_not_be_formed():
    query, x, weight, bias = torch.randn(2, DIM), torch.randn(2, 9, DIM), torch.randn(DIM, DIM), torch.randn(DIM)
    folded = global_aggregation(query, x, HEADS, None, weight, bias)
    formed = global_aggregation(query, torch.nn.functional.linear(x, weight, bias), HEADS)
    torch.testing.assert_close(folded.vector, formed.vector)
    torch.testing.assert_close(folded.weights, formed.weights)


def test_local_pool_is_max_pooling_with_a_window_of_three():
    for tokens in (1, 2, 3, 10):
        x = torch.randn(2, tokens, 4)
        pooled = torch.nn.functional.max_pool1d(x.mT, 3, stride=1, padding=1).mT
        assert torch.equal(local_pool(x), pooled)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side):
    mix = PoNet(DIM, HEADS)
    x, _, ids, special = world(rows=3, tokens=8)
    alone = mix(x, None, MixerContext(segment_ids=ids, special_mask=special))
    extra = torch.full((3, 4, DIM), torch.nan)
    mask = torch.tensor([True] * 8 + [False] * 4).expand(3, -1)
    parts = [(x, extra), (ids, torch.full((3, 4), 11)), (special, torch.ones(3, 4, dtype=torch.bool))]
    if side == "left":
        parts, mask = [(b, a) for a, b in parts], mask.flip(1)
    padded, ids, special = (torch.cat(pair, dim=1) for pair in parts)
    out = mix(padded, mask, MixerContext(segment_ids=ids, special_mask=special))
    torch.testing.assert_close(out[mask].view_as(alone), alone)
    assert not out[~mask].any()


def test_special_tokens_of_padding_cut_no_segment():
    """Also in the middle of a row, where a separator would part what stands on its sides."""
    mix = PoNet(DIM, HEADS)
    x, mask = torch.randn(1, 7, DIM), torch.tensor([[True, True, True, False, True, True, True]])
    special = torch.tensor([[1, 0, 0, 0, 0, 0, 1]], dtype=torch.bool)
    marked = special | ~mask
    out, again = (mix(x, mask, MixerContext(special_mask=each)) for each in (special, marked))
    assert torch.equal(out, again)
    segment = mix.pools(x, mask, MixerContext(special_mask=marked)).segment
    assert torch.equal(segment[:, 2], segment[:, 4])


def test_a_real_token_between_padding_sees_itself():
    mix = PoNet(DIM, HEADS, leak_guard=False)
    x, mask = 50 * torch.randn(1, 3, DIM), torch.tensor([[False, True, False]])
    torch.testing.assert_close(mix(x, mask)[:, 1:2], mix(x[:, 1:2]))
    assert mix(x, mask).abs().max() < 1e5
    assert mix.pools(x, mask).local[:, 1].abs().max() < 1e3


def test_guard_keeps_sentences_apart():
    mix = PoNet(DIM, HEADS)
    special = torch.tensor([[1, 0, 0, 0, 1, 0, 0, 1]], dtype=torch.bool)
    context = MixerContext(special_mask=special)
    x = torch.randn(1, 8, DIM)
    changed = x.clone()
    changed[:, 3] += 3
    before, after = mix.pools(x, None, context), mix.pools(changed, None, context)
    assert torch.equal(before.segment[:, 4:], after.segment[:, 4:])
    assert torch.equal(before.local[:, 4:], after.local[:, 4:])
    assert not torch.equal(before.segment[:, 1], after.segment[:, 1])
    assert not torch.equal(before.overall.vector, after.overall.vector)
    assert not before.segment[special].any()
    assert not before.local[special].any()
    # Without the guard the separator is in the window of its neighbour, and so is a change of it.
    loose = PoNet(DIM, HEADS, leak_guard=False)
    changed = x.clone()
    changed[:, 4] += 3
    assert not torch.equal(loose.pools(x, None, context).local[:, 5], loose.pools(changed, None, context).local[:, 5])
    assert torch.equal(mix.pools(x, None, context).local[:, 5], mix.pools(changed, None, context).local[:, 5])


def test_one_segment_makes_all_alike_and_single_tokens_keep_themselves():
    mix = PoNet(DIM, HEADS)
    x = torch.randn(2, 7, DIM)
    whole = mix.pools(x).segment  # no segments given: one
    assert torch.equal(whole, whole[:, :1].expand_as(whole))
    single = mix.pools(x, None, MixerContext(segment_ids=torch.arange(7).expand(2, -1))).segment
    torch.testing.assert_close(single, mix.dense_segment(x))


def test_segments_default_to_what_special_tokens_cut():
    mix = PoNet(DIM, HEADS)
    x, special = torch.randn(1, 6, DIM), torch.tensor([[1, 0, 0, 1, 0, 1]], dtype=torch.bool)
    given = MixerContext(special_mask=special, segment_ids=torch.tensor([[0, 1, 1, 2, 3, 4]]))
    assert torch.equal(mix(x, None, MixerContext(special_mask=special)), mix(x, None, given))


def test_only_the_global_pooling_is_permutation_equivariant():
    x, order = torch.randn(2, 9, DIM), torch.randperm(9)
    ids = (torch.arange(9) // 3).expand(2, -1)
    for poolings, alike in ((["global"], True), (["segment"], False), (["local"], False)):
        mix = PoNet(DIM, HEADS, poolings=poolings)
        out = mix(x, None, MixerContext(segment_ids=ids))
        shuffled = mix(x[:, order], None, MixerContext(segment_ids=ids))
        assert torch.allclose(shuffled, out[:, order], atol=1e-5) == alike, poolings


def test_a_pooling_left_out_counts_as_zero():
    whole = PoNet(DIM, HEADS)
    x = torch.randn(2, 6, DIM)
    pools = whole.pools(x)
    gate = whole.dense_o(x)
    wanted = {
        ("global", "local"): pools.overall.vector[:, None] * gate + pools.local,
        ("segment", "local"): pools.segment * gate + pools.local,
        ("global", "segment"): (pools.overall.vector[:, None] + pools.segment) * gate,
        ("local",): pools.local,
    }
    for kept, expected in wanted.items():
        part = PoNet(DIM, HEADS, poolings=kept)
        missing, unexpected = part.load_state_dict(whole.state_dict(), strict=False)
        assert not missing
        assert all("dense_" in key for key in unexpected)
        torch.testing.assert_close(part(x), expected)


def test_output_map_comes_last():
    mix = PoNet(DIM, HEADS, output_map=True)
    inner, x = PoNet(DIM, HEADS), torch.randn(2, 6, DIM)
    inner.load_state_dict(mix.state_dict(), strict=False)
    torch.testing.assert_close(mix(x), mix.dense_output(inner(x)))


def test_lra_segments_are_equal_stretches_of_real_tokens():
    mix = create_mixer("ponet_lra", dim=DIM, segment_num=4)
    x, mask = torch.randn(1, 20, DIM), (torch.arange(20) < 13)[None]
    alone = mix(x[:, :13])
    torch.testing.assert_close(mix(x, mask)[:, :13], alone)
    same = create_mixer("ponet", dim=DIM, num_heads=2, leak_guard=False)
    same.load_state_dict(mix.state_dict())
    ids = torch.tensor([[0] * 4 + [1] * 4 + [2] * 4 + [3]])
    torch.testing.assert_close(same(x[:, :13], None, MixerContext(segment_ids=ids)), alone)
    published = PoNetLRA.from_reference(mix.state_dict(), num_head=2, head_dim=DIM // 2, segment_num=4)
    assert not torch.allclose(published(x, mask)[:, :13], alone)


def test_bad_input():
    mix = PoNet(DIM, HEADS)
    x, special = torch.randn(2, 5, DIM), torch.zeros(2, 5, dtype=torch.bool)
    for wrong in (torch.full((2, 5), 5), torch.full((2, 5), -1)):
        with pytest.raises(ValueError, match=r"segment_ids from 0 to 4 \(tokens - 1\)"):
            mix(x, None, MixerContext(segment_ids=wrong))
    with pytest.raises(ValueError, match=r"segment_ids of shape \(2, 5\), got \(2, 4\)"):
        mix(x, None, MixerContext(segment_ids=torch.zeros(2, 4, dtype=torch.long)))
    with pytest.raises(ValueError, match="row"):
        mix(x, special)
    with pytest.raises(ValueError, match="no attention maps"):
        mix(x, return_weights=True)
    with pytest.raises(ValueError, match="not divisible into num_heads=5 heads"):
        PoNet(DIM, 5)
    for wrong in ((), ("global", "global"), ("middle",), "global"):
        with pytest.raises(ValueError, match="poolings must be one or more of"):
            PoNet(DIM, HEADS, poolings=wrong)
    with pytest.raises(ValueError, match="segment_num must be an integer of at least 1, got 0"):
        PoNetLRA(DIM, segment_num=0)
    with pytest.raises(ValueError, match="unknown settings depth"):
        PoNet.from_reference({}, hidden_size=DIM, num_attention_heads=HEADS, depth=2)
    with pytest.raises(ValueError, match="nothing to fuse"):
        fuse_pools(None)


def test_floating_segments_and_masks_are_type_errors():
    from jaxtyping import TypeCheckError

    mix, x = PoNet(DIM, HEADS), torch.randn(2, 5, DIM)
    for field in ("segment_ids", "special_mask"):
        with pytest.raises((TypeError, TypeCheckError)):
            mix(x, None, MixerContext(**{field: torch.zeros(2, 5)}))


def test_there_is_no_causal_form():
    from cenote.mixing import MetaFormer

    with pytest.raises(ValueError, match=r"PoNet see.* later tokens"):
        MetaFormer(24, 2, "ponet", causal=True)
