"""Test-time regression: the rules on queries, keys, values and gates, each in the form the library computes by default.

Everything but ``local-regression`` is laid out ``(batch, tokens, heads, ...)`` (``"bthd"``) or with the heads in front.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from cenote.ops.delta_rule import chunk_delta_rule, implicit_step
from cenote.ops.gates import share_heads
from cenote.ops.linear_recurrence import (
    add_normaliser,
    chunk_feature_decay,
    chunk_linear,
    divide_by_normaliser,
    elu_features,
    retention_log_decay,
)
from cenote.ops.local_regression import local_constant, local_polynomial, parallax
from cenote.ops.ridge_recurrence import RidgeState, initial_ridge_state, ridge_recurrence
from cenote.ops.taylor_attention import taylor_attention
from golden.cases import Case

LAYOUTS = ("bthd", "bhtd")
PER_HEAD = {"lamb", "initial_state", "initial_kk", "initial_kv"}
KERNEL, WEIGHTS = "exp(scale*q.k)", "softmax-normalised before the ridge is added"

Inputs = dict[str, Tensor]
Results = dict[str, Tensor]


def _linear(x: Inputs, config: dict) -> Results:
    q, k, v = x["q"], x["k"], x["v"]
    o, state = chunk_linear(q, k, v, x.get("g"), x.get("initial_state"), scale=_scale(q, config))
    results = {"o": o, "final_state": state}
    if "g" not in x:
        mapped = chunk_linear(elu_features(q), elu_features(k), add_normaliser(v))[0]
        results["o_elu1_normalized"] = divide_by_normaliser(mapped)
    return results


def _retention(x: Inputs, config: dict) -> Results:
    q = x["q"]
    g = retention_log_decay(q.shape[1]).to(q.dtype)[:, None].expand(q.shape[:3])
    return _linear({**x, "g": g}, config)


def _vector_decay(x: Inputs, config: dict) -> Results:
    q, state = x["q"], x.get("initial_state")
    o, state = chunk_feature_decay(q, x["k"], x["v"], x["gk"], state, scale=_scale(q, config))
    return {"o": o, "final_state": state}


def _delta(x: Inputs, config: dict, scale: float | None = None) -> Results:
    q, k = x["q"], x["k"]
    if config.get("num_updates", k.shape[2] // q.shape[2]) * q.shape[2] != k.shape[2]:
        raise ValueError(f"num_updates={config['num_updates']} with {k.shape[2]} keys for {q.shape[2]} tokens")
    beta = x.get("beta", torch.ones_like(k[..., 0]))
    scale = _scale(q, config, scale)
    o, state = chunk_delta_rule(q, k, x["v"], beta, x.get("g"), x.get("initial_state"), scale=scale)
    return {"o": o, "final_state": state}


def _delta_product(x: Inputs, config: dict) -> Results:
    return _delta(x, config, scale=1.0)


def _implicit(x: Inputs, config: dict) -> Results:
    return _delta({**x, "beta": implicit_step(x["k"], x["alpha"])}, config, scale=1.0)


def _ridge(x: Inputs, config: dict) -> Results:
    q, k, v = x["q"], x["k"], x["v"]
    empty = initial_ridge_state(k, v.shape[-1])
    state = RidgeState(x.get("initial_kk", empty.gram), x.get("initial_kv", empty.cross))
    ridge = x["lamb"] if "lamb" in x else config["ridge"]
    q = q * _scale(q, config, 1.0)
    o, after = ridge_recurrence(q, k, v, ridge, x.get("g"), x.get("beta"), state)
    return {"o": o, "final_kk": after.gram, "final_kv": after.cross}


def _taylor(x: Inputs, config: dict) -> Results:
    return {"o": taylor_attention(x["q"], x["k"], x["v"], scale=_scale(x["q"], config), eps=1e-6)}


def _parallax(x: Inputs, config: dict) -> Results:
    window = config.get("window_size")
    causal = config.get("causal", True)
    scale = _scale(x["q"], config)
    return {"o": parallax(x["q"], x["k"], x["v"], x["r"], causal=causal, scale=scale, window=window)}


def _local_linear(x: Inputs, config: dict) -> Results:
    if config.get("kernel", KERNEL) != KERNEL or config.get("weights", WEIGHTS) != WEIGHTS:
        raise ValueError(f"unknown kernel {config['kernel']!r} or weights {config['weights']!r}")
    # As the reference, which solves in float64: rows may see nearly one pair only.
    q, k, v = (x[name].double() for name in "qkv")
    return {"o": local_polynomial(q, k, v, ridge=config["ridge"], scale=_scale(q, config))}


def _local_regression(x: Inputs, config: dict) -> Results:
    if config.get("causal", False) or not isinstance(config["bandwidth"], (int, float)):
        raise ValueError(f"expected causal=False and one bandwidth, got {config}")
    q, k, v = (x[name].double()[None, None] for name in "qkv")
    settings = {"causal": False, "kernel": "gaussian", "scale": config["bandwidth"] ** -2}
    return {
        "local_constant": local_constant(q, k, v, **settings)[0, 0],
        "local_linear": local_polynomial(q, k, v, ridge=config.get("ridge", 0.0), **settings)[0, 0],
    }


RULES: dict[str, tuple[Callable[[Inputs, dict], Results], set[str], set[str]]] = {
    # start of the target: the rule, further inputs that it knows, settings that it knows
    "naive_recurrent_linear_attn": (_linear, {"initial_state"}, {"scale"}),
    "naive_recurrent_simple_gla": (_linear, {"g", "initial_state"}, {"scale"}),
    "naive_retention": (_retention, {"initial_state"}, {"scale"}),
    "naive_recurrent_gla": (_vector_decay, {"gk", "initial_state"}, {"scale"}),
    "delta_rule_recurrence": (_delta, {"beta", "initial_state"}, {"scale"}),
    "naive_recurrent_gated_delta_rule": (_delta, {"beta", "g", "initial_state"}, {"scale"}),
    "naive_recurrent_gated_delta_product": (
        _delta_product,
        {"beta", "g", "initial_state"},
        {"scale", "num_updates"},
    ),
    "S_t = argmin": (_implicit, {"alpha", "initial_state"}, {"scale"}),
    "naive_mesa_net_exact": (_ridge, {"g", "beta", "lamb", "initial_kk", "initial_kv"}, {"scale", "ridge"}),
    "naive_parallel_based": (_taylor, set(), {"scale"}),
    "naive_parallax": (_parallax, {"r"}, {"scale", "window_size", "causal"}),
    "causal local linear attention": (_local_linear, set(), {"scale", "ridge", "kernel", "qk_norm", "weights"}),
    "KernelReg": (_local_regression, set(), {"bandwidth", "causal", "ridge"}),
}


@torch.no_grad()
def run(case: Case) -> Results:
    matching = [start for start in RULES if case.target.startswith(start)]
    if not matching:
        raise ValueError(f"unknown target {case.target!r}")
    rule, inputs, settings = RULES[max(matching, key=len)]
    unknown = sorted({*case.inputs} - {"q", "k", "v"} - inputs) + sorted({*case.config} - {"layout"} - settings)
    if unknown:
        raise ValueError(f"unknown inputs or settings {unknown}")
    layout = case.config.get("layout", "nd" if rule is _local_regression else "bthd")
    if rule is _local_regression:
        if layout != "nd":
            raise ValueError(f"unknown layout {layout!r}")
        return rule(case.inputs, case.config)
    if layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}")
    return _turned(rule(_heads_first(case.inputs, layout), case.config), layout)


def _heads_first(inputs: Inputs, layout: str) -> Inputs:
    """``(batch, heads, tokens, ...)``, each key and value head repeated for the queries that share it."""
    turned = {
        name: x if name in PER_HEAD or layout == "bhtd" else x.transpose(1, 2).contiguous()
        for name, x in inputs.items()
    }
    heads = turned["q"].shape[1]
    return {name: x if name in PER_HEAD else share_heads(x, heads) for name, x in turned.items()}


def _turned(results: Results, layout: str) -> Results:
    return {name: x.transpose(1, 2) if name.startswith("o") and layout == "bthd" else x for name, x in results.items()}


def _scale(query: Tensor, config: dict, default: float | None = None) -> float:
    given = config.get("scale", default)
    return query.shape[-1] ** -0.5 if given is None else given
