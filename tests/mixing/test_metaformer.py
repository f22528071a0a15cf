"""Patterns of mixers, the block, and the stack."""

import pytest
import torch
from jaxtyping import TypeCheckError

from cenote.mixing import MetaFormer, MetaFormerBlock, MixerContext, create_mixer, expand_pattern, list_mixers
from cenote.mixing.feed_forward import FeedForward
from cenote.mixing.softmax_attention import SoftmaxAttention
from cenote.ops.drop_path import drop_path
from cenote.ops.rotary import real_positions, rotate


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("pattern", "depth", "expected"),
    [
        ("a", 3, "a a a"),
        ("a*2, b", 7, "a a b a a b a"),
        ("a, b(x=(1, 2), y='p, q')*2", 3, "a b(x=(1, 2), y='p, q') b(x=(1, 2), y='p, q')"),
        (["a", "b*2"], 3, "a b b"),
        ("a*11, b", 12, " ".join(["a"] * 11 + ["b"])),
    ],
)
def test_pattern_is_repeated_over_the_layers(pattern, depth, expected):
    assert " ".join(expand_pattern(pattern, depth)) == expected


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("", "one or more"),
        ("a,,b", "one or more"),
        ("a*0", "at least once"),
        ("a*3, b", "names 4 mixers for 3"),
        ([], "one or more"),
    ],
)
def test_bad_patterns_are_refused(pattern, message):
    with pytest.raises(ValueError, match=message):
        expand_pattern(pattern, 3)


def test_names_and_options_are_checked():
    assert "softmax_attention" in list_mixers()
    assert create_mixer("softmax_attention(num_heads=2)", dim=8, defaults={"num_heads": 4, "nothing": 1}).num_heads == 2
    for spec, options, message in (
        ("softmax_atention", {}, "did you mean softmax_attention"),
        ("softmax_attention", {"heads": 2}, r"takes no option\(s\) heads"),
        ("softmax_attention(heads=2)", {}, r"takes no option\(s\) heads"),
        ("softmax_attention(dim=4)", {}, r"takes no option\(s\) dim"),
        ("identity(", {}, "cannot read"),
        ("pool(**{'pool_size': 5})", {}, "cannot read"),
    ):
        with pytest.raises(ValueError, match=message):
            create_mixer(spec, dim=8, **options)


def test_an_unknown_feed_forward_is_refused():
    with pytest.raises((ValueError, TypeCheckError), match="geglu"):
        FeedForward(6, 10, "geglu")


def test_block_is_its_formula():
    block = MetaFormerBlock(create_mixer("identity", dim=6), layer_scale=0.5, mlp_ratio=2.0)
    x = draw(2, 5, 6)
    middle = x + 0.5 * block.norm1(x)
    inner = torch.nn.functional.gelu(block.norm2(middle) @ block.mlp.fc1.weight.T + block.mlp.fc1.bias)
    expected = middle + 0.5 * (inner @ block.mlp.fc2.weight.T + block.mlp.fc2.bias)
    torch.testing.assert_close(block(x), expected)
    bare = MetaFormerBlock(create_mixer("identity", dim=6), norm="none", feed_forward="none", residual=False)
    assert torch.equal(bare(x), x)


def test_swiglu_and_map_layouts():
    gated = FeedForward(6, 10, "swiglu")
    x = draw(2, 5, 6)
    expected = (torch.nn.functional.silu(x @ gated.gate.weight.T) * (x @ gated.fc1.weight.T)) @ gated.fc2.weight.T
    torch.testing.assert_close(gated(x), expected)
    tokens, cells = FeedForward(6, 10), FeedForward(6, 10, layout="map")
    cells.load_state_dict({k: v[..., None, None] if v.ndim == 2 else v for k, v in tokens.state_dict().items()})
    laid = x.transpose(1, 2)[..., None]
    torch.testing.assert_close(cells(laid)[..., 0].transpose(1, 2), tokens(x), rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(cells(laid)[..., 0].transpose(1, 2), tokens(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("norm", ["group", "layer", "batch", "none"])
def test_blocks_on_maps_take_any_mixer(norm):
    block = MetaFormerBlock(create_mixer("softmax_attention", dim=8, num_heads=2), layout="map", norm=norm).eval()
    x = draw(2, 8, 3, 4)
    normed = block.norm1(x).flatten(2).transpose(1, 2)
    middle = x + block.token_mixer(normed).transpose(1, 2).unflatten(2, (3, 4))
    torch.testing.assert_close(block(x), middle + block.mlp(block.norm2(middle)))
    if norm == "group":
        torch.testing.assert_close(block.norm1(x).flatten(1).mean(1), torch.zeros(2), rtol=0, atol=1e-5)


def test_stack_steps_through_a_hybrid():
    torch.manual_seed(0)
    stack = MetaFormer(
        16, 3, "identity*2, softmax_attention(rope_theta=100.0)", causal=True, options={"num_heads": 2}
    ).eval()
    x = draw(2, 9, 16)
    whole = stack(x)
    first, states = stack.chunk(x[:, :4])
    parts = [first]
    for t in range(4, 9):
        told = MixerContext(positions=torch.full((2, 1), t)) if t % 2 else None  # what it works out by itself
        step, states = stack.step(x[:, t], states, told)
        parts.append(step[:, None])
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-5)


def test_stack_offers_what_entered_it():
    seen = []

    class Spy(SoftmaxAttention):
        needs = frozenset({"embeddings"})

        def _mix(self, tokens, mask, context, return_weights):
            seen.append(context.embeddings)
            return super()._mix(tokens, mask, context, return_weights)

    stack = MetaFormer(16, 2, "identity")
    for block in stack.blocks:
        block.token_mixer = Spy(16, 2)
    x = draw(2, 5, 16)
    stack(x)
    assert all(torch.equal(each, x) for each in seen)
    stack(x, None, MixerContext(embeddings=2 * x))
    assert all(torch.equal(each, 2 * x) for each in seen[2:])


def test_drop_path_grows_with_depth_and_keeps_the_mean():
    stack = MetaFormer(8, 5, "identity", drop_path=0.2)
    assert [round(block.drop_rate, 6) for block in stack.blocks] == [0.0, 0.05, 0.1, 0.15, 0.2]
    kept = drop_path(torch.ones(20000, 2), 0.25, training=True)
    assert abs(kept.mean().item() - 1) < 0.03
    assert set(kept.unique().tolist()) == {0.0, float(torch.tensor(1.0) / 0.75)}
    assert bool((kept[:, 0] == kept[:, 1]).all())
    with pytest.raises(ValueError, match="drop_path"):
        MetaFormer(8, 2, "identity", drop_path=1.0)


def test_causal_stacks_refuse_mixers_that_look_ahead():
    with pytest.raises(ValueError, match=r"PoNet see\(s\) later tokens"):
        MetaFormer(16, 2, "softmax_attention, ponet", causal=True, options={"num_heads": 2})
    with pytest.raises(ValueError, match="no recurrent form"):
        MetaFormer(16, 1, "ponet", options={"num_heads": 2}).chunk(draw(1, 3, 16))
    with pytest.raises(ValueError, match="no chunks"):
        create_mixer("softmax_attention", dim=16).chunk(draw(1, 3, 16))


def test_rotary_products_depend_on_the_distance_only():
    q, k = draw(1, 1, 1, 8), draw(1, 1, 1, 8, seed=1)

    def product(i, j):
        return (rotate(q, torch.tensor([[i]])) * rotate(k, torch.tensor([[j]]))).sum()

    torch.testing.assert_close(product(3, 1), product(12, 10), rtol=1e-4, atol=1e-5)
    assert (product(3, 1) - product(3, 2)).abs() > 1e-3
    assert torch.equal(rotate(q, torch.tensor([[0]])), q)
    with pytest.raises(ValueError, match="even"):
        rotate(draw(1, 1, 1, 3), torch.tensor([[0]]))


def test_padding_takes_no_position():
    mask = torch.tensor([[False, True, True, False, True]])
    assert real_positions(mask).tolist() == [[0, 0, 1, 1, 2]]
    assert real_positions(mask, torch.tensor([4])).tolist() == [[4, 4, 5, 5, 6]]


def test_rotary_matches_transformers():
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    config = LlamaConfig(
        hidden_size=16, num_attention_heads=2, rope_parameters={"rope_type": "default", "rope_theta": 500.0}
    )
    x = draw(2, 2, 6, 8)
    positions = torch.arange(6)[None].expand(2, 6)
    cos, sin = LlamaRotaryEmbedding(config)(x, positions)
    expected, _ = apply_rotary_pos_emb(x, x, cos, sin)
    torch.testing.assert_close(rotate(x, positions, 500.0), expected)
