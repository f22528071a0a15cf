"""SeerAttention's gates against plain loops, and their sizes."""

import pytest
import torch
from torch import nn

from cenote.attention.seer_gate import DecodeGate, PrefillGate

HEADS, KV_HEADS, DIM, SIZE = 4, 2, 6, 5


def plain(gate, query, key, cos, sin, hidden):
    """One pair of blocks at a time."""
    kinds = {"max": lambda x: x.amax(0), "min": lambda x: x.amin(0), "avg": lambda x: x.mean(0)}
    tokens = query.shape[2]
    blocks = -(-tokens // SIZE)
    out = torch.full((1, HEADS, blocks, blocks), -1e30)

    def turned(x, place):
        head, rest = x[:DIM], x[DIM:]
        half = torch.cat([-head[DIM // 2 :], head[: DIM // 2]])
        return torch.cat([head * cos[0, place] + half * sin[0, place], rest])

    for h in range(HEADS):
        for i in range(blocks):
            for j in range(i + 1):
                q = torch.cat([kinds[kind](query[0, h, SIZE * i : SIZE * i + SIZE]) for kind in gate.query_kinds])
                kv = h // (HEADS // KV_HEADS)
                k = torch.cat([kinds[kind](key[0, kv, SIZE * j : SIZE * j + SIZE]) for kind in gate.key_kinds])
                if gate.query is not None:
                    q = q @ gate.query.weight[h]
                    k = k @ gate.key.weight[kv]
                else:
                    k = k @ gate.key.weight[h]
                out[0, h, i, j] = turned(q, SIZE * i) @ turned(k, SIZE * j) / hidden**0.5
    return out


@pytest.mark.parametrize("hidden", [6, 9])
@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("gate_type", ["Qavg_Kmaxminavg", "Qmaxmin_Kavg", "Qmin_Kminmax", "Qmaxminavg_Kmax"])
def test_prefill_gate_equals_plain_loops(gate_type, force, hidden):
    gate = PrefillGate(HEADS, KV_HEADS, DIM, SIZE, hidden, gate_type, force)
    single = not gate_type.startswith("Qmax") and hidden == DIM and not force
    assert (gate.query is None) == single
    assert gate.key.weight.shape[0] == (HEADS if single else KV_HEADS)
    query, key = torch.randn(1, HEADS, 23, DIM), torch.randn(1, KV_HEADS, 23, DIM)
    angles = torch.rand(1, 23, DIM // 2).repeat(1, 1, 2)
    cos, sin = angles.cos(), angles.sin()
    with torch.no_grad():
        torch.testing.assert_close(gate(query, key, (cos, sin)), plain(gate, query, key, cos, sin, hidden))


def test_gates_run_in_float32_under_autocast_and_take_bfloat16():
    gate = PrefillGate(HEADS, KV_HEADS, DIM, SIZE)
    query, key = torch.randn(1, HEADS, 23, DIM), torch.randn(1, KV_HEADS, 23, DIM)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(gate(query, key, None), gate(query.clone(), key, None))
        assert gate(query, key, None).dtype == torch.float32
        inside = gate(query, key, None)
    assert torch.equal(inside, gate(query, key, None))
    assert gate(query.bfloat16(), key.bfloat16(), None).dtype == torch.float32


@pytest.mark.parametrize("query_pooling", ["Qproj", "Qavgproj", "Qavg"])
@pytest.mark.parametrize("qk_norm", [True, False])
def test_decode_gate_equals_plain_sums(query_pooling, qk_norm):
    gate = DecodeGate(HEADS, KV_HEADS, DIM, SIZE, query_pooling=query_pooling, qk_norm=qk_norm)
    query, key = torch.randn(1, HEADS, 3, DIM), torch.randn(1, KV_HEADS, 13, DIM)
    with torch.no_grad():
        found, keys = gate.queries(query, None), gate.keys(key, None)
    assert keys.shape == (1, KV_HEADS, 3, DIM)
    for kv in range(KV_HEADS):
        group = query[0, 2 * kv : 2 * kv + 2]
        if query_pooling == "Qproj":
            expected = group[0] @ gate.query.weight[2 * kv] + group[1] @ gate.query.weight[2 * kv + 1]
        else:
            expected = group.mean(0) if gate.query is None else group.mean(0) @ gate.query.weight[kv]
        if qk_norm:
            expected = nn.functional.rms_norm(expected, (DIM,), eps=1e-6)
        torch.testing.assert_close(found[0, kv], expected.detach())


@pytest.mark.parametrize("kind", [PrefillGate, DecodeGate])
def test_bad_sizes_are_refused(kind):
    with pytest.raises(ValueError, match="5 query heads do not share 2 key and value heads"):
        kind(5, 2, DIM)
    with pytest.raises(ValueError, match="block_size must be at least 1, got 0"):
        kind(4, 2, DIM, 0)
    with pytest.raises(ValueError, match="query_pooling"):
        DecodeGate(4, 2, DIM, query_pooling="Qmax")
    with pytest.raises(ValueError, match="hidden_size cannot be 9"):
        DecodeGate(4, 2, DIM, hidden_size=9, query_pooling="Qavg")
