"""The deconstructed mixers: their mathematics, their states, what they refuse."""

import pytest
import torch

from cenote.mixing import MetaFormer, MixerContext, create_mixer
from cenote.ops.attention_indicators import attention_indicators
from cenote.ops.key_softmax import key_softmax_chunk, key_softmax_weights
from cenote.ops.taylor_attention import (
    num_taylor_features,
    taylor_attention,
    taylor_attention_chunk,
    taylor_features,
    taylor_weights,
)

DIM, HEADS, TOKENS = 24, 4, 19


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def heads(seed, width=6):
    return draw(2, 3, TOKENS, width, seed=seed)


def some_mask():
    mask = torch.ones(2, TOKENS, dtype=torch.bool)
    mask[0, 12:] = False
    mask[1, :3] = False
    mask[1, 8] = False
    return mask


def explicit(weights, value, mask):
    """Row by row: causal weights over the real tokens, normalised."""
    out = torch.zeros_like(value)
    for b in range(value.shape[0]):
        for i in range(TOKENS):
            seen = [j for j in range(i + 1) if mask is None or mask[b, j]]
            if seen:
                row = weights[b, :, i, seen]
                out[b, :, i] = torch.einsum("hj,hjd->hd", row / row.sum(-1, keepdim=True), value[b][:, seen])
    return out


def close(actual, expected, tolerance=1e-10):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("masked", [False, True])
def test_joint_taylor_is_attention_with_a_polynomial_for_the_exponential(masked):
    query, key, value = heads(0), heads(1), heads(2)
    mask = some_mask() if masked else None
    scores = query @ key.transpose(-1, -2) / 6**0.5
    expected = explicit(1 + scores + scores**2 / 2, value, mask)
    close(taylor_attention(query, key, value, mask), expected)
    close(taylor_attention_chunk(query, key, value, None, mask, block=5)[0], expected)


def test_diagonal_taylor_keeps_the_squares_alone():
    query, key, value = heads(0), heads(1), heads(2)
    scaled = query / 6**0.5
    scores = scaled @ key.transpose(-1, -2)
    squares = (scaled[:, :, :, None] * key[:, :, None]).square().sum(-1)
    expected = explicit(1 + scores + squares / 2, value, None)
    close(taylor_attention(query, key, value, form="diagonal"), expected, 1e-8)
    close(taylor_attention_chunk(query, key, value, form="diagonal", block=4)[0], expected, 1e-8)


@pytest.mark.parametrize("form", ["joint", "diagonal"])
def test_features_multiply_to_weights(form):
    x, y = draw(7, 5), draw(7, 5, seed=1)
    products = (taylor_features(x, form) * taylor_features(y, form)).sum(-1)
    second = (x * y).sum(-1) ** 2 if form == "joint" else (x * y).square().sum(-1)
    close(products, 1 + (x * y).sum(-1) + second / 2)
    assert taylor_features(x, form).shape[-1] == num_taylor_features(5, form) == (21 if form == "joint" else 11)


def test_taylor_weights_stay_positive_and_tend_to_the_exponential():
    scores = torch.linspace(-50, 50, 100_001, dtype=torch.float64)
    assert taylor_weights(scores).min() == pytest.approx(0.5)
    query, key, value = heads(0), heads(1), heads(2)
    errors = []
    for scale in (0.1, 0.05):
        softmax = (scale * query @ key.transpose(-1, -2)).masked_fill(
            ~torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril(), float("-inf")
        ).softmax(-1) @ value
        errors.append((taylor_attention(query, key, value, scale=scale) - softmax).abs().max().item())
    assert errors[0] / errors[1] == pytest.approx(8, rel=0.25)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("size", [1.0, 1000.0])
def test_key_softmax_is_a_running_softmax_mean(masked, size):
    logits, value, mask = size * draw(2, 3, TOKENS), heads(2), some_mask() if masked else None
    expected = torch.zeros_like(value)
    for b in range(2):
        for i in range(TOKENS):
            seen = [j for j in range(i + 1) if mask is None or mask[b, j]]
            if seen:
                expected[b, :, i] = torch.einsum("hj,hjd->hd", logits[b, :, seen].softmax(-1), value[b][:, seen])
    mixed, _ = key_softmax_chunk(logits, value, None, mask, block=4)
    close(mixed, expected)
    assert bool(key_softmax_chunk(logits.float(), value.float(), None, mask)[0].isfinite().all())
    real = torch.ones(2, TOKENS, dtype=torch.bool) if mask is None else mask
    moved = (key_softmax_weights(logits, mask) @ value).transpose(1, 2)[real]
    close(moved, expected.transpose(1, 2)[real])


@pytest.mark.parametrize("rule", ["key_softmax", "taylor joint", "taylor diagonal"])
@pytest.mark.parametrize("block", [1, 5, 64])
def test_blocks_and_steps_give_the_same_values_and_gradients(rule, block):
    mask = some_mask()
    query, key, value = (heads(seed).requires_grad_() for seed in range(3))

    def run(cuts, block):
        state, parts = None, []
        for part in cuts:
            real = mask[:, part]
            if rule == "key_softmax":
                logits = (query * key).sum(-1)[:, :, part]
                mixed, state = key_softmax_chunk(logits, value[:, :, part], state, real, block)
            else:
                three = (x[:, :, part] for x in (query, key, value))
                mixed, state = taylor_attention_chunk(*three, state, real, form=rule.split()[1], block=block)
            parts.append(mixed)
        mixed = torch.cat(parts, dim=2)
        return mixed, torch.autograd.grad(mixed.square().sum(), (query, key, value))

    whole, gradients = run([slice(0, TOKENS)], TOKENS)
    for cuts in ([slice(0, TOKENS)], [slice(0, 7), slice(7, TOKENS)], [slice(t, t + 1) for t in range(TOKENS)]):
        mixed, theirs = run(cuts, block)
        close(mixed, whole, 1e-7)
        for one, other in zip(theirs, gradients, strict=True):
            close(one, other, 1e-5)


def test_states_do_not_grow():
    for name in ("key_softmax", "taylor_attention(causal=True)"):
        mixer = create_mixer(name, dim=DIM, num_heads=HEADS)
        _, short = mixer.chunk(torch.randn(2, 3, DIM))
        _, long = mixer.chunk(torch.randn(2, 70, DIM))
        assert [x.shape for x in short] == [x.shape for x in long]


def test_static_maps_depend_on_the_embeddings_alone():
    mixer = create_mixer("static_attention", dim=DIM, num_heads=HEADS, causal=True)
    embeddings = torch.randn(2, 5, DIM)
    context = MixerContext(embeddings=embeddings)
    _, first = mixer(torch.randn(2, 5, DIM), None, context, return_weights=True)
    _, second = mixer(torch.randn(2, 5, DIM), None, context, return_weights=True)
    assert torch.equal(first, second)
    _, other = mixer(torch.randn(2, 5, DIM), None, MixerContext(embeddings=embeddings.flip(0)), return_weights=True)
    torch.testing.assert_close(other, first.flip(0))


def test_static_norm_makes_maps_blind_to_the_size_of_embeddings():
    tokens, embeddings = torch.randn(2, 5, DIM), torch.randn(2, 5, DIM)
    for static_norm in (False, True):
        mixer = create_mixer("static_attention", dim=DIM, num_heads=HEADS, causal=True, static_norm=static_norm)
        maps = [
            mixer(tokens, None, MixerContext(embeddings=size * embeddings), return_weights=True)[1]
            for size in (1.0, 9.0)
        ]
        assert torch.allclose(*maps, atol=1e-4) == static_norm


def test_fixed_maps_depend_on_the_stream_alone_and_follow_it():
    mixer = create_mixer("fixed_attention", dim=DIM, num_heads=HEADS, causal=True, rope_theta=1e4)
    stream = torch.randn(1, 9, DIM)
    context = MixerContext(stream=stream)
    _, first = mixer(torch.randn(1, 5, DIM), None, context, return_weights=True)
    _, second = mixer(torch.randn(3, 7, DIM), None, context, return_weights=True)
    torch.testing.assert_close(second[:1, :, :5, :5], first)
    _, other = mixer(torch.randn(1, 5, DIM), None, MixerContext(stream=stream + 1), return_weights=True)
    assert not torch.allclose(other, first)


def test_on_its_own_stream_fixed_attention_is_softmax_attention():
    mixer = create_mixer("fixed_attention", dim=DIM, num_heads=HEADS, causal=True, rope_theta=1e4)
    softmax = create_mixer("softmax_attention", dim=DIM, num_heads=HEADS, causal=True, rope_theta=1e4)
    softmax.qkv.weight.data = torch.cat([mixer.qk.weight, mixer.value.weight])
    softmax.proj.load_state_dict(mixer.proj.state_dict())
    tokens = torch.randn(2, 6, DIM)
    torch.testing.assert_close(mixer(tokens, None, MixerContext(stream=tokens)), softmax(tokens))


def test_padding_on_either_side_leaves_a_tokens_row_of_the_fixed_map():
    mixer = create_mixer("fixed_attention", dim=DIM, num_heads=HEADS, causal=True, rope_theta=1e4)
    context, tokens = MixerContext(stream=torch.randn(1, 12, DIM)), torch.randn(1, 5, DIM)
    alone = mixer(tokens, None, context)
    for left in (0, 2, 4):
        padded, mask = torch.zeros(1, 9, DIM), torch.zeros(1, 9, dtype=torch.bool)
        padded[:, left : left + 5], mask[:, left : left + 5] = tokens, True
        torch.testing.assert_close(mixer(padded, mask, context)[:, left : left + 5], alone)


@pytest.mark.parametrize("pattern", ["fixed_attention", "fixed_attention, static_attention, softmax_attention"])
def test_a_stack_runs_its_stream_beside_the_tokens(pattern):
    torch.manual_seed(0)
    stack = MetaFormer(DIM, 3, pattern, causal=True, options={"num_heads": HEADS, "rope_theta": 1e4}).eval()
    stream, tokens = torch.randn(1, 8, DIM), torch.randn(2, 8, DIM)
    context = MixerContext(stream=stream)
    mixed = stack(tokens, None, context)
    # On the stream itself the stack is one of ordinary attention, so it must not matter who lends.
    own = stack(stream, None, context)
    torch.testing.assert_close(stack(stream.repeat(2, 1, 1), None, context), own.repeat(2, 1, 1))
    parts, states = [], None
    for t in range(8):
        part, states = stack.chunk(tokens[:, t : t + 1], states, None, context)
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, dim=1), mixed, rtol=1e-4, atol=1e-5)
    stream.requires_grad_()
    stack(tokens, None, MixerContext(stream=stream)).square().sum().backward()
    assert stream.grad.abs().max() > 0


def test_parameters_match_attention():
    names = ("taylor_attention", "key_softmax", "static_attention", "fixed_attention", "token_mlp")
    for dim, rounding in ((48, 0.008), (512, 0.002)):  # half a unit of the inner width
        attention = sum(p.numel() for p in create_mixer("softmax_attention", dim=dim, qkv_bias=True).parameters())
        for name in names:
            count = sum(p.numel() for p in create_mixer(name, dim=dim, qkv_bias=True).parameters())
            assert count == attention or (name == "token_mlp" and abs(count / attention - 1) < rounding), name


def test_no_token_of_the_mlp_sees_another():
    mixer, tokens = create_mixer("token_mlp", dim=DIM), torch.randn(2, 5, DIM)
    changed = tokens.clone()
    changed[:, 2] += 1
    difference = (mixer(changed) - mixer(tokens)).abs().amax(-1)
    assert bool((difference[:, [0, 1, 3, 4]] == 0).all())
    assert bool((difference[:, 2] > 0).all())


def test_a_stack_that_is_not_causal_does_not_make_key_softmax_see_ahead():
    stack = MetaFormer(DIM, 1, "key_softmax", options={"num_heads": HEADS})
    assert stack.blocks[0].token_mixer.causal
    wide = MetaFormer(DIM, 1, "key_softmax(bidirectional=True)", options={"num_heads": HEADS})
    assert not wide.blocks[0].token_mixer.causal
    with pytest.raises(ValueError, match="see"):
        MetaFormer(DIM, 1, "key_softmax(bidirectional=True)", causal=True)


def test_indicators_of_known_maps():
    length = 6
    previous = torch.zeros(1, 1, length, length)
    previous[0, 0, 0, 0] = 1
    previous[0, 0, range(1, length), range(length - 1)] = 1
    sink = torch.zeros(1, 1, length, length)
    sink[..., 0] = 1
    uniform = torch.ones(length, length).tril()
    uniform = (uniform / uniform.sum(-1, keepdim=True))[None, None]
    found = attention_indicators(torch.cat([previous, sink, uniform], dim=1))
    entropy = sum(torch.arange(1, length + 1).log()) / length
    torch.testing.assert_close(found.entropy[0], torch.stack([torch.tensor(0.0), torch.tensor(0.0), entropy]))
    torch.testing.assert_close(found.concentration[0, :2], torch.full((2,), length**0.5))
    torch.testing.assert_close(found.sink[0, :2], torch.tensor([2 / length, 1.0]))
    torch.testing.assert_close(found.local_focus[0, 0], torch.tensor([1 / length, 1.0, 0.0, 0.0]))
    both = torch.cat([previous, sink], dim=1)
    apart = (previous != sink).sum() / 2  # pairs at which one head has 1 and the other 0: standard deviation 1/2
    expected = apart / (length * (length + 1) / 2)
    torch.testing.assert_close(attention_indicators(both).diversity[0], expected)
    padded = torch.zeros(1, 2, length + 3, length + 3)
    padded[..., 2 : length + 2, 2 : length + 2] = both
    padded[..., length + 2, :] = 0.1
    mask = torch.zeros(1, length + 3, dtype=torch.bool)
    mask[:, 2 : length + 2] = True
    for one, other in zip(attention_indicators(padded, mask), attention_indicators(both), strict=True):
        torch.testing.assert_close(one, other)
    with pytest.raises(ValueError, match="at least 1"):
        attention_indicators(both, distances=0)


def test_bad_input_is_refused():
    tokens = torch.randn(2, 5, DIM)
    with pytest.raises(ValueError, match="rows, too few for 5 tokens"):
        create_mixer("fixed_attention", dim=DIM)(tokens, None, MixerContext(stream=torch.randn(1, 4, DIM)))
    with pytest.raises(ValueError, match="expects a stream"):
        create_mixer("fixed_attention", dim=DIM)(tokens, None, MixerContext(stream=torch.randn(3, 5, DIM)))
    behind = MixerContext(stream=torch.randn(1, 6, DIM), positions=torch.arange(2, 7).expand(2, -1))
    with pytest.raises(ValueError, match="6 rows, but positions go from 2 to 6"):
        create_mixer("fixed_attention", dim=DIM)(tokens, None, behind)
    with pytest.raises(ValueError, match="expects embeddings"):
        create_mixer("static_attention", dim=DIM)(tokens, None, MixerContext(embeddings=tokens[:, :4]))
    for name in ("fixed_attention", "static_attention", "taylor_attention", "key_softmax(bidirectional=True)"):
        context = MixerContext(embeddings=tokens, stream=tokens)
        with pytest.raises(ValueError, match="no chunks"):
            create_mixer(name, dim=DIM).chunk(tokens, None, None, context)
    for name in ("fixed_attention", "static_attention", "taylor_attention", "key_softmax"):
        with pytest.raises(ValueError, match="not divisible into heads"):
            create_mixer(name, dim=DIM, num_heads=5)
    with pytest.raises(ValueError, match="hidden must be at least 1"):
        create_mixer("token_mlp", dim=DIM, hidden=0)
    for chunk in (
        lambda: key_softmax_chunk(draw(1, 1, 2), draw(1, 1, 2, 3), block=0),
        lambda: taylor_attention_chunk(heads(0), heads(1), heads(2), block=0),
    ):
        with pytest.raises(ValueError, match="at least one token"):
            chunk()
