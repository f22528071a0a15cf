import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cenote.ops.cross_attention import folding_pays
from cenote.pooling import create_pooling
from cenote.pooling.latent_attention import LatentAttention
from reference.latent_heads import latent_attention, latent_attention_tokens, random_state

# Sizes on either side of the break-even r d = e (d + r), so that both forms run.
FOLDED, UNFOLDED = {"latents": 5, "heads": 3, "head_dim": 16}, {"latents": 40, "heads": 3, "head_dim": 4}


def build(latents, heads, head_dim, dim=24, ff_mult=4, **config):
    state = random_state(dim, latents, heads, head_dim, ff_mult)
    return state, LatentAttention.from_reference(state, num_cross_heads=heads, **config).eval()


def batch(dim=24, rows=3, tokens=7, seed=1):
    torch.manual_seed(seed)
    mask = torch.arange(tokens) < torch.tensor([tokens, 1, 4, 2, 5][:rows])[:, None]
    return torch.randn(rows, tokens, dim), mask


def flops(call):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize("sizes", [FOLDED, UNFOLDED, {"latents": 1, "heads": 1, "head_dim": 1}])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("side", ["right", "left"])
def test_equals_the_published_order(sizes, normalize, grad, side):
    state, pool = build(**sizes, output_normalize=normalize)
    tokens, mask = batch()
    if side == "left":
        tokens, mask = tokens.flip(1), mask.flip(1)
    with torch.set_grad_enabled(grad):
        expected = latent_attention(state, tokens, mask, sizes["heads"], normalize)
        torch.testing.assert_close(pool(tokens, mask), expected, rtol=1e-5, atol=1e-5)
        everything = latent_attention(state, tokens, torch.ones_like(mask), sizes["heads"], normalize)
        torch.testing.assert_close(pool(tokens), everything, rtol=1e-5, atol=1e-5)
        per_token = latent_attention_tokens(state, tokens, sizes["heads"])
        torch.testing.assert_close(pool.transform(tokens), per_token, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ff_mult", [1, 3])
def test_equals_the_published_order_with_another_mlp_width(ff_mult):
    state, pool = build(**FOLDED, ff_mult=ff_mult)
    tokens, mask = batch()
    torch.testing.assert_close(pool(tokens, mask), latent_attention(state, tokens, mask, 3), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sizes", [FOLDED, UNFOLDED])
def test_gradients_equal_those_of_the_published_order(sizes):
    state, pool = build(**sizes)
    pool.train()
    tokens, mask = batch(rows=5, tokens=40)
    state = {name: weight.clone().requires_grad_() for name, weight in state.items()}
    aim = torch.randn(5, 24)
    (pool(tokens, mask) * aim).sum().backward()
    (latent_attention(state, tokens, mask, sizes["heads"]) * aim).sum().backward()
    for own, official in [
        ("latents", "latents"),
        ("query.weight", "cross_attend_blocks.0.fn.to_q.weight"),
        ("key_value.weight", "cross_attend_blocks.0.fn.to_kv.weight"),
        ("out.weight", "cross_attend_blocks.0.fn.to_out.weight"),
        ("mlp_out.bias", "cross_attend_blocks.1.fn.net.2.bias"),
    ]:
        grad = pool.block.get_parameter(own).grad
        torch.testing.assert_close(grad, state[official].grad, rtol=1e-4, atol=1e-5, msg=lambda m, n=own: f"{n}: {m}")


@pytest.mark.parametrize("chunk", [1, 3, 10_000])
def test_chunks_do_not_change_the_result(chunk):
    state, pool = build(**FOLDED, chunk_tokens=chunk)
    tokens, mask = batch()
    with torch.no_grad():
        torch.testing.assert_close(pool(tokens, mask), latent_attention(state, tokens, mask, 3), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_amount_and_content_do_not_matter(side):
    _, pool = build(**FOLDED)
    tokens, _ = batch(rows=1, tokens=5)
    pad = torch.full((1, 6, 24), float("nan"))
    padded = torch.cat([tokens, pad] if side == "right" else [pad, tokens], dim=1)
    mask = ~padded.isnan().any(-1)
    torch.testing.assert_close(pool(padded, mask), pool(tokens), rtol=1e-5, atol=1e-5)


def test_permuting_latents_changes_nothing():
    state, pool = build(**FOLDED)
    state["latents"] = state["latents"][torch.randperm(5)]
    other = LatentAttention.from_reference(state, num_cross_heads=3).eval()
    tokens, mask = batch()
    torch.testing.assert_close(other(tokens, mask), pool(tokens, mask), rtol=1e-5, atol=1e-5)


def test_unit_length_when_normalised():
    pool = create_pooling("latent_attention", dim=24, num_latents=5, normalize=True)
    tokens, mask = batch()
    torch.testing.assert_close(pool(tokens, mask).norm(dim=-1), torch.ones(3))


class TestConstantsKeptInEval:
    def setup_method(self):
        self.state, self.pool = build(**FOLDED)
        self.tokens, self.mask = batch()

    def vector(self):
        with torch.no_grad():
            return self.pool(self.tokens, self.mask)

    def test_second_call_does_less_and_gives_the_same(self):
        first, second = flops(self.vector), flops(self.vector)
        assert second < first
        torch.testing.assert_close(self.vector(), self.vector(), rtol=0, atol=0)

    @pytest.mark.parametrize("name", ["latents", "query.weight", "key_value.weight", "out.weight", "latent_norm.bias"])
    def test_seen_when_a_parameter_is_written(self, name):
        before = self.vector()
        with torch.no_grad():
            # Scaled unevenly, since the norm undoes a common factor.
            parameter = self.pool.block.get_parameter(name)
            parameter.mul_(torch.linspace(0.5, 1.5, parameter.numel()).view_as(parameter))
        assert not torch.allclose(self.vector(), before, atol=1e-4)
        torch.testing.assert_close(self.vector(), self.pool(self.tokens, self.mask), rtol=1e-5, atol=1e-5)

    def test_seen_when_a_state_is_loaded(self):
        self.vector()
        other = random_state(24, **FOLDED, seed=9)
        self.pool.load_state_dict(LatentAttention.from_reference(other, num_cross_heads=3).state_dict())
        expected = latent_attention(other, self.tokens, self.mask, 3)
        torch.testing.assert_close(self.vector(), expected, rtol=1e-5, atol=1e-5)

    def test_seen_when_the_dtype_changes(self):
        self.vector()
        self.pool.double()
        double = self.pool(self.tokens.double(), self.mask)
        with torch.no_grad():
            torch.testing.assert_close(self.pool(self.tokens.double(), self.mask), double, rtol=1e-10, atol=1e-12)

    def test_train_forgets_even_what_was_written_through_data(self):
        self.vector()
        self.pool.block.latents.data.copy_(torch.randn(5, 24))
        self.pool.train()
        self.pool.eval()
        torch.testing.assert_close(self.vector(), self.pool(self.tokens, self.mask), rtol=1e-5, atol=1e-5)

    def test_a_copy_follows_its_own_parameters(self):
        self.vector()
        other = copy.deepcopy(self.pool)
        with torch.no_grad():
            other.block.latents.normal_()
            torch.testing.assert_close(other(self.tokens, self.mask), other.train()(self.tokens, self.mask))
        torch.testing.assert_close(self.vector(), self.pool(self.tokens, self.mask), rtol=1e-5, atol=1e-5)

    def test_kept_in_inference_mode_serves_gradients_of_the_tokens(self):
        with torch.inference_mode():
            self.pool(self.tokens, self.mask)
        self.pool.requires_grad_(False)
        tokens = self.tokens.clone().requires_grad_()
        self.pool(tokens, self.mask).sum().backward()
        assert tokens.grad[self.mask].abs().sum() > 0
        assert tokens.grad[~self.mask].abs().sum() == 0

    def test_not_kept_under_autocast_in_its_precision(self):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            self.vector()
        torch.testing.assert_close(self.vector(), self.pool(self.tokens, self.mask), rtol=1e-5, atol=1e-5)

    def test_stand_ins_are_never_kept(self):
        other = random_state(24, **FOLDED, seed=9)
        weights = LatentAttention.from_reference(other, num_cross_heads=3).state_dict()
        before = self.vector()
        with torch.no_grad():
            stack = {name: torch.stack([w, w + 0.1]) for name, w in weights.items()}
            both = torch.func.vmap(lambda p: torch.func.functional_call(self.pool, p, (self.tokens, self.mask)))(stack)
        torch.testing.assert_close(both[0], latent_attention(other, self.tokens, self.mask, 3), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(self.vector(), before)


def test_kept_form_does_not_depend_on_the_head_width_and_the_published_one_does():
    tokens, mask = batch(dim=16, rows=2)
    costs, published = [], []
    for head_dim in (16, 32, 64):
        state, pool = build(latents=4, heads=2, head_dim=head_dim, dim=16)
        flops(lambda p=pool: p(tokens, mask))
        costs.append(flops(lambda p=pool: p(tokens, mask)))
        published.append(flops(lambda s=state: latent_attention(s, tokens, mask, 2)))
    assert costs[0] == costs[1] == costs[2]
    assert published[2] - published[1] == 2 * (published[1] - published[0]) > 0


def test_published_form_pays_for_the_latents_of_every_sequence():
    """At one token a sequence the latents' keys and values dominate the published order; here they come once a call."""
    state, pool = build(latents=32, heads=2, head_dim=24)
    pool.train()
    one, many = (torch.randn(rows, 1, 24) for rows in (1, 64))
    per_sequence = {
        name: (flops(lambda f=f: f(many)) - flops(lambda f=f: f(one))) / 63
        for name, f in {"ours": pool, "published": lambda x: latent_attention_tokens(state, x, 2)}.items()
    }
    assert per_sequence["published"] - per_sequence["ours"] > 2 * 2 * 32 * 24 * 48 * 0.9


def test_multiplications_at_the_specified_sizes():
    """d=512, r=64, h=8, e=512, B=8, T=24: at least 6 times fewer than the published order, kept constants included."""
    sizes = {"latents": 64, "heads": 8, "head_dim": 512}
    with torch.device("meta"):
        state = {k: torch.empty(v.shape) for k, v in random_state(512, 64, 8, 512).items()}
        tokens, mask = torch.empty(8, 24, 512), torch.ones(8, 24, dtype=torch.bool)
    pool = LatentAttention.from_reference(state, num_cross_heads=8).eval()
    assert folding_pays(512, sizes["latents"], sizes["head_dim"])
    with torch.no_grad():
        pool._pool(tokens, mask)
    ours = flops(lambda: pool._pool(tokens, mask))
    assert flops(lambda: latent_attention(state, tokens, mask, 8)) >= 6 * ours


def test_published_sizes_and_names():
    d, r, inner = 4096, 512, 8 * 4096
    shapes = {
        "latents": (r, d),
        "cross_attend_blocks.0.norm.weight": (d,),
        "cross_attend_blocks.0.norm.bias": (d,),
        "cross_attend_blocks.0.norm_context.weight": (d,),
        "cross_attend_blocks.0.norm_context.bias": (d,),
        "cross_attend_blocks.0.fn.to_q.weight": (inner, d),
        "cross_attend_blocks.0.fn.to_kv.weight": (2 * inner, d),
        "cross_attend_blocks.0.fn.to_out.weight": (d, inner),
        "cross_attend_blocks.1.norm.weight": (d,),
        "cross_attend_blocks.1.norm.bias": (d,),
        "cross_attend_blocks.1.fn.net.0.weight": (8 * d, d),
        "cross_attend_blocks.1.fn.net.0.bias": (8 * d,),
        "cross_attend_blocks.1.fn.net.2.weight": (d, 4 * d),
        "cross_attend_blocks.1.fn.net.2.bias": (d,),
    }
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    config = {"num_latents_value": 512, "num_cross_heads": 8, "hidden_dim": d, "latent_dim": d, "cross_dim_head": 4096}
    pool = LatentAttention.from_reference(state, output_normalize=True, **config)
    assert pool.normalize
    assert sum(p.numel() for p in pool.parameters()) == sum(v.numel() for v in state.values())
    assert pool.transform(torch.empty(2, 3, d, device="meta")).shape == (2, 3, d)


def test_initial_values_are_the_published_ones():
    torch.manual_seed(0)
    pool = create_pooling("latent_attention", dim=64, num_latents=512)
    assert pool.block.latents.std().item() == pytest.approx(1, abs=0.02)
    assert pool.block.query.weight.abs().max().item() == pytest.approx(64**-0.5, rel=0.01)
    assert pool.block.head_dim == 64


class TestBadInput:
    def test_unequal_widths(self):
        with pytest.raises(ValueError, match="latent_dim must equal hidden_dim"):
            LatentAttention.from_reference(random_state(24, 5, 3, 16), num_cross_heads=3, hidden_dim=24, latent_dim=16)

    def test_sizes_that_contradict_the_weights(self):
        state = random_state(24, 5, 3, 16)
        with pytest.raises(ValueError, match="cross_dim_head"):
            LatentAttention.from_reference(state, num_cross_heads=3, cross_dim_head=8)
        with pytest.raises(ValueError, match="divide the inner width 48"):
            LatentAttention.from_reference(state, num_cross_heads=5)
        with pytest.raises(ValueError, match="unknown option"):
            LatentAttention.from_reference(state, num_cross_heads=3, heads=3)

    def test_missing_and_unexpected_keys(self):
        state = random_state(24, 5, 3, 16)
        state["more"] = state.pop("latents")
        with pytest.raises(ValueError, match=r"missing keys \['latents'\], unexpected keys \['more'\]"):
            LatentAttention.from_reference(state, num_cross_heads=3)

    def test_shapes_that_do_not_fit(self):
        state = random_state(24, 5, 3, 16)
        state["cross_attend_blocks.0.fn.to_out.weight"] = torch.zeros(24, 47)
        with pytest.raises(ValueError, match="do not fit"):
            LatentAttention.from_reference(state, num_cross_heads=3)

    @pytest.mark.parametrize("option", ["num_latents", "num_heads", "head_dim", "ff_mult", "chunk_tokens"])
    def test_sizes_below_one(self, option):
        with pytest.raises(ValueError, match=option):
            create_pooling("latent_attention", dim=8, **{option: 0})

    def test_masks_and_states(self):
        _, pool = build(**FOLDED)
        tokens, mask = batch()
        with pytest.raises(ValueError, match="row"):
            pool(tokens, mask & torch.tensor([True, False, True])[:, None])
        with pytest.raises(ValueError, match="mask of shape"):
            pool(tokens, mask[:, :-1])
        with pytest.raises(ValueError, match="mask of shape"):
            pool(tokens, mask[:, None])
        with pytest.raises(TypeError, match="boolean"):
            pool(tokens, mask.float())
        with pytest.raises(TypeError, match="floating"):
            pool(tokens.long(), mask)
