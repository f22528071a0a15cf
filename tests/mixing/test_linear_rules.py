"""The rules of fixed state as regressors and as layers: the grid, reductions, padding, states, bad input."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from cenote.integrations import fla
from cenote.mixing import create_mixer
from cenote.mixing.registry import mixer_class
from cenote.mixing.regressor import RULES, create_regressor, grid, rule_name
from cenote.mixing.test_time_regression import TestTimeRegression
from reference import recurrences

B, H, K, V = 2, 4, 6, 5
LINEAR = [
    "linear_attention", "retention", "scalar_decay", "vector_decay", "delta_rule", "gated_delta", "gated_delta_product",
    "longhorn", "nlms", "momentum", "mini_batch",
]  # fmt: skip
OPTIONS = {"mini_batch": {"batch_tokens": 4}, "gated_delta_product": {"num_updates": 3}}
every_rule = pytest.mark.parametrize("rule", LINEAR)


def regressor(rule, **options):
    return create_regressor(rule, H, K, V, **{**OPTIONS.get(rule, {}), **options})


def numbers(fit, tokens, kv_heads=H, dtype=torch.float64):
    """Queries, keys, values and gates within their ranges."""
    pairs = fit.pairs
    q = torch.randn(B, H, tokens, K, dtype=dtype)
    k = F.normalize(torch.randn(B, kv_heads, pairs * tokens, K, dtype=dtype), dim=-1)
    v = torch.randn(B, kv_heads, pairs * tokens, V, dtype=dtype)
    gates = {}
    for name, gate in fit.gates.items():
        shape = (B, kv_heads, pairs * tokens if gate.paired else tokens, *((K,) if gate.per == "key" else ()))
        raw = torch.randn(shape, dtype=dtype)
        gates[name] = {"log": F.logsigmoid, "step": torch.sigmoid, "positive": F.softplus}[gate.range](raw)
    return q, k, v, gates


def part(fit, q, k, v, gates, begin, end):
    rows = slice(begin * fit.pairs, end * fit.pairs)
    cut = {name: gate[:, :, rows if fit.gates[name].paired else slice(begin, end)] for name, gate in gates.items()}
    return q[:, :, begin:end], k[:, :, rows], v[:, :, rows], cut


def test_every_rule_has_a_point_of_its_own_and_both_find_it():
    assert len(grid()) == len(RULES)
    for (weights, function, optimiser), name in grid().items():
        assert rule_name(weights=weights, function=function, optimiser=optimiser) == name
    assert rule_name(weights="decay", function="linear", optimiser="sgd") == "gated_delta"
    layer = TestTimeRegression(16, weights="uniform", function="linear", optimiser="sgd")
    assert type(layer.regressor) is type(create_mixer("delta_rule", dim=16).regressor)


def test_an_unknown_combination_lists_the_grid():
    with pytest.raises(ValueError, match=r"optimiser='adam'.*decay, linear, sgd \(gated_delta\)"):
        TestTimeRegression(16, weights="decay", function="linear", optimiser="adam")
    with pytest.raises(ValueError, match=r"weights='', function='affine'.*local, affine, exact \(local_linear\)"):
        TestTimeRegression(16, function="affine", optimiser="exact")
    with pytest.raises(ValueError, match="did you mean gated_delta"):
        TestTimeRegression(16, rule="gated_deltas")


def test_a_rule_is_given_once():
    for call in (
        lambda: TestTimeRegression(16, rule="nlms", weights="decay"),
        lambda: mixer_class("delta_rule")(16, rule="nlms"),
        lambda: mixer_class("delta_rule")(16, weights="decay"),
    ):
        with pytest.raises(ValueError, match="a rule is given once"):
            call()


def test_rules_are_their_definitions():
    """Each against the loop, with the published scale of queries."""
    for rule, define in {
        "linear_attention": lambda q, k, v: recurrences.linear(q, k, v, scale=K**-0.5),
        "scalar_decay": lambda q, k, v, g: recurrences.linear(q, k, v, g, scale=K**-0.5),
        "vector_decay": lambda q, k, v, g: recurrences.linear(q, k, v, g, scale=K**-0.5),
        "retention": lambda q, k, v: recurrences.linear(q, k, v, fixed(q), scale=K**-0.5),
        "delta_rule": lambda q, k, v, beta: recurrences.delta(q, k, v, beta, scale=K**-0.5),
        "gated_delta": lambda q, k, v, beta, g: recurrences.delta(q, k, v, beta, g, scale=K**-0.5),
        "gated_delta_product": lambda q, k, v, beta, g: recurrences.delta(q, k, v, beta, g),
        "longhorn": lambda q, k, v, alpha: recurrences.delta(q, k, v, alpha / (1 + alpha)),
        "nlms": lambda q, k, v: recurrences.delta(q, k, v, torch.full(k.shape[:3], 1 / (1 + 1e-6)).double()),
        "momentum": lambda q, k, v, beta, g, momentum: recurrences.momentum(
            q, k, v, beta, momentum.exp(), 1 - g.exp(), scale=K**-0.5
        ),
        "mini_batch": lambda q, k, v, beta: recurrences.mini_batch(q, k, v, beta, 4, scale=K**-0.5),
    }.items():
        fit = regressor(rule)
        q, k, v, gates = numbers(fit, 11)
        torch.testing.assert_close(
            fit.parallel(q, k, v, gates), define(q, k, v, **gates)[0], msg=lambda m, r=rule: r + m
        )


def fixed(q):
    decay = torch.log1p(-(2.0 ** (-5 - torch.arange(H, dtype=torch.float64))))
    return decay[:, None].expand(q.shape[:3])


@every_rule
def test_parallel_chunk_and_step_agree_wherever_the_sequence_is_cut(rule):
    fit = regressor(rule, **({} if rule == "mini_batch" else {"chunk_size": 4}))
    whole = numbers(fit, 14)
    out, state = [], None
    for begin, end in ((0, 5), (5, 6), (6, 7), (7, 14)):
        call = fit.step if end - begin == 1 else fit.chunk
        piece, state = call(*part(fit, *whole, begin, end), state)
        out.append(piece)
    torch.testing.assert_close(torch.cat(out, 2), fit.parallel(*whole))
    expected = fit.chunk(*whole)[1]
    for mine, theirs in zip(state, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


@every_rule
def test_padding_on_the_right_leaves_the_state_as_it_was(rule):
    fit = regressor(rule)
    whole = numbers(fit, 9)
    mask = torch.arange(9) < torch.tensor([[6], [9]])
    first = fit.chunk(*part(fit, *whole, 0, 3))[1]
    out, state = fit.chunk(*part(fit, *whole, 3, 9), first, mask[:, 3:])
    alone, after = fit.chunk(*part(fit, *whole, 3, 6), first)
    torch.testing.assert_close(out[0, :, :3], alone[0])
    for mine, theirs in zip(state, after, strict=True):
        torch.testing.assert_close(mine[0], theirs[0])
    nothing = fit.chunk(*part(fit, *whole, 3, 9), first, torch.zeros(B, 6, dtype=torch.bool))[1]
    for mine, theirs in zip(nothing, first, strict=True):
        torch.testing.assert_close(mine, theirs)


@every_rule
def test_query_heads_share_key_heads(rule):
    fit = regressor(rule)
    q, k, v, gates = numbers(fit, 5, kv_heads=2)
    repeated = {name: gate.repeat_interleave(2, 1) for name, gate in gates.items()}
    expected = fit.parallel(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), repeated)
    torch.testing.assert_close(fit.parallel(q, k, v, gates), expected)


def test_delta_products_of_one_step_are_the_gated_rule():
    product, gated = regressor("gated_delta_product", num_updates=1), regressor("gated_delta", scale=1.0)
    whole = numbers(gated, 9)
    torch.testing.assert_close(product.parallel(*whole), gated.parallel(*whole))


def test_implicit_steps_without_bound_are_full_delta_steps():
    q, k, v, gates = numbers(regressor("longhorn"), 9)
    one = {"beta": torch.ones_like(gates["alpha"])}
    far = regressor("longhorn").parallel(q, k, v, {"alpha": 1e10 * one["beta"]})
    torch.testing.assert_close(far, regressor("delta_rule", scale=1.0).parallel(q, k, v, one))


def test_mini_batches_change_the_result_and_chunks_do_not():
    whole = numbers(regressor("mini_batch"), 12)
    one, two = (regressor("mini_batch", batch_tokens=size).parallel(*whole) for size in (3, 6))
    assert float((one - two).abs().max()) > 1e-2
    a, b = (regressor("delta_rule", chunk_size=size).parallel(*whole) for size in (3, 6))
    torch.testing.assert_close(a, b)


def test_half_precision_input_has_a_float32_state():
    fit = regressor("gated_delta")
    out, (state,) = fit.chunk(*numbers(fit, 5)[:3], numbers(fit, 5)[3])
    assert out.dtype == state.dtype == torch.float64
    q, k, v, gates = numbers(fit, 5, dtype=torch.float32)
    low = {name: gate.bfloat16() for name, gate in gates.items()}
    assert fit.chunk(q.bfloat16(), k.bfloat16(), v.bfloat16(), low)[1][0].dtype == torch.float32


def test_bad_input_of_regressors():
    fit = regressor("gated_delta")
    q, k, v, gates = numbers(fit, 5)
    right, holes = torch.ones(B, 5, dtype=torch.bool), torch.tensor([[True, False, True, True, True]] * B)
    state = fit.initial_state(q)
    for change, message in (
        ({"k": k[:, :, :-1]}, "expects keys"),
        ({"k": k[..., :-1]}, "expects keys"),
        ({"v": v[:1]}, "expects values"),
        ({"q": q[0]}, "head_dim\\) thrice"),
        ({"k": k[:, :3]}, "4 query heads cannot share 3"),
        ({"q": q[:, :, :0], "k": k[:, :, :0], "v": v[:, :, :0]}, "at least one token"),
        ({"gates": {"g": gates["g"]}}, r"needs the gates \['beta', 'g'\]"),
        ({"gates": {**gates, "g": gates["g"][..., None]}}, "expects g of shape"),
        ({"gates": {**gates, "g": -gates["g"]}}, "expects g from -inf to 0"),
        ({"gates": {**gates, "g": torch.full_like(gates["g"], torch.nan)}}, "expects g from -inf to 0, got nan"),
        ({"gates": {**gates, "beta": 3 * torch.ones_like(gates["g"])}}, "expects beta from 0 to 2, got 3"),
        ({"state": (torch.full_like(state[0], torch.nan),)}, "NaN or infinity"),
        ({"state": (state[0][..., :-1],)}, "expects a state of shapes"),
        ({"state": ()}, "expects a state of shapes"),
        ({"mask": right[:, :-1]}, r"a mask \(batch, 5\)"),
        ({"mask": holes}, "padding on the right only"),
    ):
        given = {"q": q, "k": k, "v": v, "gates": gates, "state": None, "mask": None, **change}
        with pytest.raises(ValueError, match=message):
            fit.chunk(**given)


def test_bad_settings():
    for spec, message in (
        ("delta_rule(num_heads=5)", "dim=48 is not divisible by num_heads=5"),
        ("delta_rule(num_heads=6, num_kv_heads=4)", "6 query heads cannot share 4"),
        ("delta_rule(conv_on='x')", "some of 'qkv'"),
        ("delta_rule(max_step=3.0)", r"max_step must lie in \(0, 2\]"),
        ("delta_rule(qk_norm='layer')", "qk_norm is l2, rms or none"),
        ("delta_rule(expand_v=0.3)", "whole"),
        ("delta_rule(num_updates=2)", "takes no option"),
        ("delta_rule(rule='nlms')", "takes no option"),
        ("delta_rule(causal=False)", "takes no option"),
        ("test_time_regression(num_updates=2)", "gated_delta takes no option"),
        ("test_time_regression(rule='ridge', ridge=0.0)", "ridge must be above 0"),
        ("gated_delta_product(num_updates=0)", "num_updates must be at least 1"),
        ("mini_batch(batch_tokens=0)", "batch_tokens must be at least 1"),
        ("linear_attention(normalise=True)", "needs positive features"),
        ("linear_attention(feature_map='relu')", "feature_map must be"),
        ("nlms(eps=0.0)", "eps must be above 0"),
        ("gated_delta(chunk_size=0)", "chunk_size must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            create_mixer(spec, dim=48)


def test_the_general_mixer_takes_the_settings_of_its_rule():
    general = create_mixer("test_time_regression(rule='gated_delta_product', num_updates=3)", dim=16)
    assert general.regressor.pairs == 3
    named = create_mixer("gated_delta_product(num_updates=3)", dim=16)
    named.load_state_dict(general.state_dict())
    x = torch.randn(2, 5, 16)
    assert torch.equal(general(x), named(x))


@pytest.mark.parametrize("rule", [*LINEAR, "ridge", "local_linear", "ttt_mlp"])
def test_packed_sequences_do_not_see_each_other(rule):
    mixer = create_mixer(rule, dim=16, num_heads=2).double()
    x, ends = torch.randn(12, 16, dtype=torch.float64), torch.tensor([0, 1, 5, 12])
    alone = [mixer(x[None, begin:end])[0] for begin, end in pairwise(ends.tolist())]
    torch.testing.assert_close(mixer.packed(x, ends), torch.cat(alone))
    for wrong in ([0, 5], [1, 12], [0, 5, 5, 12], [0, 7, 5, 12], [0]):
        with pytest.raises(ValueError, match="cu_seqlens grows from 0 to the 12 tokens"):
            mixer.packed(x, torch.tensor(wrong))


def test_a_state_of_another_batch_is_refused_by_the_layer():
    mixer = create_mixer("gated_delta", dim=16)
    x = torch.randn(3, 4, 16)
    state = mixer.chunk(x)[1]
    with pytest.raises(ValueError, match=r"continues from inputs \(1, 3, 16\), got \(3, 3, 16\)"):
        mixer.chunk(x[:1], state)
    with pytest.raises(ValueError, match="expects a state of"):
        mixer.step(x[:1, 0], tuple(part[:1] for part in state[:3]) + state[3:])


def test_padding_between_tokens_is_refused_by_the_layer():
    mixer = create_mixer("gated_delta", dim=16)
    with pytest.raises(ValueError, match=r"row\(s\) \[1\] have it in between"):
        mixer(torch.randn(2, 4, 16), torch.tensor([[False, True, True, False], [True, False, True, True]]))


@pytest.mark.parametrize("rule", ["gated_delta", "momentum", "mini_batch", "retention"])
def test_padding_stops_decays_steps_and_convolutions(rule):
    """A state handed on over padding, on either side, is that of the real tokens alone."""
    mixer = create_mixer(rule, dim=16, num_heads=2).double()
    x = torch.randn(1, 9, 16, dtype=torch.float64)
    whole = mixer(x)
    state, outs = None, []
    for begin, end, left, right in ((0, 2, 3, 0), (2, 3, 0, 4), (3, 9, 2, 2)):
        padded = F.pad(x[:, begin:end], (0, 0, left, right), value=7.0)
        mask = torch.zeros(1, padded.shape[1], dtype=torch.bool)
        mask[:, left : left + end - begin] = True
        out, state = mixer.chunk(padded, state, mask)
        outs.append(out[mask])
    torch.testing.assert_close(torch.cat(outs)[None], whole)


def test_convolutions_stand_where_they_are_asked_for():
    mixer = create_mixer("delta_rule(conv_on='k', conv_size=3)", dim=16)
    names = set(dict(mixer.named_parameters()))
    assert "k_conv1d.weight" in names
    assert not names & {"q_conv1d.weight", "v_conv1d.weight"}
    assert mixer.k_conv1d.weight.shape == (16, 1, 3)
    past, state = mixer.initial_state(torch.randn(2, 1, 16))
    assert past.shape == (2, 2, 16)
    assert state.shape == (2, 4, 4, 4)


def test_key_names_and_shapes_of_published_gated_delta_layers():
    """Those of flash-linear-attention's Gated DeltaNet at 1.3B: width 2048, 6 heads of 256, values twice as wide."""
    with torch.device("meta"):
        mixer = create_mixer("gated_delta", dim=2048, num_heads=6, head_dim=256, expand_v=2.0)
    assert {name: tuple(p.shape) for name, p in mixer.named_parameters()} == {
        "A_log": (6,), "dt_bias": (6,), "a_proj.weight": (6, 2048), "b_proj.weight": (6, 2048),
        "q_proj.weight": (1536, 2048), "k_proj.weight": (1536, 2048), "v_proj.weight": (3072, 2048),
        "q_conv1d.weight": (1536, 1, 4), "k_conv1d.weight": (1536, 1, 4), "v_conv1d.weight": (3072, 1, 4),
        "g_proj.weight": (3072, 2048), "o_norm.weight": (512,), "o_proj.weight": (2048, 3072),
    }  # fmt: skip
    source = create_mixer("gated_delta", dim=24, num_heads=2, head_dim=8)
    copy = TestTimeRegression.from_reference(source.state_dict(), rule="gated_delta", num_heads=2, head_dim=8)
    x = torch.randn(2, 7, 24)
    assert torch.equal(copy(x), source(x))


def test_the_layer_is_its_parts():
    """Projection, convolution, SiLU, norm, gates, rule, gated norm, projection, each written out."""
    mixer = create_mixer("gated_delta", dim=16, num_heads=2, max_step=2.0).double()
    x = torch.randn(2, 7, 16, dtype=torch.float64)

    def heads(part):
        y = F.pad(getattr(mixer, f"{part}_proj")(x).mT, (3, 0))
        y = F.silu(F.conv1d(y, getattr(mixer, f"{part}_conv1d").weight, groups=16)).mT
        return y.reshape(2, 7, 2, 8).transpose(1, 2)

    q, k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in map(heads, "qk"))
    g = -(mixer.A_log.exp() * F.softplus(mixer.a_proj(x) + mixer.dt_bias)).mT
    out, _ = recurrences.delta(q, k, heads("v"), 2 * mixer.b_proj(x).sigmoid().mT, g, scale=8**-0.5)
    out = F.rms_norm(out, (8,), mixer.o_norm.weight, 1e-5).transpose(1, 2).flatten(2)
    torch.testing.assert_close(mixer(x), mixer.o_proj(out * F.silu(mixer.g_proj(x))))


def test_kernels_of_flash_linear_attention_are_handed_the_same_problem(monkeypatch):
    """A stand-in for the library, which computes by the loops with tokens before heads as its kernels do."""
    used = []

    def stand_in(kernel):
        def function(q, k, v, scale, initial_state, output_final_state, g=None, beta=None, **settings):
            used.append((kernel, settings))
            turned = [None if x is None else x.transpose(1, 2).float() for x in (q, k, v, beta, g)]
            q, k, v, beta, g = turned
            if beta is None:
                out, state = recurrences.linear(q, k, v, g, initial_state, scale)
            else:
                out, state = recurrences.delta(q, k, v, beta, g, initial_state, scale)
            return out.transpose(1, 2), state

        return function

    monkeypatch.setattr(fla, "usable", lambda dtype, device: dtype == torch.bfloat16)
    monkeypatch.setattr(fla, "find", stand_in)
    for rule, expected in {
        "linear_attention": ("linear_attn", {"normalize": False}),
        "scalar_decay": ("simple_gla", {}),
        "vector_decay": ("gla", {}),
        "delta_rule": ("delta_rule", {}),
        "longhorn": ("delta_rule", {}),
        "gated_delta": ("gated_delta_rule", {}),
        "gated_delta_product": ("gated_delta_product", {"num_householder": 3}),
    }.items():
        fit = regressor(rule)
        q, k, v, gates = numbers(fit, 7, dtype=torch.float32)
        low = [x.bfloat16() for x in (q, k, v)]
        state = fit.chunk(q, k, v, gates)[1]
        out, after = fit.chunk(*low, gates, state)
        assert used.pop() == expected
        wide, final = fit.chunk(*(x.float() for x in low), gates, state)
        assert not used
        torch.testing.assert_close(out, wide)
        torch.testing.assert_close(after, final)
