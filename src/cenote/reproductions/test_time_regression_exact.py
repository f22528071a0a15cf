"""What holds of the rules of test-time regression whatever the data: agreement of forms, reductions, limits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cenote.mixing.regressor import RULES, Regressor, create_regressor
from cenote.ops.delta_rule import chunk_delta_rule, implicit_step
from cenote.ops.linear_recurrence import chunk_feature_decay, chunk_linear
from cenote.ops.local_regression import local_constant, local_polynomial, local_slope, parallax
from cenote.ops.ridge_recurrence import RidgeState, ridge_recurrence
from cenote.reproductions.base import Finding, finding
from cenote.reproductions.golden import golden_findings

BATCH, HEADS, TOKENS, WIDTH = 2, 2, 23, 6
DOUBLE: dict[str, Any] = {"dtype": torch.float64}

Call = tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]


def exact_findings() -> list[Finding]:
    """Reference files, the forms of every rule, and how the rules reduce to each other."""
    torch.manual_seed(0)
    return [*golden_findings("test-time-regression"), *_forms(), *_linear_reductions(), *_regressions()]


def random_call(regressor: Regressor, tokens: int = TOKENS) -> Call:
    """Queries, keys of length 1, values and gates within their ranges."""
    rows = tokens * regressor.pairs
    q, k, v = (torch.randn(BATCH, HEADS, n, WIDTH, **DOUBLE) for n in (tokens, rows, rows))
    gates = {}
    for name, gate in regressor.gates.items():
        width = (WIDTH,) if gate.per == "key" else ()
        numbers = torch.rand(BATCH, HEADS, rows if gate.paired else tokens, *width, **DOUBLE)
        gates[name] = -numbers if gate.range == "log" else numbers
    return q, F.normalize(k, dim=-1), v, gates


def in_pieces(regressor: Regressor, call: Call, lengths: tuple[int, ...]) -> Tensor:
    """Outputs of a sequence that is cut, the state handed on."""
    q, k, v, gates = call
    state, outputs, start = None, [], 0
    for length in lengths:
        tokens = slice(start, start + length)
        rows = slice(start * regressor.pairs, (start + length) * regressor.pairs)
        own = {n: g[:, :, rows if regressor.gates[n].paired else tokens] for n, g in gates.items()}
        call_form = regressor.step if length == 1 else regressor.chunk
        out, state = call_form(q[:, :, tokens], k[:, :, rows], v[:, :, rows], own, state)
        outputs.append(out)
        start += length
    return torch.cat(outputs, dim=2)


def _forms() -> list[Finding]:
    steps, cuts, chunks, slopes = {}, {}, {}, {}
    for rule in RULES:
        regressor = create_regressor(rule, HEADS, WIDTH, WIDTH).double()
        call = random_call(regressor)
        whole = regressor.parallel(*call)
        steps[rule] = _away(in_pieces(regressor, call, (1,) * TOKENS), whole)
        cuts[rule] = _away(in_pieces(regressor, call, (7, 1, 15)), whole)
        if hasattr(regressor, "chunk_size") and rule != "mini_batch":
            sizes = [create_regressor(rule, HEADS, WIDTH, WIDTH, chunk_size=n).double() for n in (1, 5, 16)]
            chunks[rule] = max(_away(each.chunk(*call)[0], whole) for each in sizes)
        slopes[rule] = _gradients_away(regressor, call)
    return [
        _worst("Token by token every rule gives what it gives for the whole sequence.", steps, 1e-9),
        _worst("Cutting a sequence and handing the state on changes nothing.", cuts, 1e-9),
        _worst("The length of a chunk changes nothing, whether or not it divides the sequence.", chunks, 1e-9),
        _worst("Gradients by queries, keys and values are those of the token-by-token form.", slopes, 1e-8),
    ]


def _gradients_away(regressor: Regressor, call: Call) -> float:
    """Largest difference of the gradients of both forms."""

    def gradients(form: Callable[[Call], Tensor]) -> list[Tensor]:
        inputs = [x.clone().requires_grad_() for x in call[:3]]
        out = form((inputs[0], inputs[1], inputs[2], call[3]))
        return list(torch.autograd.grad((out * torch.cos(out.detach())).sum(), inputs))

    whole = gradients(lambda c: regressor.parallel(*c))
    steps = gradients(lambda c: in_pieces(regressor, c, (1,) * TOKENS))
    return max(_away(a, b) for a, b in zip(whole, steps, strict=True))


def _linear_reductions() -> list[Finding]:
    q, k, v, gates = random_call(create_regressor("gated_delta", HEADS, WIDTH, WIDTH))
    g, beta = gates["g"], gates["beta"]
    state = torch.randn(BATCH, HEADS, WIDTH, WIDTH, **DOUBLE)
    ones, none = torch.ones_like(beta), torch.zeros_like(beta)
    found = {
        "g = 0 removes the decay (linear attention and the delta rule).": max(
            _away(chunk_linear(q, k, v, none)[0], chunk_linear(q, k, v)[0]),
            _away(chunk_delta_rule(q, k, v, beta, none)[0], chunk_delta_rule(q, k, v, beta)[0]),
        ),
        "A decay that is the same for every key feature is a decay of the head.": _away(
            chunk_feature_decay(q, k, v, g[..., None].expand_as(k), state)[0], chunk_linear(q, k, v, g, state)[0]
        ),
        "A gated delta rule with step 0 only lets its first state decay.": _away(
            chunk_delta_rule(q, k, v, none, g, state)[1], state * g.sum(dim=2).exp()[..., None, None]
        ),
        "A gated delta product of one step is the gated delta rule.": _away(
            create_regressor("gated_delta_product", HEADS, WIDTH, WIDTH, num_updates=1, scale=1.0).parallel(
                q, k, v, gates
            ),
            create_regressor("gated_delta", HEADS, WIDTH, WIDTH, scale=1.0).parallel(q, k, v, gates),
        ),
        "The delta rule with step 1 and unit keys recalls the latest pair.": _away(
            chunk_delta_rule(k, k, v, ones)[0], v
        ),
        "The implicit step tends to the delta rule's step 1 for unit keys.": _away(
            chunk_delta_rule(q, k, v, implicit_step(k, 1e12 * ones))[0], chunk_delta_rule(q, k, v, ones)[0]
        ),
    }
    basis = torch.linalg.qr(torch.randn(BATCH, HEADS, WIDTH, WIDTH, **DOUBLE))[0]
    asked, values, steps = q[:, :, :WIDTH], v[:, :, :WIDTH], ones[:, :, :WIDTH]
    linear, last = chunk_linear(asked, basis, values)
    delta = chunk_delta_rule(asked, basis, values, steps)[0]
    past = RidgeState(basis.transpose(-1, -2) @ basis, last)
    ridge = ridge_recurrence(asked, basis, values, 0.0, weight=0 * steps, state=past)[0]
    found["On orthonormal keys linear attention, the delta rule with step 1 and ridge 0 agree."] = max(
        _away(delta, linear), _away(ridge, asked @ last)
    )
    return [_at_most(claim, value, 1e-9) for claim, value in found.items()]


def _regressions() -> list[Finding]:
    from sklearn.linear_model import Ridge

    q, k, v, gates = random_call(create_regressor("ridge", HEADS, WIDTH, WIDTH))
    ours = ridge_recurrence(q, k, v, 0.3, gates["g"], gates["beta"])[0]
    errors = []
    for t in range(TOKENS):
        since = gates["g"][0, 0, : t + 1].flip(0).cumsum(0).flip(0) - gates["g"][0, 0, : t + 1]
        weight = gates["beta"][0, 0, : t + 1] * since.exp()
        model = Ridge(alpha=0.3, fit_intercept=False).fit(k[0, 0, : t + 1], v[0, 0, : t + 1], sample_weight=weight)
        errors.append(_away(ours[0, 0, t], torch.from_numpy(model.predict(q[0, 0, t : t + 1].numpy())[0])))
    attention = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    slope, shift = torch.randn(WIDTH, WIDTH, **DOUBLE), torch.randn(WIDTH, **DOUBLE)
    affine: dict[str, Any] = {"causal": False, "ridge": 0.0}
    fitted = {
        "Ridge regression at every token is scikit-learn's Ridge.": max(errors),
        "Local constant with the Gaussian kernel and unit keys is softmax attention.": _away(
            local_constant(q, k, v, kernel="gaussian"), attention
        ),
        "Local linear regression reproduces an affine map of the keys (solved directly).": _away(
            local_polynomial(q, k, k @ slope + shift, **affine), q @ slope + shift
        ),
        "Local linear regression reproduces an affine map of the keys (conjugate gradients).": _away(
            local_polynomial(q, k, k @ slope + shift, solver="cg", iterations=2 * WIDTH, **affine), q @ slope + shift
        ),
        "A large ridge makes local linear regression softmax attention.": _away(
            local_polynomial(q, k, v, ridge=1e12), attention
        ),
        "Parallax with r = rho / (1 - mu.rho) is local linear regression.": _away(
            parallax(q, k, v, local_slope(q, k, ridge=0.1)), local_polynomial(q, k, v, ridge=0.1)
        ),
        "Conjugate gradients end where the direct solution is.": _away(
            local_polynomial(q, k, v, solver="cg", iterations=WIDTH), local_polynomial(q, k, v)
        ),
    }
    return [_at_most(claim, value, 1e-8) for claim, value in fitted.items()]


def _worst(claim: str, errors: dict[str, float], bound: float) -> Finding:
    worst = max(errors, key=lambda rule: math.inf if math.isnan(errors[rule]) else errors[rule])
    note = f"Largest for {worst}, of {', '.join(errors)}."
    return finding(
        claim, f"at most {bound:g}", errors[worst], lambda v: v <= bound, unit="max abs difference", note=note
    )


def _at_most(claim: str, value: float, bound: float) -> Finding:
    return finding(claim, f"at most {bound:g}", value, lambda v: v <= bound, unit="max abs difference")


def _away(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max())
