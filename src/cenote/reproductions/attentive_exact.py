"""What holds exactly for efficient probing and the attentive poolings it is compared with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cenote.pooling import create_pooling
from cenote.pooling.efficient_probing import EfficientProbing
from cenote.probe.cost import macs
from cenote.reproductions.base import Finding, finding
from cenote.reproductions.timing import time_ratio

INVARIANT = ("efficient_probing", "aim", "simpool", "jepa", "cae", "siglip", "cait", "dinovit", "abmilp")
ORDERED = ("clip", "cbam")
# Coefficients of dim^2, dim and 1 in the number of parameters; clip for 196 tokens, cbam with a reduction to dim / 16.
PARAMETERS = {
    "abmilp": (5, 3, 1), "simpool": (2, 2, 0), "esimpool": (0, 2, 0), "clip": (4, 203, 0), "siglip": (12, 10, 0),
    "aim": (2, 1, 0), "cbam": (0.125, 0, 100), "coca": (0, 1349, 0), "cait": (12, 18, 0), "dinovit": (12, 10, 0),
    "jepa": (12, 14, 0), "dolg": (1, 4, 1), "cae": (4, 10, 0), "efficient_probing": (1, 32, 0),
}  # fmt: skip


def published_order(
    x: Tensor, queries: Tensor, weight: Tensor, bias: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    """Efficient probing as published: project every token, then let each query pool its slice of the values."""
    scores = queries @ x.mT * x.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None], float("-inf"))
    values = F.linear(x, weight, bias).unflatten(-1, (len(queries), -1)).transpose(1, 2)
    return (scores.softmax(dim=-1)[:, :, None] @ values).flatten(1)


def exact_findings() -> list[Finding]:
    """Folding, order of tokens, padding, special cases, and the table of parameters and operations."""
    return [*_folded(), *_symmetries(), *_table()]


def speed_finding() -> Finding:
    """Forward and backward of the folded layer against the published order, on this machine's CPU."""
    torch.manual_seed(0)
    x = torch.randn(16, 196, 768)
    pool = EfficientProbing(768, 32)

    def step(out: Tensor) -> None:
        torch.autograd.grad(out.square().sum(), [pool.queries, pool.value.weight])

    ratio = time_ratio(
        lambda: step(published_order(x, pool.queries, pool.value.weight)), lambda: step(pool(x)), rounds=7
    )
    return finding(
        "Folded efficient probing is faster than the published order (forward and backward, N=196, D=768, M=32).",
        "at least 5 times",
        ratio,
        lambda v: v >= 5,
        paper="8 to 10 times (specification, forward and forward+backward)",
        unit="times",
        note=f"Batch of 16, {torch.get_num_threads()} thread(s), median of interleaved rounds.",
    )


def _folded() -> list[Finding]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 50, 96, generator=generator)
    mask = torch.arange(50)[None] < torch.tensor([50, 31, 7, 1])[:, None]
    output, gradient = 0.0, 0.0
    for bias in (False, True):
        for real in (None, mask):
            torch.manual_seed(1)
            pool = EfficientProbing(96, 8, qkv_bias=bias)
            nn.init.normal_(pool.queries)
            parameters = list(pool.parameters())
            tokens = x.clone().requires_grad_()
            results = (
                pool(tokens, real),
                published_order(tokens, pool.queries, pool.value.weight, pool.value.bias, real),
            )
            toward = torch.randn(results[0].shape, generator=generator)
            grads = [torch.autograd.grad((r * toward).sum(), [tokens, *parameters]) for r in results]
            output = max(output, _distance(*results))
            gradient = max(gradient, *(_distance(a, b) for a, b in zip(*grads, strict=True)))
    one = EfficientProbing(96, 1)
    nn.init.zeros_(one.queries)
    return [
        _at_most(
            "Folded efficient probing is the published order: output, with and without bias and mask.", output, 1e-5
        ),
        _at_most("Folded efficient probing is the published order: all gradients.", gradient, 1e-5),
        _at_most(
            "With one query that is zero it is a linear map of the mean.",
            _distance(one(x), one.value(x.mean(dim=1))),
            1e-6,
        ),
    ]


def _symmetries() -> list[Finding]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 16, 96, generator=generator)
    order = torch.randperm(16, generator=generator)
    moved, padding = {}, {}
    for name in PARAMETERS:
        torch.manual_seed(1)
        pool = create_pooling(name, dim=96, grid=(4, 4)).eval()
        with torch.no_grad():
            for parameter in pool.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
            plain = pool(x)
            moved[name] = _distance(pool(x[:, order]), plain)
            padded = torch.cat([torch.full((3, 2, 96), 1e4), x, torch.full((3, 5, 96), -30.0)], dim=1)
            mask = (torch.arange(23) >= 2) & (torch.arange(23) < 18)
            padding[name] = _distance(pool(padded, mask.expand(3, -1)), plain)
    return [
        _at_most(
            f"The order of the tokens changes nothing in {', '.join(INVARIANT)}.",
            max(moved[n] for n in INVARIANT),
            1e-5,
        ),
        finding(
            f"It does change {' and '.join(ORDERED)}.",
            "at least 1e-3",
            min(moved[n] for n in ORDERED),
            lambda v: v >= 1e-3,
            unit="largest difference",
        ),
        _at_most(
            "A padded batch with its mask equals the items alone, in all 14 poolings.", max(padding.values()), 1e-4
        ),
    ]


def _table() -> list[Finding]:
    wrong = 0.0
    for name, (square, linear, constant) in PARAMETERS.items():
        for dim in (96, 384, 768):
            with torch.device("meta"):
                pool = create_pooling(name, dim=dim, grid=(14, 14))
            wrong += abs(sum(p.numel() for p in pool.parameters()) - (square * dim**2 + linear * dim + constant))
    n, d, m = 196, 768, 32
    with torch.device("meta"):
        pool = EfficientProbing(d, m)
        x = torch.empty(1, n, d)
    with FlopCounterMode(display=False) as counter:
        published_order(x, pool.queries, pool.value.weight)
    published = counter.get_total_flops() // 2
    return [
        _at_most(
            "All 14 poolings have the parameters of the table, at three widths.",
            wrong,
            0,
            "parameters too many or too few",
        ),
        finding(
            "The published order of efficient probing costs N D D' + N M D + N D' operations an image.",
            "difference of 0",
            published - (n * d * d + n * m * d + n * d),
            lambda v: v == 0,
            paper="120.6 million",
            unit="operations of difference",
            note=f"Counted: {published / 1e6:.1f} million at N=196, D=768, M=32.",
        ),
        finding(
            "The folded order costs 2 N M D + D D' operations.",
            "difference of 0",
            (folded := macs(pool, nn.Identity(), x, None)) - (2 * n * m * d + d * d),
            lambda v: v == 0,
            paper="10.2 million",
            unit="operations of difference",
            note=f"Counted: {folded / 1e6:.1f} million.",
        ),
    ]


def _distance(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


def _at_most(claim: str, value: float, bound: float, unit: str = "largest difference") -> Finding:
    return finding(claim, f"at most {bound:g}", value, lambda v: v <= bound, unit=unit)
