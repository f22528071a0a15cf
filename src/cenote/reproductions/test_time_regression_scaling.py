"""What the rules cost: time and state by the length of the sequence, and local linear regression beside attention."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cenote.mixing.regressor import RULES, create_regressor
from cenote.ops.delta_rule import chunk_delta_rule
from cenote.ops.local_regression import local_polynomial
from cenote.reproductions.base import Finding, finding
from cenote.reproductions.test_time_regression_exact import WIDTH, random_call
from cenote.reproductions.timing import time_ratio

ITERATIONS, LENGTH, HEAD = 8, 1024, 64


def scaling_findings() -> list[Finding]:
    """States of fixed size, time that doubles with the tokens, memory and time of local linear regression."""
    return [*counted_findings(), _linear_time(), _beside_attention()]


def counted_findings() -> list[Finding]:
    """Those whose numbers are counted, not timed."""
    return [_states(), _memory()]


def _states() -> Finding:
    grown = {}
    for rule in RULES:
        regressor = create_regressor(rule, 2, WIDTH, WIDTH).double()
        if not regressor.grows:
            sizes = [sum(s.numel() for s in regressor.chunk(*random_call(regressor, n))[1]) for n in (8, 128)]
            grown[rule] = sizes[1] / sizes[0]
    return finding(
        "States of recurrent rules are as large after 128 tokens as after 8.",
        "ratio 1",
        max(grown.values()),
        lambda v: v == 1,
        unit="ratio of the numbers held",
        note=f"Of {', '.join(grown)}.",
    )


def _linear_time() -> Finding:
    q, k, v = (torch.randn(1, 4, 4096, HEAD) for _ in range(3))
    k, beta = F.normalize(k, dim=-1), torch.rand(1, 4, 4096)

    def call(tokens: int) -> Tensor:
        return chunk_delta_rule(q[:, :, :tokens], k[:, :, :tokens], v[:, :, :tokens], beta[:, :, :tokens])[0]

    with torch.no_grad():
        value = time_ratio(lambda: call(4096), lambda: call(1024), rounds=5, warmup=1)
    return finding(
        "The delta rule in chunks takes time in proportion to the tokens (4096 against 1024).",
        "at most 8 times",
        value,
        lambda v: v <= 8,
        unit="x (4 is in proportion)",
        note="Halfway, in ratios, between proportion (4) and the square (16), since a shared machine's times scatter.",
    )


class LargestTensor(TorchDispatchMode):
    """The most numbers that any tensor made inside has."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(each, Tensor):
                self.numel = max(self.numel, each.numel())
        return out


def _memory() -> Finding:
    largest = []
    for tokens in (512, 1024):
        q, k, v = (torch.randn(1, 1, tokens, 16, requires_grad=True) for _ in range(3))
        with LargestTensor() as seen:
            local_polynomial(q, k, v, solver="cg", iterations=4, block=64).sum().backward()
        largest.append(seen.numel)
    return finding(
        "The largest tensor of local linear regression, forward and backward, grows with the tokens, not their square.",
        "at most 2.1 for twice the tokens",
        largest[1] / largest[0],
        lambda v: v <= 2.1,
        unit="x (1024 against 512 tokens)",
    )


def _beside_attention() -> Finding:
    q, k, v = (torch.randn(1, 4, LENGTH, HEAD) for _ in range(3))
    with torch.no_grad():
        value = time_ratio(
            lambda: local_polynomial(q, k, v, solver="cg", iterations=ITERATIONS),
            lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True),
            rounds=5,
            warmup=1,
        )
    return finding(
        f"Local linear regression by {ITERATIONS} conjugate gradients takes the time of {ITERATIONS + 2} attentions.",
        f"at most {ITERATIONS + 2} times",
        value,
        lambda v: v <= ITERATIONS + 2,
        unit="x fused causal attention",
        note=f"{LENGTH} tokens, 4 heads of {HEAD}. benchmarks/local_linear.py measures it over lengths.",
    )
