"""Ridge, kernel ridge, local and inner-network rules behind the interface of all rules, and in the layer."""

import pytest
import torch

from cenote.mixing.regressor import RULES, create_regressor, rule_name
from cenote.mixing.test_time_regression import TestTimeRegression
from cenote.ops.gates import share_heads

NAMES = ("ridge", "kernel_ridge", "local_constant", "local_linear", "parallax", "taylor2", "ttt_mlp", "titans_mlp")
BATCH, HEADS, TOKENS, KEY, VALUE = 2, 2, 11, 4, 3
VARIANTS = {
    "ridge": {"solver": "cg", "chunk_size": 4},
    "kernel_ridge": {"kernel": "dot"},
    "local_constant": {"kernel": "gaussian"},
    "local_linear": {"solver": "cg", "kernel": "gaussian"},
    "ttt_mlp": {"batch_tokens": 4},
    "titans_mlp": {"batch_tokens": 1},
}
CASES = [(name, {}) for name in NAMES] + list(VARIANTS.items())


def make(name, options, heads=HEADS, kv_heads=HEADS, tokens=TOKENS):
    """A regressor in float64 with random input for it."""
    torch.manual_seed(1)
    regressor = create_regressor(name, heads, KEY, VALUE, **options).double()
    q = torch.randn(BATCH, heads, tokens, KEY, dtype=torch.float64)
    k, v = (torch.randn(BATCH, kv_heads, tokens, width, dtype=torch.float64) for width in (KEY, VALUE))
    k = torch.nn.functional.normalize(k, dim=-1)
    gates = {}
    for gate_name, gate in regressor.gates.items():
        raw = torch.rand(BATCH, heads, tokens, *((KEY,) if gate.per == "key" else ()), dtype=torch.float64)
        gates[gate_name] = -raw if gate.range == "log" else raw
    return regressor, q, k, v, gates


def cut(part, q, k, v, gates):
    return *(x[:, :, part] for x in (q, k, v)), {name: gate[:, :, part] for name, gate in gates.items()}


@pytest.mark.parametrize(("name", "options"), CASES)
def test_three_calls_agree(name, options):
    regressor, *given = make(name, options)
    whole = regressor.parallel(*given)
    for lengths in ((1,) * TOKENS, (1, 6, 4), (5, 6)):
        state, parts, start = None, [], 0
        for length in lengths:
            call = regressor.step if length == 1 else regressor.chunk
            out, state = call(*cut(slice(start, start + length), *given), state)
            parts.append(out)
            start += length
        torch.testing.assert_close(torch.cat(parts, dim=2), whole)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_padding_is_neutral_in_output_and_state(name, options):
    regressor, *given = make(name, options)
    mask = torch.ones(BATCH, 6, dtype=torch.bool)
    mask[0, 4:] = False
    first, state = regressor.chunk(*cut(slice(0, 6), *given), None, mask)
    second = regressor.chunk(*cut(slice(6, TOKENS), *given), state)[0]
    keep = [0, 1, 2, 3, *range(6, TOKENS)]
    *rows, gates = cut(keep, *given)
    alone = regressor.parallel(*(x[:1] for x in rows), {gate: numbers[:1] for gate, numbers in gates.items()})
    torch.testing.assert_close(torch.cat([first[:1, :, :4], second[:1]], dim=2), alone)


@pytest.mark.parametrize("name", NAMES)
def test_shared_key_and_value_heads_are_repeated_heads(name):
    regressor, q, k, v, gates = make(name, {}, heads=4, kv_heads=2)
    expected = regressor.parallel(q, share_heads(k, 4), share_heads(v, 4), gates)
    torch.testing.assert_close(regressor.parallel(q, k, v, gates), expected)


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_is_solved_in_float32(name):
    regressor, q, k, v, gates = make(name, {})
    exact = regressor.float().parallel(
        *(x.bfloat16().float() for x in (q, k, v)), {n: g.float() for n, g in gates.items()}
    )
    with torch.autocast("cpu", torch.bfloat16):
        out, state = regressor.chunk(*(x.bfloat16() for x in (q, k, v)), {n: g.float() for n, g in gates.items()})
    assert out.dtype == torch.float32
    assert {part.dtype for part in state if part.is_floating_point()} == {torch.float32}
    torch.testing.assert_close(out, exact, rtol=1e-5, atol=1e-5)


def test_names_of_the_grid():
    assert set(NAMES) <= set(RULES)
    assert rule_name(weights="decay", function="linear", optimiser="exact") == "ridge"
    assert rule_name(weights="local", function="affine", optimiser="exact") == "local_linear"
    with pytest.raises(ValueError, match=r"local, affine, exact \(local_linear\)"):
        rule_name(weights="local", function="mlp", optimiser="exact")


@pytest.mark.parametrize("name", NAMES)
def test_states_that_do_not_fit_are_refused(name):
    regressor, *given = make(name, {})
    state = regressor.chunk(*given)[1]
    broken = tuple(x.new_full(x.shape, torch.nan) if x.is_floating_point() else x for x in state)
    for bad, message in (
        (broken, "NaN or infinity"),
        (state[:-1], "expects a state of shapes"),
        (tuple(x[:1] for x in state), "expects a state of"),
    ):
        with pytest.raises(ValueError, match=message):
            regressor.chunk(*given, bad)


def test_lambda_is_learned():
    mixer = TestTimeRegression(8, num_heads=2, rule="ridge", ridge=0.5)
    mixer(torch.randn(2, 9, 8)).square().sum().backward()
    assert mixer.regressor.log_ridge.grad.abs().min() > 0
    torch.testing.assert_close(mixer.regressor.log_ridge.exp(), torch.full((2, 4), 0.5))
    fixed = TestTimeRegression(8, num_heads=2, rule="ridge", learn_ridge=False)
    assert not fixed.regressor.log_ridge.requires_grad


@pytest.mark.parametrize("rule", ["ridge", "ttt_mlp"])
def test_a_state_is_fixed_in_size(rule):
    mixer = TestTimeRegression(8, num_heads=2, rule=rule)
    states = [mixer.chunk(torch.randn(1, tokens, 8))[1] for tokens in (3, 20)]
    assert [x.shape for x in states[0]] == [x.shape for x in states[1]]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ridge", {"ridge": 0.0}, "above 0"),
        ("ridge", {"ridge": float("nan")}, "above 0"),
        ("kernel_ridge", {"ridge": -1.0}, "above 0"),
        ("local_linear", {"ridge": 0.0}, "above 0"),
        ("ttt_mlp", {"batch_tokens": 0}, "at least 1"),
        ("ttt_mlp", {"rate": 3.0}, "at most 2"),
        ("parallax", {"window": 4}, "window"),
    ],
)
def test_refuses_settings(name, options, message):
    with pytest.raises(ValueError, match=message):
        create_regressor(name, HEADS, KEY, VALUE, **options)


def test_refuses_a_missing_gate():
    regressor, q, k, v, _ = make("parallax", {})
    with pytest.raises(ValueError, match=r"\['r'\]"):
        regressor.parallel(q, k, v)
