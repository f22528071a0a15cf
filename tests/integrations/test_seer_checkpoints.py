"""Published gates: key names and sizes of both variants, what a folder becomes, and folders that are refused."""

import json

import pytest
import torch

from attention_hosts import decoder, padded
from cenote.attention import SeerAttention
from cenote.attention.seer_gate import DecodeGate, PrefillGate
from cenote.integrations.seer_checkpoints import CONFIG, WEIGHTS, gate_states, load_seer_attention, read_published

PREFILL = {  # layers, heads, key and value heads, megabytes of the file
    "Llama-3.1-8B": (32, 32, 8, 101),
    "Llama-3.1-70B": (80, 64, 8, 503),
    "Qwen2.5-7B": (28, 28, 4, 77),
    "Qwen2.5-14B": (48, 40, 8, 189),
    "Qwen2.5-32B": (64, 40, 8, 252),
}
DECODE = {
    "Qwen3-4B": (36, 32, 8, 66),
    "Qwen3-8B": (36, 32, 8, 66),
    "Qwen3-14B": (40, 40, 8, 84),
    "R1-Distill-Qwen-14B": (48, 40, 8, 101),
}


def key(layer, name):
    return f"model.layers.{layer}.self_attn.attn_gate.{name}.weight"


@pytest.mark.parametrize("name", PREFILL)
def test_prefill_gates_at_published_sizes(name):
    layers, heads, kv_heads, megabytes = PREFILL[name]
    with torch.device("meta"):
        state = {key(n, "mask_linear_k"): torch.empty(heads, 384, 128, dtype=torch.bfloat16) for n in range(layers)}
        gate = PrefillGate(heads, kv_heads, 128, 64, 128)
    states = gate_states(state)
    assert list(states) == list(range(layers))
    for weights in states.values():
        gate.load_state_dict(weights, assign=True)
    assert round(sum(w.numel() * w.itemsize for w in state.values()) / 1e6) == megabytes


def test_doubled_prefill_gates():
    with torch.device("meta"):
        state = {key(0, "mask_linear_k"): torch.empty(8, 384, 128), key(0, "mask_linear_q"): torch.empty(32, 128, 128)}
        PrefillGate(32, 8, 128, 64, 128, force_double=True).load_state_dict(gate_states(state)[0], assign=True)


@pytest.mark.parametrize("name", DECODE)
def test_decode_gates_at_published_sizes(name):
    layers, heads, kv_heads, megabytes = DECODE[name]
    with torch.device("meta"):
        shapes = {
            "attngate_linear_q": (kv_heads, heads // kv_heads, 128, 128), "attngate_linear_k": (kv_heads, 384, 128),
            "attngate_qnorm": (128,), "attngate_knorm": (128,),
        }  # fmt: skip
        state = {
            key(n, part): torch.empty(shape, dtype=torch.bfloat16)
            for n in range(layers)
            for part, shape in shapes.items()
        }
        gate = DecodeGate(heads, kv_heads, 128, 64, 128)
    for weights in gate_states(state).values():
        gate.load_state_dict(weights, assign=True)
    assert round(sum(w.numel() * w.itemsize for w in state.values()) / 1e6) == megabytes


def folder(path, state, **config):
    torch.save(state, path / WEIGHTS)
    (path / CONFIG).write_text(json.dumps(config))
    return path


def small(layers=4):
    return {key(n, "mask_linear_k"): torch.randn(6, 24, 8) for n in range(layers)}


SETTINGS = {
    "base_model": "some/llama", "seerattn_gate_type": "Qavg_Kmaxminavg", "seerattn_gate_block_size": 8,
    "seerattn_gate_hidden_size": 8, "seerattn_gate_force_double": False, "seerattn_sparsity_method": "threshold",
    "seerattn_threshold": 0.05, "seerattn_nz_ratio": 1.0, "seerattn_last_block_dense": False,
}  # fmt: skip


def test_a_published_folder_becomes_a_recipe(tmp_path):
    state = small()
    recipe = load_seer_attention(folder(tmp_path, state, **SETTINGS))
    assert recipe == SeerAttention(block_size=8, hidden_size=8, threshold=0.05, last_block_dense=False)
    assert all(torch.equal(recipe.gates[f"{n}.key.weight"], state[key(n, "mask_linear_k")]) for n in range(4))
    ids, _ = padded((60,))
    with recipe(decoder("llama")) as session, torch.no_grad():
        session.host.model(input_ids=ids)
    assert 0 < session.density() < 1
    kept = load_seer_attention(tmp_path, nz_ratio=0.3)
    assert (kept.nz_ratio, kept.threshold) == (0.3, None)
    by_ratio = {**SETTINGS, "seerattn_sparsity_method": "nz_ratio", "seerattn_nz_ratio": 0.25}
    kept = load_seer_attention(folder(tmp_path, state, **by_ratio))
    assert (kept.nz_ratio, kept.threshold) == (0.25, None)


def test_gates_of_another_model_are_refused(tmp_path):
    recipe = load_seer_attention(folder(tmp_path, small(3), **SETTINGS))
    with pytest.raises(ValueError, match="do not fit this model of 4 layers"), recipe(decoder("llama")):
        pass
    recipe = load_seer_attention(folder(tmp_path, small(4), **{**SETTINGS, "seerattn_gate_type": "Qavg_Kavg"}))
    with pytest.raises(ValueError, match=r"is \(6, 24, 8\).*need \(6, 8, 8\)"), recipe(decoder("llama")):
        pass


def test_folders_that_are_refused(tmp_path):
    with pytest.raises(ValueError, match="published gates are a folder with"):
        read_published(tmp_path)
    with pytest.raises(ValueError, match="names no base_model"):
        read_published(folder(tmp_path, small(), seerattn_threshold=0.1))
    with pytest.raises(ValueError, match="is no weight of a gate"):
        read_published(folder(tmp_path, {"model.layers.0.mlp.weight": torch.zeros(1)}, **SETTINGS))
    with pytest.raises(ValueError, match="holds no weights"):
        read_published(folder(tmp_path, {}, **SETTINGS))
    with pytest.raises(ValueError, match="sparsity_method must be"):
        load_seer_attention(folder(tmp_path, small(), **{**SETTINGS, "seerattn_sparsity_method": "top"}))
    silent = {name: value for name, value in SETTINGS.items() if name != "seerattn_threshold"}
    with pytest.raises(ValueError, match="by threshold and gives none"):
        load_seer_attention(folder(tmp_path, small(), **silent))
    assert load_seer_attention(tmp_path, nz_ratio=0.3).nz_ratio == 0.3
    with pytest.raises(ValueError, match="decode variant"):
        load_seer_attention(folder(tmp_path, {key(0, "attngate_linear_k"): torch.zeros(2, 24, 8)}, **SETTINGS))
    (tmp_path / WEIGHTS).write_bytes(b"junk")
    with pytest.raises(ValueError, match="holds no published gates"):
        read_published(tmp_path)
    folder(tmp_path, small(), **SETTINGS)
    torch.save({"a": print}, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match="holds no published gates"):
        read_published(tmp_path)
