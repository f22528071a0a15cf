"""SeerAttention-R: compressed keys that never depend on how the tokens came, chosen blocks, gates that learn."""

import copy
import dataclasses
import json

import pytest
import torch

from attention_hosts import decoder, padded
from cenote.attention import SeerDecode
from cenote.attention.compressed_keys import CompressedKeys
from cenote.attention.host import Host, cache_argument, output_cache
from cenote.attention.seer_decode import block_positions
from cenote.attention.seer_gate import DecodeGate
from cenote.attention.seer_training import gate_loss, observe
from cenote.integrations.seer_checkpoints import CONFIG, WEIGHTS, load_seer_attention, load_seer_decode
from cenote.ops.block_gate import distillation_loss
from cenote.ops.blocks import block_mask_to_tokens
from cenote.ops.decode_gate import choose_decode_blocks, decode_gate_logits, decode_target

SIZE, KV_HEADS, DIM = 4, 2, 6


def gate():
    torch.manual_seed(0)
    return DecodeGate(4, KV_HEADS, DIM, SIZE).requires_grad_(False)


def tokens(batch, count):
    generator = torch.Generator().manual_seed(1)
    angles = torch.rand(batch, count, DIM // 2, generator=generator).repeat(1, 1, 2)
    return torch.randn(batch, KV_HEADS, count, DIM, generator=generator), (angles.cos(), angles.sin())


def from_scratch(made, key, rotary):
    """Compressed keys of one row without padding: its finished blocks, and zero for what is left over."""
    whole = key.shape[2] // SIZE * SIZE
    found = torch.zeros(1, KV_HEADS, -(-key.shape[2] // SIZE), DIM)
    if whole:
        at = rotary[0][:, :whole:SIZE], rotary[1][:, :whole:SIZE]
        found[:, :, : whole // SIZE] = made.keys(key[:, :, :whole], at)
    return found


@pytest.mark.parametrize("prompt", range(1, 14))
@pytest.mark.parametrize("steps", [(1,) * 9, (2, 1, 5, 1), (3, 6)])
def test_compressed_keys_are_those_from_scratch(prompt, steps):
    """At any length of the prompt, however the rest comes, in a batch with padding and after beams."""
    made = gate()
    total = prompt + sum(steps)
    key, rotary = tokens(3, total)
    pads = torch.tensor([0, min(prompt - 1, 2), min(prompt - 1, 7)])
    real = torch.arange(total) >= pads[:, None]
    state = CompressedKeys(made)
    ends = [prompt, *(prompt + sum(steps[: n + 1]) for n in range(len(steps)))]
    rows = torch.arange(3)
    for first, last in zip([0, *ends], ends, strict=False):
        part = slice(first, last)
        state.extend(key[rows, :, part], (rotary[0][rows, part], rotary[1][rows, part]), real[rows, part])
        chosen = torch.tensor([1, 1, 2, 0]) if first == 0 else torch.arange(len(rows))
        state.select(chosen)
        rows = rows[chosen]
    assert state.tokens == total
    for place, row in enumerate(rows.tolist()):
        alone = key[row : row + 1, :, pads[row] :], tuple(x[row : row + 1, pads[row] :] for x in rotary)
        expected = from_scratch(made, *alone)
        blocks = int(state.blocks()[place])
        assert blocks == expected.shape[2]
        torch.testing.assert_close(state.keys(blocks)[place], expected[0])


def test_last_position_is_for_blocks_that_a_step_finishes():
    made = gate()
    key, rotary = tokens(1, 11)
    states = {kind: CompressedKeys(made, kind) for kind in ("first", "last")}
    for state in states.values():
        for part in (slice(0, 6), slice(6, 7), slice(7, 8), slice(8, 11)):
            state.extend(key[:, :, part], (rotary[0][:, part], rotary[1][:, part]))
    first, last = states["first"].keys(3), states["last"].keys(3)
    assert torch.equal(first[:, :, [0, 2]], last[:, :, [0, 2]])
    expected = made.keys(key[:, :, 4:8], (rotary[0][:, 7:8], rotary[1][:, 7:8]))
    torch.testing.assert_close(last[:, :, 1:2], expected)
    assert not torch.allclose(first[:, :, 1], last[:, :, 1])


def test_choice_keeps_the_first_and_last_block_of_each_row():
    scores = torch.tensor([[[0.1, 0.4, 0.2, 0.25, 0.05]], [[0.0, 0.1, 0.5, 0.4, 0.0]]])
    there = torch.tensor([[True] * 5, [False, True, True, True, False]])
    chosen = choose_decode_blocks(scores, there, budget=1)
    assert chosen.int().tolist() == [[[1, 1, 0, 0, 1]], [[0, 1, 1, 1, 0]]]
    assert choose_decode_blocks(scores, there, budget=1, first=False).int().tolist() == [
        [[0, 1, 0, 0, 1]],
        [[0, 0, 1, 1, 0]],
    ]
    assert choose_decode_blocks(scores, there, threshold=0.2).int().tolist() == [[[1, 1, 0, 1, 1]], [[0, 1, 1, 1, 0]]]
    assert choose_decode_blocks(scores, there, threshold=0.9).int().tolist() == [[[1, 0, 0, 0, 1]], [[0, 1, 0, 1, 0]]]
    for everything in ({"budget": 5}, {"threshold": 0.0}):
        assert torch.equal(choose_decode_blocks(scores, there, **everything), there[:, None])
    with pytest.raises(ValueError, match="a row has no block"):
        choose_decode_blocks(scores, torch.zeros_like(there))


@pytest.mark.parametrize("pads", [(0, 0), (0, 5), "between"])
def test_positions_are_the_tokens_of_the_blocks(pads):
    real = torch.ones(2, 18, dtype=torch.bool)
    if pads == "between":
        real[1, [0, 6, 7, 11]] = False
    else:
        real[1, : pads[1]] = False
    counts = real.sum(1)
    chosen = torch.zeros(2, 3, 5, dtype=torch.bool)
    for row, count in enumerate(counts):
        blocks = int(-(-count // SIZE))
        chosen[row, 0, :blocks] = True
        chosen[row, 1, [0, blocks - 1]] = True
        chosen[row, 2, [1, 2]] = True
    found = block_positions(chosen, SIZE, 18, None if bool(real.all()) else real).to_mask(18)
    for row, count in enumerate(counts):
        expected = block_mask_to_tokens(chosen[row][:, None], SIZE, 1, int(count))[:, 0]
        assert torch.equal(found[row][:, real[row]], expected)
        assert not found[row][:, ~real[row]].any()


def test_target_is_the_largest_attention_of_a_group_to_earlier_blocks():
    torch.manual_seed(0)
    query, key = torch.randn(1, 4, 19, DIM), torch.randn(1, KV_HEADS, 19, DIM)
    found = decode_target(query, key, SIZE)
    weights = query @ key.repeat_interleave(2, dim=1).transpose(-1, -2) * DIM**-0.5
    weights = weights.masked_fill(torch.ones(19, 19, dtype=torch.bool).triu(1), float("-inf")).softmax(-1)
    for token in range(19):
        best = torch.zeros(KV_HEADS, 5)
        for block in range(token // SIZE):
            best[:, block] = weights[0, :, token, SIZE * block : SIZE * block + SIZE].amax(-1).view(2, 2).amax(-1)
        torch.testing.assert_close(found[0, :, token], best / (best.sum(-1, keepdim=True) + 1e-9))


@pytest.fixture(scope="module")
def calibrated():
    model = decoder("llama")
    ids, mask = padded((64, 40, 33), seed=3)
    recipe = SeerDecode(block_size=SIZE, token_budget=8)
    return model, recipe.calibrate(model, [{"input_ids": ids, "attention_mask": mask}], steps=20)


def steps(model, ids, prompt, out=None):
    """Logits of the last tokens, one a step behind the prompt."""
    with torch.no_grad():
        out = out or model(ids[:, :prompt], use_cache=True)
        found, cache = [], output_cache(out)
        for place in range(prompt, ids.shape[1]):
            found.append(model(ids[:, place : place + 1], **cache_argument(cache)).logits)
    return torch.cat(found, dim=1), cache


def test_the_length_of_the_prompt_does_not_matter(calibrated):
    """In the first layer, whose keys are the same either way, a token chooses the same blocks."""
    model, recipe = calibrated
    ids, _ = padded((41,))
    chosen = []
    with dataclasses.replace(recipe, dense_layers=(1, 2, 3))(model) as session:
        choose = session._choose
        session._choose = lambda *args: chosen.append(choose(*args)) or chosen[-1]
        steps(model, ids, 40)
        for prompt in range(20, 40, 3):
            steps(model, ids, prompt)
            assert torch.equal(chosen[-1], chosen[0])
    assert 0.2 < session.densities()[0] < 0.8
    assert not chosen[0].all()


def test_a_cache_from_outside_the_block_or_cut_is_read_again(calibrated):
    model, recipe = calibrated
    ids, _ = padded((45,))
    with recipe(model):
        expected, cache = steps(model, ids, 30)
        again, other = steps(model, ids, 30)[0], copy.deepcopy(cache)
        assert torch.equal(again, expected)
        other.crop(-8)
        with torch.no_grad():
            for place in range(37, 45):
                out = model(ids[:, place : place + 1], **cache_argument(other)).logits
                torch.testing.assert_close(out, expected[:, place - 30 : place - 29], atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        outside = model(ids[:, :30], use_cache=True)
    with recipe(model):
        torch.testing.assert_close(steps(model, ids, 30, outside)[0], expected, atol=1e-4, rtol=1e-4)


def test_continuations_of_several_tokens_are_dense_and_taken_in(calibrated):
    model, recipe = calibrated
    ids, _ = padded((40,))
    plain = model(ids).logits
    with recipe(model), torch.no_grad():
        out = model(ids[:, :21], use_cache=True)
        cache = output_cache(out)
        rest = model(ids[:, 21:], **cache_argument(cache)).logits
    torch.testing.assert_close(rest, plain[:, 21:], atol=1e-4, rtol=1e-4)
    assert all(layer.state.tokens == 40 for layer in cache.layers)


def test_calibration_learns_and_repeats():
    model = decoder("llama")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    ids, mask = padded((96, 70), seed=1)
    batch = {"input_ids": ids, "attention_mask": mask}
    recipe = SeerDecode(block_size=8, token_budget=16, start_layer=1)
    first, second = (recipe.calibrate(model, [batch], steps=60, seed=4) for _ in range(2))
    assert all(torch.equal(first.gates[name], second.gates[name]) for name in first.gates)
    assert {name.split(".")[0] for name in first.gates} == {"1", "2", "3"}
    new, trained = recipe.new_gates(Host.of(model), 4), first.load_gates(Host.of(model))
    shown = observe(model, recipe, new, batch)
    assert len(shown) == 2
    losses = [sum(float(gate_loss(gates, each, "row").detach()) for each in shown) for gates in (new, trained)]
    assert losses[1] < 0.8 * losses[0]
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_kept_rows_have_the_loss_of_all_rows():
    """What an observation keeps gives the loss of whole logits and targets with the first half of rows left out."""
    model = decoder("llama")
    ids, _ = padded((45,))
    recipe = SeerDecode(block_size=8, token_budget=16)
    gates = recipe.new_gates(Host.of(model))
    (seen,) = observe(model, recipe, gates, {"input_ids": ids})
    shown = seen["0"]
    assert (shown.first, shown.query.shape[2]) == (22, 23)
    wide = decode_gate_logits(
        gates["0"].queries(shown.query, shown.query_rotary), gates["0"].compress(shown.key, shown.key_rotary), 8, 22
    )
    logits = torch.nn.functional.pad(wide, (0, 0, 22, 0))
    target = torch.nn.functional.pad(shown.target, (0, 0, 22, 0))
    for reduction in ("mean", "row"):
        torch.testing.assert_close(
            shown.loss(gates["0"], reduction), distillation_loss(logits, target, reduction, drop=0.5)
        )


def published(layers=4):
    shapes = {"attngate_linear_q": (2, 3, 8, 8), "attngate_linear_k": (2, 24, 8), "attngate_qnorm": (8,),
              "attngate_knorm": (8,)}  # fmt: skip
    return {
        f"model.layers.{n}.self_attn.attn_gate.{name}.weight": torch.randn(shape)
        for n in range(layers)
        for name, shape in shapes.items()
    }


def test_a_published_folder_becomes_a_recipe(tmp_path):
    torch.save(published(), tmp_path / WEIGHTS)
    config = {
        "base_model": "some/llama", "seerattn_gate_block_size": 4, "seerattn_gate_hidden_size": 8,
        "seerattn_k_seq_pooling_type": "Kmaxminavg", "seerattn_q_head_pooling_type": "Qproj",
        "seerattn_use_qk_norm": True, "seerattn_use_rope": True, "seerattn_sparsity_method": "token_budget",
        "seerattn_token_budget": 12, "seerattn_start_layer": 1, "seerattn_threshold": 0.0,
    }  # fmt: skip
    (tmp_path / CONFIG).write_text(json.dumps(config))
    recipe = load_seer_decode(tmp_path)
    assert recipe == SeerDecode(block_size=4, token_budget=12, hidden_size=8, start_layer=1)
    model = decoder("llama")
    ids, _ = padded((45,))
    with recipe(model) as session:
        steps(model, ids, 40)
    assert set(session.densities()) == {1, 2, 3}
    assert load_seer_decode(tmp_path, token_budget=8).token_budget == 8
    with pytest.raises(ValueError, match="decode variant"):
        load_seer_attention(tmp_path)
    torch.save({"model.layers.0.self_attn.attn_gate.mask_linear_k.weight": torch.zeros(6, 24, 8)}, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match="prefill variant"):
        load_seer_decode(tmp_path)


def test_trainer_distils_these_gates_too(tmp_path):
    pytest.importorskip("accelerate", reason="Trainer needs accelerate")
    from cenote.tuning.seer_distillation import distill_gates, distillation_arguments

    ids, _ = padded((40,) * 4, seed=2)
    recipe = SeerDecode(block_size=8, token_budget=16, start_layer=2)
    arguments = distillation_arguments(
        tmp_path, max_steps=2, disable_tqdm=True, use_cpu=True, save_strategy="no", learning_rate=1e-2
    )
    model = decoder("qwen3")
    trained = distill_gates(model, recipe, [{"input_ids": row} for row in ids], arguments)
    new = recipe.new_gates(Host.of(model), arguments.seed).state_dict()
    assert trained.gates.keys() == new.keys()
    assert all(not torch.equal(weight, new[name]) for name, weight in trained.gates.items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block_size": 0}, "block_size must be at least 1"),
        ({"block_size": 64, "token_budget": 63}, "token_budget 63 is less than one block of 64"),
        ({"threshold": 1.0}, r"threshold must lie in \[0, 1\)"),
        ({"key_pooling": "Kmedian"}, "expected K and then max, min and avg"),
        ({"query_pooling": "Qmax"}, "query_pooling must be"),
        ({"hidden_size": 0}, "hidden_size must be at least 1"),
        ({"start_layer": -1}, "start_layer must be at least 0"),
        ({"completed_position": "middle"}, "completed_position must be"),
    ],
)
def test_settings_that_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SeerDecode(**settings)


def test_models_that_are_refused(calibrated):
    model, recipe = calibrated
    with pytest.raises(ValueError, match="seer_decode has no gates yet"), SeerDecode()(model):
        pass
    with pytest.raises(ValueError, match="do not fit this model of 3 layers"), recipe(decoder(num_hidden_layers=3)):
        pass
    with pytest.raises(ValueError, match="start_layer 4 leaves no layer"):
        dataclasses.replace(recipe, start_layer=4)(model).__enter__()
    with pytest.raises(ValueError, match="dense_layers"), recipe(decoder("mistral", sliding_window=8)):
        pass
