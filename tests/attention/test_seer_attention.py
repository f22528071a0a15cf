"""SeerAttention's recipe: exact limits, padding, densities, gates that come and go, and bad input."""

import copy
import dataclasses
import math

import pytest
import torch

from attention_hosts import FAMILIES, decoder, padded
from cenote.attention import BlockHeuristic, Recipe, SeerAttention
from cenote.attention.base import LayerCall
from cenote.attention.block_prefill import prompts
from cenote.attention.host import Host, LayerInputs, cache_argument, output_cache
from cenote.attention.seer_training import gate_loss, observe
from cenote.integrations.attention_interface import AttentionCall, HostMask
from cenote.ops.block_gate import kept_columns
from cenote.ops.block_sparse import block_sparse_attention

SIZE = 8


@pytest.fixture(scope="module")
def calibrated():
    model = decoder("llama")
    ids, mask = padded((64, 40, 33), seed=3)
    recipe = SeerAttention(block_size=SIZE, nz_ratio=0.4, last_block_dense=False)
    return model, recipe.calibrate(model, [{"input_ids": ids, "attention_mask": mask}], steps=20)


def run(model, ids, mask=None):
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, use_cache=False).logits


@pytest.mark.parametrize("limit", [{"nz_ratio": 1.0}, {"threshold": 0.0}])
def test_density_one_is_dense_attention(calibrated, limit):
    model, recipe = calibrated
    ids, mask = padded((70, 41, 1))
    with dataclasses.replace(recipe, **limit)(model) as session:
        found = run(model, ids, mask)
    assert session.density() == 1
    torch.testing.assert_close(found[mask.bool()], run(model, ids, mask)[mask.bool()], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("settings", [{}, {"threshold": 0.2}, {"last_block_dense": True}])
def test_blocks_begin_at_the_first_real_token(calibrated, settings, left):
    """A row of a padded batch chooses the blocks that it chooses alone, and attends as it does alone."""
    model, recipe = calibrated
    recipe = dataclasses.replace(recipe, **settings)
    lengths = (70, 41, 9, 1)
    ids, mask = padded(lengths, left=left)

    def watch(batch_ids, batch_mask):
        with recipe(model) as session:
            score, found = session.score, []

            def note(prompt):
                logits = score(prompt)
                found.append((prompt, logits))
                return logits

            session.score = note
            out = run(model, batch_ids, batch_mask)
        return out, found

    out, together = watch(ids, mask)
    for row, length in enumerate(lengths):
        real = mask[row].bool()
        alone, single = watch(ids[row : row + 1, real], None)
        torch.testing.assert_close(out[row, real], alone[0], atol=2e-5, rtol=1e-4)
        for layer in range(4):
            prompt, logits = together[layer * len(lengths) + row]
            again, expected = single[layer]
            assert prompt.query.shape == again.query.shape == (1, 6, length, 8)
            torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_padding_is_cut_away_to_the_bit():
    """Given the same numbers, a padded call and a single one give the same output."""
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 6, 30, 8), torch.randn(2, 2, 30, 8), torch.randn(2, 2, 30, 8)
    rotary = (torch.rand(2, 30, 8), torch.rand(2, 30, 8))
    real = torch.ones(2, 30, dtype=torch.bool)
    real[1, :11] = False
    inputs = LayerInputs(torch.zeros(2, 30, 48), rotary, None)
    mask = HostMask({"attention_mask": real, "kv_length": 30, "kv_offset": 0, "q_offset": 0})
    call = LayerCall(0, inputs, AttentionCall(torch.nn.Identity(), query, key, value, mask, 0.5, {}, None))
    (_, whole), (where, cut) = list(prompts(call))
    assert torch.equal(whole.query, query[:1])
    assert torch.equal(cut.query, query[1:, :, 11:])
    assert torch.equal(cut.rotary[0], rotary[0][1:, 11:])
    assert torch.equal(where[1], torch.arange(11, 30))
    blocks = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    part = block_sparse_attention(cut.query, cut.key, cut.value, blocks, SIZE, scale=0.5)
    single = block_sparse_attention(query[1:, :, 11:], key[1:, :, 11:], value[1:, :, 11:], blocks, SIZE, scale=0.5)
    assert torch.equal(part, single)
    empty = HostMask({"attention_mask": real & (real.sum(1, keepdim=True) > 20), "kv_length": 30})
    with pytest.raises(ValueError, match="row 1 of the batch holds no real token"):
        list(prompts(LayerCall(0, inputs, dataclasses.replace(call.call, mask=empty))))


@pytest.mark.parametrize("family", FAMILIES)
def test_gates_read_queries_and_keys_in_front_of_rotary_positions(family):
    """What the recipe works out from rotated tensors is what the projections (and their norms) give, also in bfloat16
    but for a few last bits."""
    for dtype in (torch.float32, torch.bfloat16):
        model = decoder(family).to(dtype)
        host, found, given = Host.of(model), {}, {}
        ids, _ = padded((50,))
        for layer, attention in enumerate(host.attentions):
            for side, heads in (("q", 6), ("k", 2)):
                source = getattr(attention, f"{side}_norm", None) or getattr(attention, f"{side}_proj")

                def note(module, args, output, key=(layer, side), heads=heads, given=given):
                    given[key] = output.reshape(1, 50, heads, 8).transpose(1, 2)

                source.register_forward_hook(note)
        with BlockHeuristic(block_size=SIZE, nz_ratio=1.0)(model) as session:

            def note(prompt, found=found):
                for side, x in zip("qk", prompt.unrotated, strict=True):
                    found[prompt.layer, side] = x
                return torch.zeros(1, 6, 7, 7)

            session.score = note
            run(model, ids)
        for key, expected in given.items():
            if dtype == torch.float32:
                torch.testing.assert_close(found[key], expected, atol=1e-5, rtol=1e-5)
            else:
                size = expected.float().square().mean().sqrt()
                error = (found[key].float() - expected.float()).abs()
                assert error.mean() < 2e-3 * size
                assert error.max() < 0.05 * expected.float().abs().max()


def test_a_bfloat16_model_chooses_nearly_the_same_blocks(calibrated):
    _, recipe = calibrated
    ids, _ = padded((64,))
    masks = []
    for dtype in (torch.float32, torch.bfloat16):
        chosen, host = [], decoder("llama").to(dtype)
        with recipe(host) as session:
            session._count = lambda layer, mask, chosen=chosen: chosen.append(mask)
            run(host, ids)
        masks.append(torch.stack(chosen))
    assert (masks[0] == masks[1]).float().mean() > 0.98


def test_densities_are_those_of_the_formula(calibrated):
    model, recipe = calibrated
    ids, _ = padded((64, 64))
    with dataclasses.replace(recipe, nz_ratio=0.6, dense_layers=(1,))(model) as session:
        assert session.density() == 1
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3)
    k = kept_columns(0.6, 8)
    expected = sum(min(k, row) for row in range(1, 9)) / 36
    assert session.densities() == {0: expected, 2: expected, 3: expected}
    assert math.isclose(session.density(), (3 * expected + 1) / 4)


def test_decoding_is_dense(calibrated):
    """A step behind a cached prompt attends to every key of the cache."""
    model, recipe = calibrated
    ids, mask = padded((40, 25))
    with recipe(model):
        out = model(input_ids=ids[:, :-3], attention_mask=mask[:, :-3], use_cache=True)
        again = copy.deepcopy(output_cache(out))
        inside = model(input_ids=ids[:, -3:], attention_mask=mask, **cache_argument(output_cache(out))).logits
    outside = model(input_ids=ids[:, -3:], attention_mask=mask, **cache_argument(again)).logits
    torch.testing.assert_close(inside, outside, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("gate_type", ["Qavg_Kmaxminavg", "Qmaxavg_Kmin", "Qmin_Kavg"])
@pytest.mark.parametrize("hidden_size", [None, 12])
def test_save_and_load(tmp_path, gate_type, hidden_size):
    model = decoder("qwen3")
    ids, mask = padded((40, 25))
    recipe = SeerAttention(
        block_size=SIZE, nz_ratio=0.3, gate_type=gate_type, hidden_size=hidden_size, dense_layers=(2,)
    )
    recipe = recipe.calibrate(model, [{"input_ids": ids, "attention_mask": mask}], steps=2)
    recipe.save_pretrained(tmp_path)
    again = Recipe.from_pretrained(tmp_path)
    assert again == recipe
    assert again.gates.keys() == recipe.gates.keys() == {f"{n}.{k}" for n in (0, 1, 3) for k in _parts(recipe)}
    with recipe(model):
        expected = run(model, ids, mask)
    with again(model):
        assert torch.equal(run(model, ids, mask), expected)


def _parts(recipe):
    double = recipe.hidden_size is not None or recipe.gate_type.startswith("Qmaxavg")
    return ("key.weight", "query.weight") if double else ("key.weight",)


def test_calibration_learns_and_repeats():
    """The gates come nearer to the model's own attention, and the same seed gives the same gates."""
    model = decoder("llama")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    ids, mask = padded((96, 96), seed=1)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids}
    recipe = SeerAttention(block_size=SIZE)
    first, second = (recipe.calibrate(model, [batch], steps=60, seed=4) for _ in range(2))
    assert all(torch.equal(first.gates[name], second.gates[name]) for name in first.gates)
    new, trained = recipe.new_gates(Host.of(model), 4), first.load_gates(Host.of(model))
    (shown,) = observe(model, recipe, new, batch)
    assert float(gate_loss(trained, shown).detach()) < 0.7 * float(gate_loss(new, shown).detach())
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block_size": 0}, "block_size must be at least 1"),
        ({"nz_ratio": 0.0}, r"nz_ratio must lie in \(0, 1\]"),
        ({"nz_ratio": 1.5}, r"nz_ratio must lie in \(0, 1\]"),
        ({"threshold": 1.0}, r"threshold must lie in \[0, 1\)"),
        ({"threshold": -0.1}, r"threshold must lie in \[0, 1\)"),
        ({"gate_type": "Qavg"}, "a gate type is"),
        ({"gate_type": "Q_Kavg"}, "expected Q and then max, min and avg"),
        ({"gate_type": "Qavg_Kmedian"}, "expected K and then max, min and avg"),
        ({"gate_type": "Qavg_Kavgavg"}, "expected K and then max, min and avg"),
        ({"hidden_size": 0}, "hidden_size must be at least 1"),
        ({"backend": "triton"}, "backend must be"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SeerAttention(**settings)


def test_models_that_do_not_fit_are_refused(calibrated):
    model, recipe = calibrated
    with pytest.raises(ValueError, match="has no gates yet"), SeerAttention()(model):
        pass
    with pytest.raises(ValueError, match="do not fit this model of 3 layers"), recipe(decoder(num_hidden_layers=3)):
        pass
    wide = decoder(num_attention_heads=4)
    with pytest.raises(ValueError, match="poolings"), recipe(wide):
        pass
    beyond = dataclasses.replace(recipe, dense_layers=(4,))
    with pytest.raises(ValueError, match=r"dense_layers \[4\] are no layers"), beyond(model):
        pass
    with pytest.raises(ValueError, match="got no batches"):
        SeerAttention().calibrate(model, [])
    with pytest.raises(ValueError, match="too narrow for rotary positions"):
        SeerAttention(hidden_size=4).calibrate(model, [{"input_ids": padded((20,))[0]}], steps=1)


def test_windows_and_soft_caps_are_refused_unless_declared_dense():
    mistral = decoder("mistral", sliding_window=16)
    recipe = BlockHeuristic(block_size=SIZE)
    with pytest.raises(ValueError, match=r"sliding window of 16.*name them in dense_layers"), recipe(mistral):
        pass
    ids, _ = padded((40,))
    with BlockHeuristic(block_size=SIZE, dense_layers=(0, 1, 2, 3))(mistral) as session:
        assert torch.equal(run(mistral, ids), run(mistral, ids))
    assert session.densities() == {}


@pytest.mark.parametrize("rule", ["mean_pooled", "quest", "local", "random"])
def test_rules_of_thumb_keep_what_a_gate_keeps(calibrated, rule):
    model, recipe = calibrated
    ids, mask = padded((64, 40))
    shares = []
    for each in (recipe, BlockHeuristic(block_size=SIZE, nz_ratio=0.4, last_block_dense=False, rule=rule)):
        with each(model) as session:
            run(model, ids, mask)
        shares.append(session.densities())
    assert shares[0] == shares[1]
    with pytest.raises(ValueError, match="rule must be"):
        BlockHeuristic(rule="best")
