"""What holds of TAP and ADL whatever the data and the weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cenote.mixing.base import MixerContext
from cenote.mixing.metaformer import MetaFormerBlock
from cenote.mixing.rvt import RVT, RVT_SIZES, RVTBlock
from cenote.mixing.softmax_attention import SoftmaxAttention
from cenote.mixing.tap import TAPBlock, TokenAwarePooling
from cenote.ops.attention_diversity import QueryKey, attention_diversification_loss, attention_similarity
from cenote.reproductions.base import Finding, at_most, finding
from cenote.reproductions.golden import golden_findings
from cenote.reproductions.timing import time_ratio
from cenote.types import Grid

GRID = Grid(12, 15)


def exact_findings() -> list[Finding]:
    """Reference files, degenerate predictors, invariances, values of the loss known in advance, the overhead."""
    golden = golden_findings("tap-adl")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        return [*golden, *_pooling(), *_loss(), *_overhead()]


def randomise(tap: TokenAwarePooling) -> TokenAwarePooling:
    """Batch norm statistics that do something, in eval mode."""
    norm = tap.proj[1]
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.normal_(0, 0.3)
    norm.running_var.uniform_(0.5, 2)
    nn.init.normal_(norm.weight, 1, 0.3)
    return tap.eval()


def one_hot(scale: int, dim: int = 16, num_scales: int = 4) -> TokenAwarePooling:
    """A pooling that always chooses one scale."""
    tap = TokenAwarePooling(dim, num_scales).eval()
    norm, last = tap.proj[1], tap.proj[2]
    assert isinstance(norm, nn.BatchNorm2d)
    assert isinstance(last, nn.Conv2d)
    nn.init.zeros_(norm.weight)
    nn.init.ones_(norm.bias)
    nn.init.zeros_(last.weight)
    last.weight[scale, :, 1, 1] = 1e4
    return tap


def _pooling() -> list[Finding]:
    x = torch.randn(2, 16, *GRID)
    attention = SoftmaxAttention(16, 4)
    host, block = MetaFormerBlock(attention).eval(), TAPBlock(attention, num_scales=1).eval()
    block.load_state_dict({**block.state_dict(), **host.state_dict()})
    tokens, context = x.flatten(2).transpose(1, 2), MixerContext(grid=GRID)
    plain = [_away(one_hot(scale).pool_map(x), _unfolded_mean(x, scale)) for scale in (1, 2, 3)]
    tap = randomise(TokenAwarePooling(16, 4))
    inner = (slice(None), slice(None), slice(5, -3), slice(5, -3))
    shifted = tap.pool_map(x.roll((2, 1), dims=(2, 3)))[inner]
    flat = torch.full((1, 16, *GRID), 1.7)
    kept = TokenAwarePooling(16, 4, count_include_pad=False).eval()
    kept.load_state_dict(tap.state_dict())
    return [
        at_most(
            "With one scale a block is its host, bit for bit.", _away(block(tokens, None, context), host(tokens)), 0
        ),
        at_most("A predictor forced to scale 0 leaves every token.", _away(one_hot(0).pool_map(x), x), 0),
        at_most("A predictor forced to scale i gives the plain dilated average.", max(plain), 1e-6),
        at_most("The shares of the scales sum to 1.", _away(tap.scale_probs(x).sum(dim=-1), torch.ones(1)), 1e-6),
        at_most(
            "Away from the borders TAP commutes with shifts.",
            _away(shifted, tap.pool_map(x).roll((2, 1), dims=(2, 3))[inner]),
            1e-5,
        ),
        at_most("Without counted padding a constant map stays.", _away(kept.pool_map(flat), flat), 1e-5),
    ]


def _loss() -> list[Finding]:
    adl = attention_diversification_loss
    tokens = 32
    sink = F.one_hot(torch.full((1, 2, tokens), 5), tokens).float()
    groups = [F.one_hot(torch.arange(tokens) // (tokens // g), tokens).float().expand(1, 2, -1, -1) for g in (2, 4, 8)]
    values = [float(adl([each])) for each in groups]
    uniform = torch.full((1, 2, tokens, tokens), 1 / tokens)
    maps = [(4 * torch.randn(6, 3, n, n)).softmax(dim=-1) for n in (16, 25)]
    items = adl(maps, 1.2, reduction="none")
    alone = torch.stack([adl([m[i : i + 1] for m in maps], 1.2) for i in range(6)])
    permuted = adl([m[:, torch.randperm(3)] for m in maps], 1.2, reduction="none")
    query, key = torch.randn(2, 3, 70, 8), torch.randn(2, 3, 70, 8)
    stored = (2 * query @ key.transpose(-1, -2)).softmax(dim=-1)
    streamed = attention_diversification_loss([QueryKey(query, key, 2.0)])
    return [
        at_most("All queries on one key: the loss is 1.", abs(float(adl([sink])) - 1), 2e-6, "away from 1"),
        at_most(
            "Groups of queries on keys of their own: 1 over the square root of their number.",
            max(abs(v - g**-0.5) for v, g in zip(values, (2, 4, 8), strict=True)),
            2e-6,
        ),
        at_most("Uniform attention: the loss is 0.", float(adl([uniform])), 0, "loss"),
        at_most(
            "Uniform attention: the similarity without thresholds is 1.",
            abs(float(attention_similarity([uniform])) - 1),
            2e-6,
            "away from 1",
        ),
        at_most(
            "The loss lies between 0 and 1.",
            max(0.0, float(-items.min()), float(items.max()) - 1),
            0,
            "outside by",
        ),
        at_most("An item counts the same alone and in a batch.", _away(items, alone), 1e-6),
        at_most("Permuting heads changes nothing.", _away(items, permuted), 1e-6),
        at_most("Streamed from queries and keys it is the same.", _away(streamed, adl([stored])), 1e-5),
    ]


def _overhead() -> list[Finding]:
    wrong = 0
    for dim in (24, 192, 768):
        for scales in (1, 2, 4):
            made = sum(p.numel() for p in TokenAwarePooling(dim, scales).parameters())
            wrong += made != 9 * dim * scales + 9 * scales**2 + 2 * scales
    with torch.device("meta"):
        model = RVT(**RVT_SIZES["base_plus"], num_scales=4)
    added = sum(p.numel() for name, p in model.named_parameters() if "dilation_predictor" in name)
    share = 100 * added / sum(p.numel() for p in model.parameters())
    return [
        at_most("TAP adds 9 C K + 9 K^2 + 2 K parameters a block.", wrong, 0, "of 9 sizes differ"),
        finding(
            "Of RVT-B with TAP, TAP's parameters are a small part.",
            "below 1 %",
            share,
            lambda v: v < 1,
            paper="under about 1 %",
            unit="% of parameters",
        ),
    ]


def time_finding() -> Finding:
    """TAP's share of the time of an RVT block in eval mode."""
    block, grid = RVTBlock(192, 6).eval(), Grid(14, 14)
    x = torch.randn(8, 196, 192)
    with torch.inference_mode():
        share = 100 * time_ratio(lambda: block.dilation_predictor(x, grid), lambda: block(x, grid))
    claim = "TAP's share of the time of an RVT block at width 192 on 14 x 14 tokens."
    return finding(claim, "at most 30 %", share, lambda v: v <= 30, unit="% of the block's time")


def _unfolded_mean(x: Tensor, dilation: int) -> Tensor:
    """The nine neighbours side by side, as the official code takes their mean."""
    nine = F.unfold(x, 3, dilation=dilation, padding=dilation).unflatten(1, (x.shape[1], 9))
    return nine.mean(dim=2).unflatten(2, tuple(x.shape[2:]))


def _away(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())
