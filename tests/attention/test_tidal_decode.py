import pytest
import torch
from transformers import DynamicCache, StaticCache

from attention_hosts import FAMILIES, decoder, padded
from cenote.attention import LayerPlan, PreallocatedLayer, Recipe, TidalDecode
from cenote.compress.teacher_forced import teacher_forced_logits

RECIPE = TidalDecode(budget=6, sparse_layer_start=1, correction_layer=3)
LAYERS = 6


def host(family="llama", **sizes):
    return decoder(family, num_hidden_layers=LAYERS, **sizes)


def close(got, expected, atol=1e-5):
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=atol)


def masked_steps(model, ids, mask, prompt, budget, start, corrections, newest=False):
    """The same with dense attention and masks of the sets, as the official accuracy code has it, one row at a time."""
    rows = []
    for row in range(len(ids)):
        state = {}

        def attend(module, query, key, value, attention_mask=None, scaling=None, state=state, **_):
            layer, heads, keys = module.layer_idx, query.shape[1], key.shape[2]
            key, value = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (key, value))
            logits = query @ key.transpose(-1, -2) * scaling
            if query.shape[2] > 1:
                hidden = torch.ones(query.shape[2], keys, dtype=torch.bool).triu(keys - query.shape[2] + 1)
                logits = logits.masked_fill(hidden, -1e30)
            elif layer == start or layer in corrections:
                scores = logits.clone()
                if newest:
                    scores[..., -1] = 1e30
                chosen = scores.topk(min(keys, budget), dim=-1).indices
                state["kept"] = torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, chosen, True)
            elif layer > start:
                logits = logits.masked_fill(~state["kept"], -1e30)
            return (logits.softmax(-1) @ value).transpose(1, 2).contiguous(), None

        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import eager_mask

        AttentionInterface.register("tidal_reference", attend)
        AttentionMaskInterface.register("tidal_reference", eager_mask)
        before = model.config._attn_implementation
        model.set_attn_implementation("tidal_reference")
        real = int(mask[row].sum())
        rows.append(teacher_forced_logits(model, ids[row : row + 1, -real:], prompt=prompt - (ids.shape[1] - real)))
        model.set_attn_implementation(before)
    return torch.cat(rows)


@pytest.mark.parametrize("newest", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_left_padded_steps_equal_masked_dense_attention_of_single_rows(family, newest):
    model = host(family)
    ids, mask = padded((30, 17))
    expected = masked_steps(model, ids, mask, 20, 6, 1, (3,), newest)
    with TidalDecode(6, 1, 3, always_newest=newest)(model):
        got = teacher_forced_logits(model, ids, mask.bool(), prompt=20)
    close(got, expected)
    dense = teacher_forced_logits(model, ids, mask.bool(), prompt=20)
    assert (got - dense)[:, 1:].abs().max() > 1e-3, "six positions of thirty should be visible in the logits"


def test_several_correction_layers_and_a_plan():
    model = host()
    ids, mask = padded((24, 24))
    expected = masked_steps(model, ids, mask, 18, 5, 0, (2, 4))
    for recipe in (TidalDecode(5, 0, (2, 4)), TidalDecode(5, plan=LayerPlan(("select", 0, "select", 2, "select", 4)))):
        with recipe(model):
            close(teacher_forced_logits(model, ids, prompt=18), expected)


@pytest.mark.parametrize("budget", [30, 1000])
def test_a_budget_of_the_whole_context_is_dense_generation(budget):
    model = host()
    ids, mask = padded((20, 11))
    settings = {"max_new_tokens": 10, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    dense = model.generate(ids, attention_mask=mask, **settings)
    with TidalDecode(budget, 1, 3)(model):
        sparse = model.generate(ids, attention_mask=mask, **settings)
    assert torch.equal(sparse.sequences, dense.sequences)
    for got, expected in zip(sparse.logits, dense.logits, strict=True):
        close(got, expected)


def test_sets_of_the_whole_context_are_dense_too():
    """A share just below 1 rounds up to every token, and then the sparse path itself runs."""
    model = host()
    ids, mask = padded((26, 15))
    dense = teacher_forced_logits(model, ids, mask.bool(), prompt=16)
    with TidalDecode(0.999, 1, 3)(model) as session:
        close(teacher_forced_logits(model, ids, mask.bool(), prompt=16), dense)
        assert session.chosen[1].index.shape[-1] == 26


def test_prompts_are_dense_and_layers_below_the_start_stay_as_they_are():
    model = host()
    ids, mask = padded((25, 14))
    with torch.no_grad():
        prompt = model(ids, attention_mask=mask).logits
        with RECIPE(model):
            assert torch.equal(model(ids, attention_mask=mask).logits, prompt)
    seen = {}
    for name in ("dense", "sparse"):
        kept = seen.setdefault(name, [])
        hook = model.model.layers[1].self_attn.register_forward_hook(lambda _, __, out, kept=kept: kept.append(out[0]))
        if name == "dense":
            teacher_forced_logits(model, ids, mask.bool(), prompt=15)
        else:
            with TidalDecode(4, 2, 4)(model):
                teacher_forced_logits(model, ids, mask.bool(), prompt=15)
        hook.remove()
    for dense, sparse in zip(*seen.values(), strict=True):
        torch.testing.assert_close(sparse, dense, rtol=0, atol=0)


def test_several_tokens_at_once_are_dense():
    model = host()
    ids, _ = padded((24, 24))
    whole = model(ids).logits
    with RECIPE(model):
        cache = DynamicCache(config=model.config)
        model(ids[:, :12], cache=cache)
        close(model(ids[:, 12:], cache=cache).logits, whole[:, 12:])


def test_assisted_decoding_is_checked_densely():
    model, assistant = host(), decoder(seed=1)
    ids, _ = padded((18,))
    assistant.generation_config.num_assistant_tokens = 4
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    settings = {"max_new_tokens": 12, "do_sample": False}
    dense = model.generate(ids, **settings)
    with TidalDecode(2, 1, 3)(model):
        sparse = model.generate(ids, assistant_model=assistant, **settings)
    # The very last token may come from a pass of one token, which is a sparse step.
    assert torch.equal(sparse[:, :-1], dense[:, :-1])


@pytest.mark.parametrize("interval", [None, 1, 3])
def test_static_caches_and_beams_generate_what_growing_ones_do(interval):
    model = host()
    ids, mask = padded((20, 11))
    recipe = TidalDecode(6, 1, 3, correction_interval=interval)
    settings = {"max_new_tokens": 8, "do_sample": False}
    with recipe(model):
        grown = model.generate(ids, attention_mask=mask, **settings)
        cache = StaticCache(config=model.config, max_cache_len=40)
        assert torch.equal(model.generate(ids, attention_mask=mask, **cached(cache), **settings), grown)
        beams = model.generate(ids, attention_mask=mask, num_beams=3, **settings)
        for row, length in enumerate((20, 11)):
            alone = model.generate(ids[row : row + 1, 20 - length :], num_beams=3, **settings)
            assert torch.equal(alone[0, length:], beams[row, 20:])


def cached(cache):
    from cenote.attention.host import cache_argument

    return cache_argument(cache)


@pytest.mark.parametrize("family", ["llama", "gemma"])
@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_an_interval_of_one_keeps_the_cache_as_dense_decoding_has_it(family, kind):
    model = host(family)
    ids, mask = padded((30, 19))

    def held(recipe):
        cache = kind(config=model.config, **({"max_cache_len": 40} if kind is StaticCache else {}))
        with recipe(model):
            teacher_forced_logits(model, ids, mask.bool(), prompt=20, cache=cache)
        return [(layer.keys, layer.values) for layer in cache.layers], cache

    dense, _ = held(TidalDecode(1000, 1, 3, correction_interval=50))
    polluted, _ = held(RECIPE)
    clean, cache = held(TidalDecode(6, 1, 3, correction_interval=1))
    real = mask.bool()[:, None, :, None]
    worst = 0.0
    for layer in range(LAYERS):
        for got, expected, wrong in zip(clean[layer], dense[layer], polluted[layer], strict=True):
            close(got.where(real, 0), expected.where(real, 0))
            worst = max(worst, (wrong[:, :, :30] - expected).where(real, 0).abs().max())
    assert worst > 1e-2, "without correction the entries should differ"
    assert all(isinstance(layer, PreallocatedLayer) for layer in cache.layers)


def test_an_interval_of_t_overwrites_the_last_t_entries_and_no_others():
    model = host()
    ids, _ = padded((31, 31))
    caches = {}
    for tokens in (22, 23, 24, 26):
        cache = caches[tokens] = DynamicCache(config=model.config)
        with TidalDecode(6, 1, 3, correction_interval=3)(model):
            teacher_forced_logits(model, ids[:, :tokens], prompt=20, cache=cache)
    dense = DynamicCache(config=model.config)
    model(ids, **cached(dense))

    def wrong(tokens, part):
        pairs = zip(caches[tokens].layers, dense.layers, strict=True)
        return max(float((ours.keys[:, :, part] - theirs.keys[:, :, part]).abs().max()) for ours, theirs in pairs)

    assert wrong(22, slice(20, 22)) > 1e-3
    for tokens, clean in ((23, 23), (24, 23), (26, 26)):
        assert wrong(tokens, slice(0, clean)) < 1e-5
    assert wrong(24, slice(23, 24)) > 1e-3


def test_what_is_pending_is_rerun_before_several_tokens_and_forgotten_when_cropped():
    model = host()
    ids, _ = padded((30,))
    dense = model(ids).logits
    with TidalDecode(6, 1, 3, correction_interval=10)(model):
        cache = DynamicCache(config=model.config)
        teacher_forced_logits(model, ids[:, :24], prompt=20, cache=cache)  # four pending
        cache.crop(-2)
        close(model(ids[:, 22:], **cached(cache)).logits, dense[:, 22:])


def test_padding_and_batches_with_corrections_equal_single_runs():
    model = host()
    ids, mask = padded((30, 17))
    recipe = TidalDecode(6, 1, 3, correction_interval=4)
    with recipe(model):
        together = teacher_forced_logits(model, ids, mask.bool(), prompt=20)
        alone = teacher_forced_logits(model, ids[1:, 13:], prompt=7)
    close(together[1:], alone)


def test_a_share_counts_each_rows_own_tokens():
    model = host()
    ids, mask = padded((40, 21))
    with TidalDecode(0.25, 1, 3)(model) as session:
        together = teacher_forced_logits(model, ids, mask.bool(), prompt=30)
        sets = session.chosen[1]
        assert sets.index.shape == (2, 6, 10)
        assert sets.mask.sum(-1).tolist() == [[10] * 6, [5] * 6]
        alone = teacher_forced_logits(model, ids[1:, 19:], prompt=11)
    close(together[1:], alone)


def test_the_newest_token_is_in_every_set_and_counts():
    model = host()
    ids, mask = padded((25, 16))
    for newest in (True, False):
        with TidalDecode(4, 1, 3, always_newest=newest)(model) as session:
            teacher_forced_logits(model, ids, mask.bool(), prompt=20)
        for sets in session.chosen.values():
            assert sets.index.shape[-1] == 4
            assert bool((sets.index == 24).any(-1).all()) == newest


def test_bfloat16_rounds_no_more_than_the_host_does():
    model = host()
    ids, mask = padded((30, 17))
    exact = teacher_forced_logits(model, ids, mask.bool(), prompt=20)
    model = model.to(torch.bfloat16)
    dense = teacher_forced_logits(model, ids, mask.bool(), prompt=20)
    with TidalDecode(0.999, 1, 3)(model):
        sparse = teacher_forced_logits(model, ids, mask.bool(), prompt=20)
    assert sparse.dtype == torch.bfloat16
    assert (sparse - exact).abs().mean() < 1.5 * (dense - exact).abs().mean()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"budget": 0}, "budget must be"),
        ({"budget": 1.5}, "budget must be"),
        ({"budget": 1.0}, "budget must be"),
        ({"budget": True}, "budget must be"),
        ({"sparse_layer_start": -1}, "counted from 0"),
        ({"correction_layer": 2}, "must follow sparse_layer_start 2"),
        ({"correction_layer": (5, 1)}, "must follow sparse_layer_start 2"),
        ({"correction_interval": 0}, "at least 1 token"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        TidalDecode(**settings)


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (TidalDecode(correction_layer=LAYERS), "layers of 0 to 5"),
        (TidalDecode(sparse_layer_start=LAYERS), "one of the model's 6 layers"),
        (TidalDecode(plan=LayerPlan(("select", 0))), "for 2 layers"),
        (TidalDecode(plan=LayerPlan(("full", 0, *["full"] * 4))), "not a select layer"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused_before_anything_changes(recipe, words):
    model = host()
    with pytest.raises(ValueError, match=words), recipe(model):
        pass
    assert model.config._attn_implementation == "sdpa"


def test_windows_are_refused_unless_declared_full():
    model = host("mistral", sliding_window=8)
    with pytest.raises(ValueError, match="sliding window of 8"), RECIPE(model):
        pass
    windows = {"layer_types": [*["sliding_attention"] * 3, *["full_attention"] * 3], "sliding_window": 8}
    model = host("qwen2", use_sliding_window=True, **windows)
    with pytest.raises(ValueError, match="declare them full in the plan"), RECIPE(model):
        pass
    ids, _ = padded((24,))
    with TidalDecode(100, plan=LayerPlan(("full", "full", "full", "select", 3, 3)))(model):
        got = teacher_forced_logits(model, ids, prompt=12)
    close(got, teacher_forced_logits(model, ids, prompt=12))
    with (
        pytest.raises(ValueError, match=r"layers \[0, 1, 2\] forget"),
        TidalDecode(3, 3, 4, correction_interval=2)(model),
    ):
        pass


def test_attention_maps_and_foreign_caches_are_refused():
    model = host()
    ids, _ = padded((24,))
    with pytest.raises(ValueError, match="without output_attentions"), RECIPE(model):
        model(ids, output_attentions=True)
    cache = DynamicCache(config=model.config)
    model(ids[:, :20], **cached(cache))
    with TidalDecode(3, 1, 3, correction_interval=2)(model), pytest.raises(ValueError, match="filled within"):
        model(ids[:, 20:21], **cached(cache))
    with RECIPE(model):  # without correction any cache will do
        model(ids[:, 21:22], **cached(cache))


def test_bidirectional_models_are_refused():
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16}
    with pytest.raises(ValueError, match="no text decoder"), RECIPE(BertModel(BertConfig(**sizes))):
        pass


def test_the_default_layers_scale_with_the_model():
    assert TidalDecode().plan_for(32).layers("select") == (2, 13)
    assert TidalDecode().plan_for(8).layers("select") == (2, 3)
    assert TidalDecode().plan_for(4).layers("select") == (2,)  # nothing would be left to follow a second choice
    assert TidalDecode(correction_layer=()).plan_for(32).layers("select") == (2,)
    assert TidalDecode().plan_for(32).layers("full") == (0, 1)


def test_saved_recipes_come_back_equal(tmp_path):
    for number, recipe in enumerate(
        (TidalDecode(0.1, 1, (3, 5)), TidalDecode(128, plan=("full", "select", 1), correction_interval=4))
    ):
        recipe.save_pretrained(tmp_path / str(number))
        assert Recipe.from_pretrained(tmp_path / str(number)) == recipe
