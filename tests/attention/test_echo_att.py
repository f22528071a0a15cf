"""EchoAtt on an unchanged model: one map for several layers."""

import pytest
import torch
from transformers.cache_utils import DynamicCache, StaticCache

from attention_hosts import FAMILIES, decoder, padded
from cenote.attention import EchoAtt, Recipe
from cenote.attention.echo_att_cache import ValueLayer
from cenote.attention.host import cache_argument
from cenote.ops.shared_attention import apply_map, attention_map


def logits(model, ids, **inputs):
    with torch.no_grad():
        return model(ids, **inputs).logits


def copied(model, shared, source):
    """A twin whose shared layers have the source's whole weights in front of the map."""
    own, theirs = model.model.layers[shared], model.model.layers[source]
    for name in ("q_proj", "k_proj"):
        getattr(own.self_attn, name).load_state_dict(getattr(theirs.self_attn, name).state_dict())


def test_a_map_applied_to_values_is_attention_with_grouped_heads():
    query, key, value = (torch.randn(2, heads, 5, 8, dtype=torch.double) for heads in (6, 2, 2))
    mask = torch.ones(5, 5, dtype=torch.bool).tril()[None, None]
    ours = apply_map(attention_map(query, key, mask), value)
    wanted = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)
    torch.testing.assert_close(ours, wanted)
    added = torch.zeros(1, 1, 5, 5).masked_fill(~mask, torch.finfo(torch.float32).min)
    torch.testing.assert_close(attention_map(query, key, added), attention_map(query, key, mask))
    nothing = attention_map(query, key, mask & (torch.arange(5) > 2)[:, None])
    torch.testing.assert_close(nothing[:, :, 0], torch.full((2, 6, 5), 0.2, dtype=torch.double))


@pytest.mark.parametrize("family", FAMILIES)
def test_both_forms_agree_and_differ_from_the_dense_model(family):
    model = decoder(family).double()
    ids, mask = padded((9, 14, 1))
    dense, real = logits(model, ids, attention_mask=mask), mask.bool()
    found = {}
    for form in ("probabilities", "query_key"):
        with EchoAtt(shared_layers=(2, 3), form=form)(model):
            found[form] = logits(model, ids, attention_mask=mask)
    torch.testing.assert_close(found["probabilities"][real], found["query_key"][real], rtol=0, atol=1e-6)
    assert (found["probabilities"] - dense)[real].abs().max() > 0.1
    assert torch.equal(logits(model, ids, attention_mask=mask), dense)


def test_equal_inputs_queries_and_keys_make_sharing_exact():
    model = decoder("llama").double()
    for layer in (1, 2):  # both layers add nothing, so that all three see the same input
        model.model.layers[layer].self_attn.o_proj.weight.zero_()
        model.model.layers[layer].mlp.down_proj.weight.zero_()
    copied(model, 2, 1)
    copied(model, 3, 1)
    for layer in (2, 3):
        model.model.layers[layer].input_layernorm.weight.copy_(model.model.layers[1].input_layernorm.weight)
    ids, mask = padded((7, 11))
    dense = logits(model, ids, attention_mask=mask)
    with EchoAtt(shared_layers=(2, 3))(model):
        shared = logits(model, ids, attention_mask=mask)
    torch.testing.assert_close(shared[mask.bool()], dense[mask.bool()], rtol=0, atol=1e-9)


@pytest.mark.parametrize("form", ["probabilities", "query_key"])
def test_steps_behind_a_cache_are_one_pass_and_shared_layers_keep_no_keys(form):
    model = decoder("qwen3")
    ids, mask = padded((9, 14))
    with EchoAtt(shared_layers=(1, 3), form=form)(model):
        whole = logits(model, ids, attention_mask=mask)
        cache = DynamicCache(config=model.config)
        parts = [logits(model, ids[:, :10], attention_mask=mask[:, :10], **cache_argument(cache))]
        for step in range(10, 14):
            there = cache_argument(cache)
            parts.append(logits(model, ids[:, step : step + 1], attention_mask=mask[:, : step + 1], **there))
    real = mask.bool()
    torch.testing.assert_close(torch.cat(parts, 1)[real], whole[real], rtol=1e-4, atol=1e-5)
    for number, layer in enumerate(cache.layers):
        assert isinstance(layer, ValueLayer) is (number in (1, 3))
        assert layer.get_seq_length() == 14
        assert layer.keys.numel() == (0 if number in (1, 3) else layer.values.numel())


def test_a_static_cache_gives_the_same():
    model = decoder("llama")
    ids, _ = padded((12,))
    with EchoAtt(shared_layers=(2, 3))(model):
        whole = logits(model, ids)
        cache = StaticCache(config=model.config, max_cache_len=20)
        first = logits(model, ids[:, :8], **cache_argument(cache))
        rest = [logits(model, ids[:, i : i + 1], **cache_argument(cache)) for i in range(8, 12)]
    torch.testing.assert_close(torch.cat([first, *rest], 1), whole, rtol=1e-4, atol=1e-5)


def test_maps_are_dropped_behind_the_last_follower():
    model = decoder("llama")
    with EchoAtt(shared_layers=(1, 3))(model) as session:
        logits(model, padded((6,))[0])
        assert not session.handed


def test_calibration_chooses_layers_that_attend_alike():
    model = decoder("llama", num_hidden_layers=6)
    copied(model, 4, 3)
    for layer in (3, 4):  # the same input for both
        model.model.layers[layer].input_layernorm.weight.fill_(1.0)
    model.model.layers[3].self_attn.o_proj.weight.zero_()
    model.model.layers[3].mlp.down_proj.weight.zero_()
    ids, mask = padded((9, 14))
    batches = [{"input_ids": ids, "attention_mask": mask}]
    assert EchoAtt(ratio=1 / 6).calibrate(model, batches).shared_layers == (4,)
    given = EchoAtt(shared_layers=(2,), ratio=0.5)
    assert given.calibrate(model, batches) is given


def test_a_saved_recipe_comes_back(tmp_path):
    recipe = EchoAtt(shared_layers=(2, 3), form="query_key")
    recipe.save_pretrained(tmp_path)
    assert Recipe.from_pretrained(tmp_path) == recipe


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"shared_layers": (0,)}, "shared layers must be different ones of 1"),
        ({"shared_layers": (2, 2)}, "shared layers must be different"),
        ({"form": "keys"}, "form must be one of"),
        ({"ratio": 1.5}, "between 0 and 1"),
        ({"ratio": "some"}, "'auto'"),
        ({"block_size": 1}, "block_size"),
    ],
)
def test_bad_settings_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        EchoAtt(**settings)


@pytest.mark.parametrize(
    ("recipe", "sizes", "words"),
    [
        (EchoAtt(shared_layers=(4,)), {}, "1 to 3"),
        (EchoAtt(ratio=0.5), {}, "calibrate"),
        (EchoAtt(shared_layers=(2,)), {"family": "mistral", "sliding_window": 8}, "sliding window of 8"),
    ],
)
def test_what_a_model_cannot_serve_is_refused(recipe, sizes, words):
    with pytest.raises(ValueError, match=words), recipe(decoder(**sizes)):
        pass


def test_layers_with_other_heads_are_refused():
    model = decoder("llama")
    model.model.layers[2].self_attn.v_proj = torch.nn.Linear(48, 24, bias=False)
    with pytest.raises(ValueError, match="layer 2 has heads"), EchoAtt(shared_layers=(2,))(model):
        pass
