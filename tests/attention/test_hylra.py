"""HyLRA in live models: against the step written out, its limits, padding, beams, caches, hashes, files, refusals."""

import dataclasses

import pytest
import torch
from transformers import DynamicCache, StaticCache

from attention_hosts import decoder, padded
from cenote.attention import HyLRA, LayerPlan, Recipe
from cenote.attention.host import Host, cache_argument
from cenote.attention.hylra import PRESETS
from cenote.attention.hylra_hashes import KeyHashes
from cenote.attention.hylra_profile import LayerProfile
from cenote.compress.teacher_forced import teacher_forced_logits
from cenote.integrations.attention_interface import redirected
from cenote.ops.chunk_scores import TokenOrder, chunk_scores
from cenote.ops.sign_hashes import random_orthogonal
from reference.hylra import plain_step

PLAN = ("full", "select", 1, "select", 3, 3)
SMALL = {"plan": PLAN, "top_k": 24, "chunk_size": 4, "first": 1, "last": 2, "threshold": 0}
HASH = {**SMALL, "scoring": "hash"}


def model_of(family="llama", **sizes):
    return decoder(family, num_hidden_layers=6, **sizes)


def decoded(model, ids, mask=None, prompt=43, **more):
    return teacher_forced_logits(model, ids, None if mask is None else mask.bool(), prompt=prompt, **more)


def plain_logits(model, ids, mask, recipe, prompt=43):
    """As :func:`decoded` under the recipe, each step computed by the written-out reference."""
    host, memory = Host.of(model), {}
    sources = [None if role == "full" else layer if role == "select" else role for layer, role in enumerate(recipe.plan.roles)]  # fmt: skip # noqa: E501
    numbers = {id(attention): layer for layer, attention in enumerate(host.attentions)}

    def attend(call):
        if call.query.shape[2] > 1:
            return call.proceed()
        layer = numbers[id(call.module)]
        seen = call.mask.rows(0, 1)[:, 0, 0].expand(len(call.query), -1)
        rows = [
            plain_step(
                *(x[row] for x in (call.query[:, :, 0], call.key, call.value)), seen[row], sources,
                recipe.chunk_size, recipe.top_k // recipe.chunk_size, recipe.first, recipe.last, recipe.threshold,
                layer, memory.setdefault(row, {}),
            )
            for row in range(len(call.query))
        ]  # fmt: skip
        return torch.stack(rows).unsqueeze(1), None

    with redirected(host.decoder, attend, lazy_mask=True):
        return decoded(model, ids, mask, prompt)


@pytest.mark.parametrize("threshold", [0, 44])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_equals_the_step_written_out(family, threshold):
    model = model_of(family)
    ids, mask = padded((46, 38, 29))
    recipe = HyLRA(**{**SMALL, "threshold": threshold})
    expected = plain_logits(model, ids, mask, recipe)
    dense = decoded(model, ids, mask)
    with recipe(model):
        found = decoded(model, ids, mask)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert (found[0] - dense[0]).abs().max() > 0.01


def test_every_layer_selecting_is_top_k_of_its_own():
    model = model_of()
    ids, mask = padded((46, 38))
    recipe = HyLRA(**{**SMALL, "plan": ("select",) * 6})
    expected = plain_logits(model, ids, mask, recipe)
    with recipe(model):
        torch.testing.assert_close(decoded(model, ids, mask), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        {**SMALL, "top_k": 64},
        {**HASH, "top_k": 64},
        {**SMALL, "threshold": 50},
        {**SMALL, "plan": ("full",) * 6},
    ],
)
def test_is_dense_where_everything_is_kept_or_full(settings):
    model = model_of()
    ids, mask = padded((48, 31))
    dense = decoded(model, ids, mask)
    with HyLRA(**settings)(model):
        torch.testing.assert_close(decoded(model, ids, mask), dense, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("settings", [SMALL, HASH, {**SMALL, "threshold": 40}])
def test_left_padded_rows_equal_single_runs(settings):
    model = model_of()
    lengths = (61, 43, 34)
    ids, mask = padded(lengths)
    with HyLRA(**settings)(model):
        together = decoded(model, ids, mask, prompt=56)
        for row, length in enumerate(lengths):
            alone = decoded(model, ids[row : row + 1, -length:], prompt=length - 5)
            torch.testing.assert_close(together[row], alone[0], atol=1e-4, rtol=1e-4)


def test_the_newest_token_is_always_seen_by_reusing_layers():
    model = model_of()
    ids, _ = padded((60,))
    recipe = HyLRA(**{**SMALL, "last": 1})
    with recipe(model) as session:
        for tokens in (57, 58, 59, 60):  # the last chunk holds 1, 2, 3 and 4 tokens
            decoded(model, ids[:, :tokens], prompt=tokens - 1)
            for layer in (1, 3):
                assert session.chosen[layer].to_mask(tokens)[:, :, -1].all()
                assert session.chosen[layer].to_mask(tokens)[:, :, :4].all()


def test_a_full_layer_between_reusing_ones_leaves_the_set_of_the_last_selecting_layer():
    plan = LayerPlan.from_selectors(6, full=(0, 3), select=(1,))
    assert plan.roles == ("full", "select", 1, "full", 1, 1)
    model = model_of()
    ids, mask = padded((46, 41))
    recipe = HyLRA(**{**SMALL, "plan": plan})
    expected = plain_logits(model, ids, mask, recipe)
    with recipe(model):
        torch.testing.assert_close(decoded(model, ids, mask), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("settings", [SMALL, HASH])
@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_generates_with_static_and_growing_caches_alike(settings, how):
    model = model_of()
    ids, mask = padded((48, 37))
    how = {"max_new_tokens": 6, "do_sample": False, "attention_mask": mask, **how}
    with HyLRA(**settings)(model):
        growing = model.generate(ids, **how)
        fixed = model.generate(ids, cache_implementation="static", **how)
        with torch.no_grad():
            again = model(growing[:1], attention_mask=None).logits
    assert torch.equal(growing, fixed)
    assert again.isfinite().all()
    assert not torch.equal(growing, model.generate(ids, **how))


def test_hash_codes_follow_beams_crops_and_steps():
    torch.manual_seed(0)
    keys = torch.randn(2, 3, 20, 16)
    projection = torch.linalg.qr(torch.randn(16, 16)).Q
    steps, whole = KeyHashes(projection), KeyHashes(projection)
    for end in (12, 13, 14, 20):
        steps.extend(keys[:, :, :end])
    whole.extend(keys)
    assert torch.equal(steps.codes, whole.codes)
    steps.crop(15)
    steps.extend(torch.cat([keys[:, :, :15], keys[:, :, :5]], dim=2))
    assert torch.equal(steps.codes[:, :, :15], whole.codes[:, :, :15])
    assert torch.equal(steps.codes[:, :, 15:], whole.codes[:, :, :5])
    steps.select(torch.tensor([1, 1, 0]))
    assert torch.equal(steps.codes[2, :, :15], whole.codes[0, :, :15])
    assert torch.equal(steps.codes[0], steps.codes[1])


def test_codes_of_a_reordered_cache_are_those_of_a_fresh_one():
    model = model_of()
    ids, _ = padded((50, 50))
    swapped = ids.flip(0)
    with HyLRA(**HASH)(model):
        cache = DynamicCache(config=model.config)
        decoded(model, ids[:, :44], prompt=40, cache=cache)
        assert cache.layers[1].state.length == 44
        cache.reorder_cache(torch.tensor([1, 0]))
        with torch.no_grad():
            found = model(swapped[:, 44:45], **cache_argument(cache)).logits
        expected = decoded(model, swapped[:, :45], prompt=40)[:, -1:]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_hash_scores_find_the_chunks_with_keys_along_the_query():
    torch.manual_seed(0)
    query, keys = torch.randn(1, 2, 1, 64), torch.randn(1, 2, 160, 64)
    for head, places in enumerate(((13, 77), (42, 150))):
        keys[0, head, list(places)] = query[0, head] + 0.5 * torch.randn(2, 64)
    hashes = KeyHashes(random_orthogonal(64, seed=1))
    hashes.extend(keys)
    scores = chunk_scores(-hashes.distance(query).float(), 8, "max", TokenOrder.full(1, 160))
    assert [sorted(row) for row in scores[0].topk(2).indices.tolist()] == [[1, 9], [5, 18]]


def test_a_static_cache_keeps_the_codes():
    model = model_of()
    ids, _ = padded((50,))
    with HyLRA(**HASH)(model):
        cache = StaticCache(config=model.config, max_cache_len=64)
        found = decoded(model, ids, prompt=47, cache=cache)
        assert cache.layers[1].state.length == 50
        torch.testing.assert_close(found, decoded(model, ids, prompt=47), atol=1e-5, rtol=1e-5)


def test_continuations_of_several_tokens_are_dense():
    model = model_of()
    ids, _ = padded((60,))
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        with HyLRA(**HASH)(model):
            model(ids[:, :50], **cache_argument(cache))
            found = model(ids[:, 50:], **cache_argument(cache)).logits
        torch.testing.assert_close(found, model(ids).logits[:, 50:], atol=1e-5, rtol=1e-5)


def test_runs_in_bfloat16():
    model = model_of().bfloat16()
    ids, mask = padded((46, 38))
    for settings in (SMALL, HASH):
        with HyLRA(**settings)(model):
            found = decoded(model, ids, mask)
        assert found.dtype == torch.bfloat16
        assert found.isfinite().all()


def test_calibration_gives_a_plan_that_runs_and_is_kept_on_file(tmp_path):
    model = model_of()
    ids, mask = padded((70, 62))
    batches = [{"input_ids": ids, "attention_mask": mask}, {"input_ids": ids[:1, :64]}]
    recipe = HyLRA(**{**SMALL, "plan": None, "sparsity": 0.7, "compute_ratio": 0.4, "steps": 5}).calibrate(
        model, batches
    )
    assert recipe.profile["overlap"].shape == (2, 6, 6)
    assert recipe.profile["ratio"].shape == (6,)
    used, allowed = recipe.profile["changes"].tolist()
    assert used <= allowed
    assert len(recipe.plan.layers("full")) == 2
    assert set(recipe.profile["ratio"].topk(2).indices.tolist()) == set(recipe.plan.layers("full"))
    assert recipe.profile["path"][0] > 0
    recipe.save_pretrained(tmp_path)
    again = Recipe.from_pretrained(tmp_path)
    assert again == recipe
    assert torch.equal(again.profile["overlap"], recipe.profile["overlap"])
    with recipe(model):
        first = decoded(model, ids, mask, prompt=66)
    with again(model):
        assert torch.equal(decoded(model, ids, mask, prompt=66), first)
    assert recipe.calibrate(model, []) is recipe
    with pytest.raises(ValueError, match="no calibration batches"):
        dataclasses.replace(recipe, plan=None).calibrate(model, [])


def test_a_budget_that_would_let_layers_reuse_full_ones_is_raised(monkeypatch):
    ratio = torch.zeros(1, 4, 6)
    ratio[:, :, [2, 4]] = 0.5  # full layers between others: each takes two changes
    measured = LayerProfile(ratio, torch.full((1, 2, 6, 6), 0.4).triu())
    monkeypatch.setattr("cenote.attention.hylra.profile_layers", lambda *_: measured)
    base = HyLRA(**{**SMALL, "plan": None, "sparsity": 0.7, "compute_ratio": 0.1})
    with pytest.warns(UserWarning, match="4 were allowed instead"):
        recipe = base.calibrate(model_of(), [])
    assert recipe.note.startswith("3 changes of source left some layer")
    assert recipe.plan.roles == ("select", 0, "full", "select", "full", "select")
    assert recipe.profile["changes"].tolist() == [4, 4]
    enough = dataclasses.replace(base, compute_ratio=0.4).calibrate(model_of(), [])
    assert (enough.note, enough.plan) == ("", recipe.plan)


def test_published_plans_are_those_of_the_paper():
    counts = {"qwen3-4b": (36, 7, 15, 14), "qwen3-32b": (64, 10, 21, 33), "deepseek-r1": (61, 6, 18, 37)}
    counts["qwen3-coder-30b-a3b"] = (48, 3, 13, 32)
    assert counts.keys() == PRESETS.keys()
    for name, (layers, *roles) in counts.items():
        recipe = HyLRA.preset(name)
        assert len(recipe.plan) == layers
        assert [len(recipe.plan.layers(role)) for role in ("full", "select", "reuse")] == roles
    assert HyLRA.preset("qwen3-4b", scoring="attention", top_k=1024).top_k == 1024
    assert HyLRA.preset("qwen3-32b").plan.source(60) == 45
    with pytest.raises(ValueError, match="qwen3-4b"):
        HyLRA.preset("qwen3-4")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 26}, "chunk_size must divide top_k"),
        ({"first": 3, "last": 3}, "none is left"),
        ({"last": 0}, "newest"),
        ({"threshold": -1}, "threshold"),
        ({"scoring": "lsh"}, "scoring"),
        ({"merge": "max"}, "merge"),
        ({"sparsity": 1.0}, "sparsity"),
        ({"compute_ratio": 0.0}, "compute_ratio"),
        ({"plan": (0, "select")}, "no earlier layer"),
        ({"plan": ("select", 2, "select")}, "no earlier layer"),
    ],
)
def test_refuses_bad_settings(changes, message):
    with pytest.raises((ValueError, TypeError), match=message):
        HyLRA(**{**SMALL, **changes})


def test_refuses_plans_and_models_that_do_not_fit():
    model = model_of()
    ids, _ = padded((70,))
    for plan, message in (
        (("full",) * 5, "the plan is for 5 layers"),
        (("full", 0, 0, "select", 3, 3), "not a select layer"),
        (None, "no plan yet"),
    ):
        with pytest.raises(ValueError, match=message), HyLRA(**{**SMALL, "plan": plan})(model):
            pass
    with pytest.raises(ValueError, match="window"), HyLRA(**SMALL)(model_of("mistral", sliding_window=16)):
        pass
    unplanned = HyLRA(**{**SMALL, "plan": None, "steps": 2})
    with pytest.raises(ValueError, match="chunks: expected more than the 6"):
        unplanned.calibrate(model, [{"input_ids": ids[:, :20]}])
    with pytest.raises(ValueError, match="padded on the left"):
        unplanned.calibrate(model, [{"input_ids": ids, "attention_mask": torch.ones_like(ids).index_fill(1, torch.tensor([69]), 0)}])  # fmt: skip # noqa: E501
    with pytest.raises(ValueError, match="does not generate"):
        unplanned.calibrate(model.model, [{"input_ids": ids}])


def test_layers_with_windows_become_full():
    model = decoder("qwen2", num_hidden_layers=6, use_sliding_window=True, sliding_window=16, max_window_layers=3)
    assert set(Host.of(model).unserved()) == {3, 4, 5}
    ids, mask = padded((70, 66))
    recipe = HyLRA(**{**SMALL, "plan": None, "steps": 3, "sparsity": 0.4})
    recipe = recipe.calibrate(model, [{"input_ids": ids, "attention_mask": mask}])
    full = recipe.plan.layers("full")
    assert {3, 4, 5} < set(full)
    assert len(full) == 4
    with recipe(model):
        assert decoded(model, ids, mask, prompt=60).isfinite().all()
