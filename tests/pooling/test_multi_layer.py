import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cenote.ops.cross_attention import fold_scores, latent_scores, latents_read, value_order
from cenote.pooling import create_pooling
from cenote.pooling.multi_layer import LatentPooling, MultiLayerPooling
from reference.latent_heads import latent_pooling, random_state

SIZES = [
    {"latents": 6, "heads": 3, "head_dim": 10},
    {"latents": 20, "heads": 2, "head_dim": 5},
    {"latents": 1, "heads": 1, "head_dim": 30},
]


def build(latents=6, heads=3, head_dim=10, dim=24, **config):
    state = random_state(dim, latents, heads, head_dim)
    return state, LatentPooling.from_reference(state, num_heads=heads, **{"attend_padding": False, **config}).eval()


def build_multi(latents=6, heads=3, head_dim=10, dim=24, num_layers=4, **config):
    state = random_state(dim, latents, heads, head_dim)
    state["pos_emb.weight"] = torch.randn(num_layers, dim)
    return state, MultiLayerPooling.from_reference(state, num_heads=heads, **config).eval()


def batch(tokens=7, layers=None, dim=24, side="left"):
    torch.manual_seed(1)
    mask = torch.arange(tokens) < torch.tensor([tokens, 1, 4])[:, None]
    shape = (3, tokens, dim) if layers is None else (3, layers, tokens, dim)
    return torch.randn(shape), mask.flip(1) if side == "left" else mask


def last(hidden, mask):
    return torch.stack([h[..., m.nonzero().max(), :] for h, m in zip(hidden, mask, strict=True)])


def first(hidden, mask):
    return torch.stack([h[..., m.nonzero().min(), :] for h, m in zip(hidden, mask, strict=True)])


def flops(call):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("tokens", [1, 7, 60])
def test_latent_pooling_equals_the_published_order(sizes, grad, side, tokens):
    state, pool = build(**sizes)
    x, mask = batch(tokens, side=side)
    mask[:, 0 if side == "right" else -1] = True
    with torch.set_grad_enabled(grad):
        expected = latent_pooling(state, x, sizes["heads"], mask)
        torch.testing.assert_close(pool(x, mask), expected, rtol=1e-5, atol=1e-5)
        expected = latent_pooling(state, x, sizes["heads"])
        torch.testing.assert_close(pool(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "last", "first"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_multi_layer_pooling_equals_the_published_order(sizes, grad, normalize, reduction, side):
    state, pool = build_multi(**sizes, layer_vector=reduction, normalize=normalize)
    hidden, mask = batch(layers=4, side=side)
    mean = (hidden * mask[:, None, :, None]).sum(2) / mask.sum(1)[:, None, None]
    vectors = {"mean": mean, "last": last(hidden, mask), "first": first(hidden, mask)}[reduction]
    with torch.set_grad_enabled(grad):
        expected = latent_pooling(state, vectors + state["pos_emb.weight"], sizes["heads"], normalize=normalize)
        torch.testing.assert_close(pool(hidden, mask), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(pool.pool_layers(vectors), expected, rtol=1e-5, atol=1e-5)
        streamed = torch.stack([pool.reduce_layer(layer, mask) for layer in hidden.unbind(1)], dim=1)
        torch.testing.assert_close(pool(streamed), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("order", ["project_first", "out_first", "pool_first"])
def test_every_order_of_products_is_the_same_function(order):
    torch.manual_seed(0)
    x, latents, mask = torch.randn(2, 7, 24), torch.randn(5, 3, 10), torch.ones(2, 7, dtype=torch.bool)
    mask[1, 3:] = False
    key, value, out = torch.randn(30, 24), torch.randn(30, 24), torch.randn(24, 30)
    scores = latent_scores(x, latents, key)
    torch.testing.assert_close((x @ fold_scores(latents, key)).view_as(scores), scores, rtol=1e-5, atol=1e-5)
    k, v = ((x @ w.T).view(2, 7, 3, 10) for w in (key, value))
    weights = (torch.einsum("rhe,bnhe->bhrn", latents, k) * 10**-0.5).masked_fill(~mask[:, None, None], -torch.inf)
    expected = torch.einsum("bhrn,bnhe->brhe", weights.softmax(-1), v).flatten(2) @ out.T
    read, attention = latents_read(scores, x, mask, value, out, order)
    torch.testing.assert_close(attention, weights.softmax(-1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(read, expected, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(read / expected.std(), expected / expected.std(), rtol=1e-5, atol=1e-5)


def test_order_of_products_follows_the_count():
    assert value_order(32, 768, 4096, 2048) == "out_first"  # the published multi-layer head
    assert value_order(1024, 64, 512, 256) == "pool_first"
    assert value_order(96, 96, 512, 64) == "project_first"
    assert value_order(None, 96, 512, 64) == value_order(96, 96, 512, 64)


def test_cheapest_order_costs_what_was_counted():
    """d=512, r=96, n=24, h=4, e=256: reading the layer vectors takes fewer operations than in the published order."""
    r, d, h, e, n = 96, 512, 4, 256, 24
    with torch.device("meta"):
        scores, x, wv, wo = torch.empty(1, n, h, r), torch.empty(1, n, d), torch.empty(h * e, d), torch.empty(d, h * e)
        count = {
            order: flops(lambda o=order: latents_read(scores, x, None, wv, wo, o))
            for order in ("project_first", "out_first", "pool_first")
        }
    assert value_order(n, r, d, e) == min(count, key=count.get) == "out_first"
    assert count["out_first"] == 2 * h * (2 * n * d * e + r * n * d)
    assert count["project_first"] == 2 * h * (n * d * e + r * n * e + r * e * d)
    assert count["pool_first"] == 2 * h * (r * n * d + 2 * r * d * e)


def test_queries_are_kept_in_eval_mode():
    _, pool = build()
    x, mask = batch()
    assert flops(lambda: pool(x, mask)) > flops(lambda: pool(x, mask)) == flops(lambda: pool(x, mask))


def test_cost_of_the_layer_head_does_not_depend_on_tokens():
    _, pool = build_multi()
    flops(lambda: pool(torch.randn(2, 4, 3, 24)))
    assert flops(lambda: pool(torch.randn(2, 4, 3, 24))) == flops(lambda: pool(torch.randn(2, 4, 300, 24)))


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("tokens", ["all", "last", "first"])
def test_padding_does_not_matter(side, tokens):
    _, pool = build(tokens=tokens)
    x, _ = batch()
    pad = torch.full((3, 5, 24), float("nan"))
    padded = torch.cat([x, pad] if side == "right" else [pad, x], dim=1)
    torch.testing.assert_close(pool(padded, ~padded.isnan().any(-1)), pool(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("reduction", ["mean", "last", "first"])
def test_padding_does_not_matter_over_layers(side, reduction):
    _, pool = build_multi(layer_vector=reduction)
    hidden, _ = batch(layers=4)
    pad = torch.full((3, 4, 5, 24), float("nan"))
    padded = torch.cat([hidden, pad] if side == "right" else [pad, hidden], dim=2)
    torch.testing.assert_close(pool(padded, ~padded.isnan().any(-1)[:, 0]), pool(hidden), rtol=1e-5, atol=1e-5)


def test_published_leak_of_padding_is_an_option():
    state, pool = build(attend_padding=True)
    x, mask = batch()
    torch.testing.assert_close(pool(x, mask), latent_pooling(state, x, 3), rtol=1e-5, atol=1e-5)
    assert (pool(x, mask) - build()[1](x, mask)).abs().max() > 0.05
    assert LatentPooling.from_reference(state, num_heads=3).attend_padding
    assert not create_pooling("latent_pooling", dim=8).attend_padding


def test_permuting_latents_changes_nothing():
    state, pool = build()
    x, mask = batch()
    state["latents"] = state["latents"].flip(0)
    other = LatentPooling.from_reference(state, num_heads=3, attend_padding=False).eval()
    torch.testing.assert_close(other(x, mask), pool(x, mask), rtol=1e-5, atol=1e-5)


def test_swapping_layers_with_their_vectors_changes_nothing():
    state, pool = build_multi()
    hidden, mask = batch(layers=4)
    order = [2, 1, 0, 3]
    state["pos_emb.weight"] = state["pos_emb.weight"][order]
    other = MultiLayerPooling.from_reference(state, num_heads=3).eval()
    torch.testing.assert_close(other(hidden[:, order], mask), pool(hidden, mask), rtol=1e-5, atol=1e-5)
    assert (pool(hidden[:, order], mask) - pool(hidden, mask)).abs().max() > 1e-3


def test_fewer_layers_by_their_numbers():
    state, pool = build_multi()
    vectors = torch.randn(3, 2, 24)
    expected = latent_pooling(state, vectors + state["pos_emb.weight"][[0, 3]], 3)
    torch.testing.assert_close(pool.pool_layers(vectors, layer_index=[0, 3]), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", ["last", "first"])
def test_one_token_leaves_the_latents_no_say(tokens):
    """All attention is on the token, and the query projection gets no gradient."""
    pool = create_pooling("latent_pooling", dim=24, num_latents=6, tokens=tokens)
    x, mask = batch()
    vector, weights = pool(x, mask, return_weights=True)
    chosen = {"last": last, "first": first}[tokens](torch.eye(7).expand(3, -1, -1), mask)
    torch.testing.assert_close(weights, chosen[:, None].expand(-1, 6, -1))
    vector.sum().backward()
    assert pool.block.query.weight.grad.abs().max() == 0
    # Another query projection gives the same vector.
    with torch.no_grad():
        pool.block.query.weight.normal_()
    torch.testing.assert_close(pool(x, mask), vector)


def test_weights_sum_to_one_over_real_tokens():
    _, pool = build()
    x, mask = batch()
    _, weights = pool(x, mask, return_weights=True)
    assert weights.shape == (3, 6, 7)
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 6))
    assert weights.masked_select(~mask[:, None]).abs().max() == 0


def test_spread_of_the_layer_vectors_at_the_start():
    torch.manual_seed(0)
    wide = create_pooling("multi_layer_pooling", dim=256, num_layers=12)
    narrow = create_pooling("multi_layer_pooling", dim=256, num_layers=12, layer_std=0.02)
    assert wide.layer_vectors.std().item() == pytest.approx(1, rel=0.05)
    assert narrow.layer_vectors.std().item() == pytest.approx(0.02, rel=0.05)

    def alikeness(pool):
        vectors = torch.nn.functional.normalize(pool(torch.randn(6, 12, 5, 256) * 0.02), dim=-1)
        return (vectors @ vectors.T - torch.eye(6)).max()

    assert alikeness(wide) > 0.97 > alikeness(narrow)


def test_published_sizes_and_names():
    d, r, inner, layers = 4096, 768, 32 * 2048, 32
    attend, mlp = "cross_attend_blocks.0.", "cross_attend_blocks.1."
    shapes = {
        "latents": (r, d),
        "pos_emb.weight": (layers, d),
        **{f"{attend}{norm}.{part}": (d,) for norm in ("norm", "norm_context") for part in ("weight", "bias")},
        f"{attend}fn.to_q.weight": (inner, d),
        f"{attend}fn.to_kv.weight": (2 * inner, d),
        f"{attend}fn.to_out.weight": (d, inner),
        f"{mlp}norm.weight": (d,),
        f"{mlp}norm.bias": (d,),
        f"{mlp}fn.net.0.weight": (8 * d, d),
        f"{mlp}fn.net.0.bias": (8 * d,),
        f"{mlp}fn.net.2.weight": (d, 4 * d),
        f"{mlp}fn.net.2.bias": (d,),
    }
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    pool = MultiLayerPooling.from_reference(state, hidden_size=d, num_layers=layers, num_latents=r, dim_head=2048)
    assert sum(p.numel() for p in pool.parameters()) == sum(v.numel() for v in state.values())
    assert pool.pool_layers(torch.empty(2, layers, d, device="meta")).shape == (2, d)
    del state["pos_emb.weight"]
    assert LatentPooling.from_reference(state)(torch.empty(2, 5, d, device="meta")).shape == (2, d)


class TestBadInput:
    def test_wrong_number_of_layers(self):
        pool = create_pooling("multi_layer_pooling", dim=24, num_layers=4)
        with pytest.raises(ValueError, match=r"4 layers .*without the embeddings.*, got 5"):
            pool(torch.randn(2, 5, 3, 24))
        with pytest.raises(ValueError, match="got 3"):
            pool.pool_layers(torch.randn(2, 3, 24))
        with pytest.raises(ValueError, match="4"):
            pool.pool_layers(torch.randn(2, 1, 24), layer_index=[4])
        with pytest.raises(ValueError, match="reads all layers itself"):
            create_pooling("mean_layers > multi_layer_pooling", dim=24, num_layers=4)

    @pytest.mark.parametrize("option", ["num_latents", "num_heads", "head_dim", "ff_mult", "num_layers"])
    def test_sizes_below_one(self, option):
        with pytest.raises(ValueError, match=option):
            create_pooling("multi_layer_pooling", dim=8, **{"num_layers": 2, option: 0})

    def test_unknown_choices(self):
        with pytest.raises((ValueError, TypeError), match="tokens"):
            create_pooling("latent_pooling", dim=8, tokens="eos")
        with pytest.raises((ValueError, TypeError), match="layer_vector"):
            create_pooling("multi_layer_pooling", dim=8, num_layers=2, layer_vector="max")
        with pytest.raises(ValueError, match="layer_std"):
            create_pooling("multi_layer_pooling", dim=8, num_layers=2, layer_std=-1.0)

    def test_row_without_a_real_token_and_wrong_width(self):
        pool = create_pooling("multi_layer_pooling", dim=8, num_layers=2, layer_vector="last")
        with pytest.raises(ValueError, match=r"row\(s\) \[1\]"):
            pool(torch.randn(2, 2, 3, 8), torch.tensor([[True] * 3, [False] * 3]))
        with pytest.raises(ValueError, match="width 9"):
            pool(torch.randn(2, 2, 3, 9))

    def test_checkpoint_of_another_head(self):
        state, _ = build()
        with pytest.raises(ValueError, match=r"pos_emb\.weight"):
            MultiLayerPooling.from_reference(state, num_heads=3)
        with pytest.raises(ValueError, match="hidden_size contradicts"):
            LatentPooling.from_reference(state, num_heads=3, hidden_size=32)
