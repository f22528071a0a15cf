"""The Qwen2-type host of the deconstructed variants."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.cache_utils import DynamicCache

from cenote.integrations.deconstructed_qwen2 import DeconstructedQwen2Config, DeconstructedQwen2ForCausalLM
from cenote.integrations.deconstructed_qwen2_config import FIXED, HYBRIDS, VARIANTS, standard_layers

ROWS = 24
SIZES = {
    "vocab_size": 40, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3,
}  # fmt: skip
every_variant = pytest.mark.parametrize("variant", VARIANTS)
ATTENTION = [variant for variant in VARIANTS if variant != "mlp"]


def make(variants="standard", hybrid=None, **settings):
    torch.manual_seed(0)
    config = DeconstructedQwen2Config(**{**SIZES, "fixed_rows": ROWS, **settings}, variants=variants, hybrid=hybrid)
    model = DeconstructedQwen2ForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    if model.model.fixed_input_ids is not None:
        model.set_fixed_text(torch.randint(SIZES["vocab_size"], (config.fixed_rows,)))
    return model


def draw(batch=2, tokens=9, seed=1):
    return torch.randint(1, SIZES["vocab_size"], (batch, tokens), generator=torch.Generator().manual_seed(seed))


def close(actual, expected, tolerance=2e-5):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_all_standard_is_the_host(kind):
    torch.manual_seed(0)
    if kind == "qwen2":
        host = Qwen2ForCausalLM(Qwen2Config(**SIZES)).eval()
    else:
        host = Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8)).eval()
    model = DeconstructedQwen2ForCausalLM.from_qwen2(host, "standard")
    ids, mask = draw(), torch.ones(2, 9, dtype=torch.long)
    mask[0, 6:] = 0
    assert set(host.state_dict()) == set(model.state_dict())
    close(model(ids).logits, host(ids).logits, 1e-6)
    close(model(ids, mask).logits[mask.bool()], host(ids, mask).logits[mask.bool()], 1e-6)


@every_variant
def test_parameters_match_across_variants(variant):
    with torch.device("meta"):
        models = [
            DeconstructedQwen2ForCausalLM(DeconstructedQwen2Config.paper_size("70M", variants=v))
            for v in ("standard", variant)
        ]
    counts = [sum(p.numel() for p in model.model.layers.parameters()) for model in models]
    if variant == "mlp":
        assert abs(counts[1] / counts[0] - 1) < 0.002
    else:
        assert counts[1] == counts[0]
        assert {name: tuple(p.shape) for name, p in models[0].named_parameters()} == {
            name: tuple(p.shape) for name, p in models[1].named_parameters()
        }


@pytest.mark.parametrize(("size", "expected"), [("70M", 70e6), ("160M", 160e6), ("500M", 500e6), ("1.7B", 1700e6)])
def test_paper_sizes_are_near_their_names(size, expected):
    with torch.device("meta"):
        model = DeconstructedQwen2ForCausalLM(DeconstructedQwen2Config.paper_size(size))
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(expected, rel=0.2)


@every_variant
@torch.no_grad()
def test_causal_and_independent_of_right_padding(variant):
    model, ids = make([variant, "standard", variant]), draw()
    logits = model(ids).logits
    changed = ids.clone()
    changed[:, 6:] = draw(seed=2)[:, 6:]
    close(model(changed).logits[:, :6], logits[:, :6])
    assert not torch.allclose(model(changed).logits[:, 6:], logits[:, 6:])
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    close(model(changed, mask).logits[1, :6], logits[1, :6])


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v not in FIXED])
@torch.no_grad()
def test_left_padding_leaves_the_other_variants_alone(variant):
    model, ids = make([variant, "standard", variant]), draw(tokens=6)
    padded = torch.cat([draw(tokens=3, seed=2), ids], dim=1)
    mask = torch.tensor([[0] * 3 + [1] * 6] * 2)
    close(model(padded, mask).logits[:, 3:], model(ids).logits)
    quadratic = make([variant, "standard", variant], taylor_linear=False)
    close(quadratic(padded, mask, use_cache=False).logits[:, 3:], model(ids).logits)


@pytest.mark.parametrize("settings", [{}, {"qk_norm": True, "qkv_bias": False}, {"taylor_form": "diagonal"}])
@every_variant
@torch.no_grad()
def test_decoding_token_by_token_gives_the_same_logits(variant, settings):
    if settings.get("taylor_form") and variant != "approximate":
        pytest.skip("only for approximate")
    model, ids = make(variant, initializer_range=0.1, **settings), draw()
    whole = model(ids, use_cache=False).logits
    out = model(ids[:, :4])
    parts = [out.logits]
    for cut in ((4, 5), (5, 8), (8, 9)):
        out = model(ids[:, slice(*cut)], past_key_values=out.past_key_values)
        parts.append(out.logits)
    close(torch.cat(parts, dim=1), whole)
    assert out.past_key_values.get_seq_length() == 9


@every_variant
@torch.no_grad()
def test_generate_agrees_with_and_without_cache(variant):
    model, ids = make(variant, "odd"), draw(tokens=5)
    for settings in ({}, {"num_beams": 2}):
        cached, plain = (
            model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0, use_cache=cache, **settings)
            for cache in (True, False)
        )
        assert torch.equal(cached, plain)


@torch.no_grad()
def test_state_of_the_recurrent_variants_does_not_grow():
    sizes = {}
    for variant in ("non_approximate", "approximate", "mlp", "random_fixed", "standard"):
        model = make(variant)
        sizes[variant] = [model(draw(1, n)).past_key_values.num_bytes() for n in (4, 16)]
    heads, width, layers = 4, 6, 3
    assert sizes["non_approximate"] == [layers * heads * (width + 2) * 4] * 2
    features = 1 + width + width * (width + 1) // 2
    assert sizes["approximate"] == [layers * heads * features * (width + 1) * 4] * 2
    assert sizes["mlp"] == [0, 0]
    assert sizes["random_fixed"][1] == 4 * sizes["random_fixed"][0]
    assert sizes["standard"] == [2 * size for size in sizes["random_fixed"]]


@pytest.mark.parametrize("variant", FIXED)
@torch.no_grad()
def test_cached_maps_are_the_uncached_and_need_no_queries(variant):
    model, ids = make(variant), draw()
    with torch.enable_grad():
        uncached = model(ids).logits
    asked = []
    for layer in model.model.layers:
        layer.self_attn.q_proj.register_forward_hook(lambda *_: asked.append(1))
        layer.self_attn.k_proj.register_forward_hook(lambda *_: asked.append(1))
    close(model(ids).logits, uncached)
    first = len(asked)
    assert first > 0
    others = draw(3, 9, seed=5)
    cached = model(others).logits
    close(model(ids[:, :5]).logits, uncached[:, :5])
    assert len(asked) == first
    with torch.enable_grad():
        close(cached, model(others).logits)


@pytest.mark.parametrize("change", ["in place", "optimiser", "load", "new data", "fixed buffer"])
@torch.no_grad()
def test_cached_maps_are_dropped_when_weights_change(change):
    model, ids = make("random_fixed"), draw()
    before = model(ids).logits
    weight = model.model.layers[0].self_attn.q_proj.weight
    if change == "in place":
        weight.mul_(2)
    elif change == "optimiser":
        weight.grad = torch.ones_like(weight)
        torch.optim.SGD([weight], lr=0.5).step()
    elif change == "load":
        model.load_state_dict({name: 1.1 * value for name, value in model.state_dict().items()})
    elif change == "new data":
        weight.data = 2 * weight.data
    else:
        model.model.random_embeddings.add_(torch.randn(ROWS, SIZES["hidden_size"]))
    after = model(ids).logits
    assert not torch.allclose(after, before)
    with torch.enable_grad():
        close(after, model(ids).logits)
    twin = copy.deepcopy(model)
    twin.model.layers[0].self_attn.q_proj.weight.mul_(3)
    close(model(ids).logits, after)
    assert not torch.allclose(twin(ids).logits, after)


@torch.no_grad()
def test_maps_made_under_autocast_serve_only_there():
    model, ids = make("random_fixed"), draw()
    plain = model(ids).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrow = model(ids).logits
        model.drop_fixed_maps()
        assert torch.equal(model(ids).logits, narrow)
    assert torch.equal(model(ids).logits, plain)


def test_weights_made_in_inference_mode_keep_no_maps():
    with torch.inference_mode():
        model, ids = make("random_fixed"), draw()
        before = model(ids).logits.clone()
        close(before, make("random_fixed")(ids).logits)
        model.model.layers[0].self_attn.q_proj.weight.mul_(2)
        assert not torch.allclose(model(ids).logits, before)


@pytest.mark.parametrize("variant", FIXED)
def test_fixed_maps_are_the_same_for_any_input_and_batch(variant):
    model = make(variant, attn_implementation="eager")
    some, other = (model(draw(batch, 7, seed), output_attentions=True).attentions for batch, seed in ((1, 1), (3, 2)))
    longer = model(draw(2, 12), output_attentions=True).attentions
    for a, b, c in zip(some, other, longer, strict=True):
        assert a.shape == (1, 4, 7, 7)
        assert torch.equal(a, b)
        close(c[..., :7, :7], a)


@pytest.mark.parametrize("variant", ATTENTION)
@torch.no_grad()
def test_maps_are_causal_distributions_and_move_the_values(variant):
    model = make(variant, attn_implementation="eager", taylor_linear=False)
    maps = model(draw(), output_attentions=True).attentions
    for weights in maps:
        close(weights.sum(dim=-1), torch.ones(weights.shape[:-1]))
        assert bool((weights.triu(1) == 0).all())
    if variant == "approximate":
        close(model(draw()).logits, make(variant)(draw()).logits)


@pytest.mark.parametrize("variant", FIXED)
def test_gradients_flow_through_both_streams(variant):
    model = make([variant, "standard", variant]).train()
    model(draw(), labels=draw()).loss.backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    exact = make([variant, "standard", variant]).double()
    for name in ("embed_tokens", "layers.0.mlp.up_proj", "layers.1.self_attn.v_proj"):  # in both streams
        weight = exact.get_submodule(f"model.{name}").weight
        loss = exact(draw()).logits.square().mean()
        direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)).double()
        slope = (torch.autograd.grad(loss, weight)[0] * direction).sum()
        ends = []
        for step in (1e-3, -1e-3):  # the host's norms compute in single precision
            with torch.no_grad():
                weight.add_(step * direction)
                ends.append(exact(draw()).logits.square().mean())
                weight.sub_(step * direction)
        assert slope.item() == pytest.approx((ends[0] - ends[1]).item() / 2e-3, rel=0.01, abs=2e-3)
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(draw(), labels=draw()).loss.backward()
    for name, parameter in model.named_parameters():
        close(parameter.grad, plain[name], 1e-4)


def test_gradient_checkpointing_reaches_the_embeddings_of_static_layers():
    model = make("static").train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(draw(), labels=draw()).loss.backward()
        gradients.append(model.model.embed_tokens.weight.grad.clone())
    close(gradients[1], gradients[0], 1e-4)


@torch.no_grad()
def test_static_norm_is_the_layers_own():
    plain, normed = make("static"), make("static", static_norm=True)
    assert not torch.allclose(plain(draw()).logits, normed(draw()).logits)
    layer, hidden = normed.model.layers[1], normed.model.embed_tokens(draw())
    queries = []
    layer.self_attn.q_proj.register_forward_hook(lambda module, args, output: queries.append(args[0]))
    normed(draw())
    close(queries[0], layer.input_layernorm(hidden))


def test_saved_models_come_back_through_the_auto_classes(tmp_path):
    model = make(["random_fixed", "text_fixed", "mlp"])
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is DeconstructedQwen2ForCausalLM
    assert AutoConfig.from_pretrained(tmp_path).variants == ["random_fixed", "text_fixed", "mlp"]
    with torch.no_grad():
        assert torch.equal(again(draw()).logits, model(draw()).logits)
    names = set(model.state_dict())
    assert {"model.random_embeddings", "model.fixed_input_ids"} <= names
    assert {f"model.layers.2.self_attn.{part}_proj.weight" for part in ("gate", "up", "down")} <= names


@torch.no_grad()
def test_skip_runs_the_standard_layers_alone():
    model = make("random_fixed", "even")
    host = make(["standard"], num_hidden_layers=1)
    with model.without_simple_layers():
        skipped = model(draw()).logits
        generated = model.generate(draw(), max_new_tokens=3, do_sample=False, pad_token_id=0)
    state = {
        name.replace("layers.1.", "layers.0."): v for name, v in model.state_dict().items() if "layers.0" not in name
    }
    host.load_state_dict(state, strict=False)
    close(skipped, host(draw()).logits)
    assert torch.equal(generated, host.generate(draw(), max_new_tokens=3, do_sample=False, pad_token_id=0))
    assert not torch.allclose(model(draw()).logits, skipped)
    with model.without_simple_layers():
        past = model(draw()[:, :4]).past_key_values
        close(model(draw()[:, 4:], past_key_values=past).logits, skipped[:, 4:])
    with pytest.raises(ValueError, match="a run through other layers"):
        model(draw(tokens=1), past_key_values=past)
    none = make("mlp")
    with none.without_simple_layers(), pytest.raises(ValueError, match="has none left"):
        none(draw())


def test_hybrids_keep_the_papers_layers():
    counted = {name: [layer + 1 for layer in standard_layers(name, 24)] for name in HYBRIDS}
    assert counted["even"] == list(range(2, 25, 2))
    assert counted["odd"] == list(range(1, 24, 2))
    assert counted["top"] == list(range(1, 13))
    assert counted["middle"] == [*range(1, 7), *range(19, 25)]
    assert counted["bottom"] == list(range(13, 25))
    assert counted["quarter"] == [4, 8, 12, 16, 20, 24]
    assert (counted["first"], counted["last"], counted["bilateral"]) == ([1], [24], [1, 24])
    assert make("static", "even").config.variants == ["static", "standard", "static"]


def test_streams_run_with_ordinary_attention_below_a_fixed_layer():
    model = make(["non_approximate", "random_fixed", "standard"], attn_implementation="eager")
    plain = make(["standard", "random_fixed", "standard"], attn_implementation="eager")
    plain.load_state_dict(model.state_dict())
    ours, theirs = (m(draw(), output_attentions=True).attentions[1] for m in (model, plain))
    close(ours, theirs)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"variants": ["standard"]}, "names 1 layers, the model has 3"),
        ({"variants": "softmax"}, "unknown variant 'softmax'"),
        ({"variants": ["mlp", "mlp", "sofmax"]}, "unknown variant 'sofmax'"),
        ({"variants": "mlp", "hybrid": "every"}, "unknown hybrid 'every'"),
        ({"variants": ["mlp"] * 3, "hybrid": "even"}, "goes with the name of one variant"),
        ({"hidden_size": 26}, "not divisible by num_attention_heads=4"),
        ({"num_key_value_heads": 3}, "not divisible by num_key_value_heads=3"),
        ({"taylor_form": "third"}, "form must be 'joint' or 'diagonal'"),
        ({"fixed_rows": 0}, "fixed_rows must be at least 1"),
        ({"use_sliding_window": True, "max_window_layers": 0}, "no sliding windows"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DeconstructedQwen2Config(**{**SIZES, **settings})


@torch.no_grad()
def test_bad_input_is_refused():
    fixed, left = make("random_fixed"), torch.tensor([[0] + [1] * 8] * 2)
    with pytest.raises(ValueError, match="pad on the right"):
        fixed(draw(), left)
    with pytest.raises(ValueError, match="24 rows, too few for a sequence of 25"):
        fixed(draw(tokens=25))
    with pytest.raises(ValueError, match="too few for a sequence of 25"):
        fixed.generate(draw(tokens=20), max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
    taylor = make("approximate")
    with pytest.raises(ValueError, match="linear form of 'approximate' has no maps"):
        taylor(draw(), output_attentions=True)
    keys = make("non_approximate")
    past = keys(draw()).past_key_values
    with pytest.raises(ValueError, match="no logits of the past"):
        keys(draw(tokens=1), past_key_values=past, output_attentions=True)
    foreign = DynamicCache()
    foreign.update(torch.zeros(2, 2, 1, 6), torch.zeros(2, 2, 1, 6), 0)
    with pytest.raises(ValueError, match="must be a DeconstructedCache"):
        keys(draw(tokens=1), past_key_values=foreign)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        keys()
    with pytest.raises(ValueError, match="attention_mask must be"):
        keys(draw(), torch.ones(2, 5))
    packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    make("static")(draw(), position_ids=packed, use_cache=False)
    for variant in ("non_approximate", "approximate", "random_fixed"):
        with pytest.raises(ValueError, match=f"{variant} cannot keep packed sequences apart"):
            make(variant)(draw(), position_ids=packed, use_cache=False)
    unset = DeconstructedQwen2ForCausalLM(DeconstructedQwen2Config(**SIZES, variants="text_fixed")).eval()
    with pytest.raises(ValueError, match="call set_fixed_text"):
        unset(draw())
    with pytest.raises(ValueError, match="expected 64 ids below 40"):
        unset.set_fixed_text(torch.arange(5))
    with pytest.raises(ValueError, match="no 'text_fixed' layer"):
        fixed.set_fixed_text(torch.zeros(ROWS, dtype=torch.long))
    with pytest.raises(ValueError, match="expected a Qwen2 or Qwen3"):
        DeconstructedQwen2ForCausalLM.from_qwen2(fixed, "mlp")
    with pytest.raises(ValueError, match="unknown size '3B'"):
        DeconstructedQwen2Config.paper_size("3B")
