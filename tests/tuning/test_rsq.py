"""RSQ on small random decoders: exact properties, padding, resuming, files, and what is refused."""

import copy
import json

import pytest
import torch

from attention_hosts import decoder, padded
from cenote.ops.gptq import WeightedHessian, gptq, normalize_importance
from cenote.ops.quantizer import GridSettings, round_to_nearest
from cenote.tuning import Importance, cut_sequences, load_quantized, quantize_gptq, quantize_rsq, quantize_rtn
from cenote.tuning.rsq_layers import run_layer
from cenote.tuning.rsq_result import folder_bytes
from cenote.tuning.rsq_rotation import random_rotation, rotate_model

IDS = torch.randint(2, 64, (6, 24), generator=torch.Generator().manual_seed(0))
SMALL = {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "intermediate_size": 56,
}
FAST = {"rotation": "none", "clip_search": False}


def _weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def _same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def _received(model, layer=0, **inputs):
    return run_layer(model, layer, inputs, attention=True, output=False).received


@pytest.mark.parametrize(
    ("family", "dtype"),
    [(family, torch.float32) for family in ("llama", "mistral", "qwen2", "qwen3")] + [("qwen2", torch.bfloat16)],
)
def test_every_weight_ends_on_its_grid(family, dtype):
    model = decoder(family, **SMALL).to(dtype)
    kept = _weights(model)
    result = quantize_rsq(model, IDS, bits=3, expansion=2, **FAST)
    assert len(result.linears) == 14
    for each in result.linears:
        weight = model.get_submodule(each.name).weight
        assert weight.dtype == dtype
        assert torch.equal(weight, each.dequantize())
        assert max(len(row.unique()) for row in weight) <= 8
        assert 0 < each.error < 1
    quantised = {f"{each.name}.weight" for each in result.linears}
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items() if name not in quantised)
    frame = result.frame()
    assert list(frame["name"]) == [each.name for each in result.linears]
    assert frame["bytes"].sum() == result.packed_bytes < result.dense_bytes / 3


def test_first_layer_is_gptq_with_the_weighted_hessian():
    model = decoder("llama", **SMALL)
    original = copy.deepcopy(model)
    quantize_rsq(model, IDS, 3, batch_size=4, **FAST)
    layer = original.model.layers[0]
    weights = Importance().weights(
        original.model.embed_tokens(IDS), received=_received(original, input_ids=IDS, attention_mask=None)
    )
    hessian = WeightedHessian(48)
    for x, w in zip(
        layer.input_layernorm(original.model.embed_tokens(IDS)), normalize_importance(weights), strict=True
    ):
        hessian.add(x, w)
    expected = gptq(
        layer.self_attn.v_proj.weight, hessian.value, GridSettings(3, clip_search=False)
    ).quantized.dequantize()
    got = model.model.layers[0].self_attn.v_proj.weight
    assert (got != expected).float().mean() < 0.01, "a rounding tie may fall the other way"


def test_equal_weights_are_plain_gptq_bit_for_bit():
    plain, equal, given, constant = (decoder("llama", **SMALL) for _ in range(4))
    quantize_gptq(plain, IDS, 3, **FAST)
    quantize_rsq(equal, IDS, 3, importance="equal", **FAST)
    quantize_rsq(given, IDS, 3, importance=torch.full(IDS.shape, 0.37), **FAST)
    quantize_rsq(constant, IDS, 3, importance=Importance(r_min=1.0), **FAST)
    assert _same(_weights(plain), _weights(equal))
    assert _same(_weights(plain), _weights(given))
    assert _same(_weights(plain), _weights(constant))


def test_rtn_is_round_to_nearest():
    model = decoder("qwen2", **SMALL)
    weight = model.model.layers[1].mlp.up_proj.weight.clone()
    quantize_rtn(model, 4, group_size=8)
    expected = round_to_nearest(weight, GridSettings(4, group_size=8)).dequantize()
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, expected)


@pytest.mark.parametrize("left", [True, False])
def test_padding_changes_nothing(left):
    lengths = (24, 15, 9)
    ids, mask = padded(lengths, left=left)
    noisy = torch.where(mask.bool(), ids, torch.randint(2, 64, ids.shape))
    singles = [{"input_ids": row[real.bool()][None]} for row, real in zip(ids, mask, strict=True)]
    model = decoder("llama", **SMALL)
    seen = run_layer(
        model, 0, {"input_ids": ids, "attention_mask": mask}, mask=mask.bool(), attention=True, output=False
    ).received
    for row, single in enumerate(singles):
        alone = _received(model, attention_mask=None, **single)
        torch.testing.assert_close(seen[row, mask[row].bool()], alone[0])
    first, second, alone = (decoder("llama", **SMALL) for _ in range(3))
    quantize_rsq(first, [{"input_ids": ids, "attention_mask": mask}], 4, **FAST)
    quantize_rsq(second, [{"input_ids": noisy, "attention_mask": mask}], 4, **FAST)
    quantize_rsq(alone, singles, 4, **FAST)
    assert _same(_weights(first), _weights(second))
    for name, value in _weights(first).items():
        other = _weights(alone)[name]
        assert (value - other).abs().gt(1e-6).float().mean() < 0.02, "a rounding tie may fall the other way"


def test_attention_received_sums_to_heads_times_tokens_and_sees_windows():
    model = decoder("mistral", **SMALL, sliding_window=5)
    received = _received(model, input_ids=IDS, attention_mask=None)
    torch.testing.assert_close(received.sum(1), torch.full((6,), 4.0 * 24))
    model.set_attn_implementation("eager")
    maps = model(IDS, output_attentions=True).attentions[0]
    torch.testing.assert_close(received, maps.sum(dim=(1, 2)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rule", ["actnorm", "actdiff", "tokensim", "tokenfreq", "0_3_4", "first_half", "first_5"])
def test_every_rule_runs_and_matters(rule):
    sizes = SMALL | {"num_hidden_layers": 1}
    plain, model = decoder("llama", **sizes), decoder("llama", **sizes)
    quantize_gptq(plain, IDS, 3, **FAST)
    quantize_rsq(model, IDS, 3, importance=rule, **FAST)
    assert not _same(_weights(plain), _weights(model))


def test_only_some_layers_may_be_weighted():
    plain, model = decoder("llama", **SMALL), decoder("llama", **SMALL)
    quantize_gptq(plain, IDS, 3, **FAST)
    quantize_rsq(model, IDS, 3, weighted=("v_proj", "down_proj"), **FAST)
    one, two = (each.model.layers[0] for each in (plain, model))
    assert torch.equal(one.self_attn.q_proj.weight, two.self_attn.q_proj.weight)
    assert not torch.equal(one.self_attn.v_proj.weight, two.self_attn.v_proj.weight)


def test_scores_of_a_rotated_model_are_those_of_the_model():
    model = decoder("llama", **SMALL)
    rotated = copy.deepcopy(model)
    rotate_model(rotated, random_rotation(48, "hadamard", 0), "full")
    one, two = (_received(each, input_ids=IDS, attention_mask=None) for each in (model, rotated))
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rotation", ["none", "full"])
def test_an_interrupted_run_goes_on_to_the_same_bits(tmp_path, rotation):
    whole, first, second = (decoder("llama", **SMALL | {"num_hidden_layers": 3}) for _ in range(3))
    options = {
        "bits": 3,
        "rotation": rotation,
        "act_order": True,
        "symmetric": False,
        "static_groups": False,
        "clip_search": False,
    }
    expected = quantize_rsq(whole, IDS, **options)

    def stop(line):
        if line.startswith("layer 2"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_rsq(first, IDS, **options, work_folder=tmp_path, progress=stop)
    lines = []
    result = quantize_rsq(second, IDS, **options, work_folder=tmp_path, progress=lines.append)
    assert [("read from" in line) for line in lines] == [True, True, False]
    assert _same(_weights(whole), _weights(second))
    assert [each.error for each in result.linears] == [each.error for each in expected.linears]
    for change in ({"bits": 4}, {"damping": 0.1}):
        with pytest.raises(ValueError, match="another run"):
            quantize_rsq(decoder("llama", **SMALL), IDS, **options | change, work_folder=tmp_path)
    with pytest.raises(ValueError, match="another run"):
        quantize_rsq(decoder("llama", seed=1, **SMALL | {"num_hidden_layers": 3}), IDS, **options, work_folder=tmp_path)


@pytest.mark.parametrize("layout", ["plain", "packed", "quanto"])
@pytest.mark.parametrize(("bits", "symmetric"), [(2, True), (3, False), (4, True)])
def test_saved_models_are_the_same_model(tmp_path, layout, bits, symmetric):
    if layout == "quanto":
        pytest.importorskip("optimum.quanto")
    from transformers import AutoModelForCausalLM

    sizes = SMALL | {"tie_word_embeddings": True, "intermediate_size": 160}
    model = decoder("qwen2", **sizes)
    result = quantize_rtn(model, bits, symmetric=symmetric, group_size=None if bits == 2 else 16)
    if layout == "quanto" and bits != 2:
        with pytest.raises(ValueError, match="cross groups"):  # 16 columns against quanto's 48 or 160
            result.save(tmp_path / "no", layout)
        model = decoder("qwen2", **sizes)
        result = quantize_rtn(model, bits, symmetric=symmetric)
    folder = result.save(tmp_path / "model", layout)
    loaded = load_quantized(folder)
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, rtol=0, atol=0)
        if layout == "plain":
            again = AutoModelForCausalLM.from_pretrained(folder)
            assert torch.equal(again(IDS).logits, model(IDS).logits)
    if layout == "packed":
        assert folder_bytes(folder) < 2 * result.packed_bytes + 64 * 48 * 4 + 20_000
        codes = sum(each.packed.nbytes for each in result.linears)
        assert codes == sum(each.rows * each.columns for each in result.linears) * bits / 8
    facts = json.loads((folder / "quantization.json").read_text())
    assert facts["layout"] == layout
    assert facts["settings"]["bits"] == bits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_online_hadamards_and_wide_layers_are_saved_packed(tmp_path, dtype):
    model = decoder("llama", **SMALL | {"intermediate_size": 172})
    for value in model.parameters():  # but no buffers: rotary frequencies stay float32 in models that are read
        value.data = value.data.to(dtype)
    result = quantize_rtn(model, 3, rotation="full")
    with pytest.raises(ValueError, match="online Hadamards"):
        result.save(tmp_path / "no")
    loaded = load_quantized(result.save(tmp_path / "model", "packed"))
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    with pytest.raises(ValueError, match="layout must be"):
        result.save(tmp_path / "no", "gguf")


def test_quanto_keeps_our_codes_in_its_own_groups(tmp_path):
    quanto = pytest.importorskip("optimum.quanto")
    model = decoder("llama", **SMALL | {"intermediate_size": 256})
    result = quantize_rtn(model, 4)
    folder = result.save(tmp_path / "model", "quanto")
    loaded = quanto.QuantizedModelForCausalLM.from_pretrained(str(folder))
    down = loaded.model.layers[0].mlp.down_proj
    assert down.weight_group_size == 128
    assert torch.equal(down.weight.dequantize(), model.model.layers[0].mlp.down_proj.weight)
    assert down.weight._data._data.nbytes == 48 * 256 // 2
    with pytest.raises(ValueError, match="2 and 4 bits"):
        quantize_rtn(decoder("llama", **SMALL), 5).save(tmp_path / "no", "quanto")


def test_calibration_sequences():
    stream = torch.arange(100)
    assert cut_sequences(stream, 30).tolist() == [list(range(i, i + 30)) for i in (0, 30, 60)]
    drawn = cut_sequences(stream, 30, 5, seed=3)
    assert torch.equal(drawn, cut_sequences(stream, 30, 5, seed=3))
    assert bool((drawn.diff(dim=1) == 1).all())
    with pytest.raises(ValueError, match="fewer than one sequence of 101"):
        cut_sequences(stream, 101)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"bits": 1}, ValueError, "2 to 8"),
        ({"bits": 9}, ValueError, "2 to 8"),
        ({"group_size": 20}, ValueError, "divide the 48 columns"),
        ({"importance": torch.ones(6, 23)}, ValueError, r"shape \(6, 24\).*got \(6, 23\)"),
        ({"importance": -torch.ones(6, 24)}, ValueError, "negative"),
        ({"importance": torch.zeros(6, 24)}, ValueError, "only zeros"),
        ({"importance": torch.full((6, 24), float("nan"))}, ValueError, "NaN"),
        ({"importance": torch.ones(6, 24), "expansion": 2}, ValueError, "expand them before"),
        ({"importance": "attention"}, ValueError, "importance must be one of"),
        ({"calibration": None}, ValueError, "needs calibration data"),
        ({"calibration": torch.zeros(0, 24, dtype=torch.long)}, ValueError, "at least one of each"),
        ({"calibration": []}, ValueError, "at least one calibration sequence"),
        ({"calibration": [{"input_ids": torch.ones(1, 4)}]}, TypeError, "integer tensor"),
        ({"calibration": [{"input_ids": IDS, "attention_mask": 0 * IDS}]}, ValueError, "all padding"),
        ({"calibration": [{"input_ids": IDS, "attention_mask": IDS[:2]}]}, ValueError, "attention_mask of shape"),
        ({"expansion": 25}, ValueError, "copies"),
        ({"method": "awq"}, ValueError, "rsq, gptq, rtn"),
        ({"rotation": "half"}, ValueError, "rotation"),
        ({"weighted": ("v_proj", "w_proj")}, ValueError, "w_proj"),
        ({"damping": 0.0}, ValueError, "damping above 0"),
        ({"batch_size": 0}, ValueError, "batch_size"),
    ],
)
def test_bad_input_is_refused_before_the_model_changes(options, error, message):
    model = decoder("llama", **SMALL)
    before = _weights(model)
    options = {"calibration": IDS, **options}
    with pytest.raises(error, match=message):
        quantize_rsq(model, **options)
    assert _same(before, _weights(model))


def test_models_that_do_not_fit_are_refused(tmp_path):
    model = decoder("llama", **SMALL)
    result = quantize_rtn(model, 3)
    with pytest.raises(ValueError, match="quantised already"):
        quantize_rtn(model, 3)
    with pytest.raises(ValueError, match="quantised already"):
        quantize_rtn(load_quantized(result.save(tmp_path / "model")), 3)
    with pytest.raises(ValueError, match="order 50"):
        quantize_rsq(decoder("llama", hidden_size=50, num_attention_heads=5, num_key_value_heads=5, head_dim=10), IDS)
    with pytest.raises(ValueError, match="not a plain RMSNorm"):
        quantize_rsq(decoder("gemma"), IDS)
    adapted = decoder("llama", **SMALL)
    adapted.model.layers[1].mlp.up_proj = torch.nn.Sequential(adapted.model.layers[1].mlp.up_proj)
    with pytest.raises(ValueError, match=r"mlp\.up_proj in layer 1.*found Sequential"):
        quantize_gptq(adapted, IDS)
    with pytest.raises(ValueError, match="r_min"):
        Importance(r_min=0.5, r_max=0.1)
    with pytest.raises(ValueError, match="no list of decoder layers"):
        quantize_rtn(torch.nn.Linear(4, 4))


def test_a_failing_layer_leaves_the_host_as_it_was():
    model = decoder("llama", **SMALL)
    layers, implementation = model.model.layers, model.config._attn_implementation

    def broken(*_):
        raise RuntimeError("no")

    handle = model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match="no"):
        quantize_rsq(model, IDS, rotation="none")
    handle.remove()
    assert model.model.layers is layers
    assert model.config._attn_implementation == implementation
    assert not any(module._forward_pre_hooks for module in model.modules())
