"""NV-Embed: what holds exactly (reference tensors, folding, padding, direction, invariances) and what it costs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cenote.backbones.bidirectional import make_bidirectional
from cenote.pooling.latent_attention import LatentAttention
from cenote.reproductions.base import Finding, finding
from cenote.reproductions.golden import golden_findings
from cenote.reproductions.latent_published import multiplications, tokens_read
from cenote.reproductions.timing import time_ratio

DIM = 24
SIZES: dict[str, Any] = {"num_latents": 32, "num_heads": 4, "head_dim": 8}
TIMED: dict[str, Any] = {"dim": 512, "num_latents": 64, "num_heads": 8}


def exact_findings() -> list[Finding]:
    """Everything that needs no training and no clock."""
    return [*golden_findings("nv-embed"), *_same_function(), *_host(), *_invariances(), *_costs()]


def _pool(seed: int = 0, **sizes: int | bool) -> LatentAttention:
    """Norms and biases away from their start, so that leaving one out would show."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pool = LatentAttention(**{"dim": DIM, **SIZES, **sizes})
        for name, parameter in pool.named_parameters():
            if "norm" in name or name.endswith("bias"):
                nn.init.normal_(parameter, mean=float(name.endswith("norm.weight")), std=0.3)
    return pool.eval()


def _noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def _same_function() -> list[Finding]:
    worst = 0.0
    for sizes in (
        {"dim": 512, "num_latents": 64, "num_heads": 8},
        {"num_latents": 5, "head_dim": 16},
        {"num_latents": 40, "head_dim": 4},
    ):
        pool = _pool(**sizes)
        x = _noise(8, 24, pool.dim)
        worst = max(worst, float((pool(x) - tokens_read(pool.block, x).mean(dim=1)).abs().max()))
    return [_at_most("Folded and published order are the same function in float32.", worst, 1e-5)]


@torch.no_grad()
def _host() -> list[Finding]:
    """A Mistral of two layers with random weights and a sliding window, which going bidirectional takes off."""
    from transformers import MistralConfig, MistralModel

    settings: dict[str, Any] = {
        "vocab_size": 61,
        "hidden_size": DIM,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "sliding_window": 3,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        host = MistralModel(
            MistralConfig(**settings, num_attention_heads=3, num_key_value_heads=1, pad_token_id=2)
        ).eval()
    ids = torch.arange(3, 12)[None]
    late = torch.where(torch.arange(9) == 8, 40, ids)
    moved = {}
    for kind in ("causal", "bidirectional"):
        if kind == "bidirectional":
            make_bidirectional(host)
        states = [host(i).last_hidden_state[0, 0] for i in (ids, late)]
        moved[kind] = float((states[0] - states[1]).abs().max())

    pool = _pool(normalize=True)
    alone = pool(host(ids).last_hidden_state)
    other, pad = torch.arange(20, 34)[None], torch.full((1, 5), 2)
    worst = 0.0
    for row in (torch.cat([ids, pad], dim=1), torch.cat([pad, ids], dim=1)):
        batch = torch.cat([row, other])
        mask = batch != 2  # no real token has this id here
        worst = max(
            worst,
            float((pool(host(batch, attention_mask=mask.long()).last_hidden_state, mask)[:1] - alone).abs().max()),
        )
    return [
        _at_most("A text alone and padded in a batch, on either side, has the same embedding.", worst, 1e-5),
        finding(
            "In the bidirectional host a late token changes the first token's state.",
            "more than 1e-3",
            moved["bidirectional"],
            lambda v: v > 1e-3,
            unit="max change",
        ),
        finding(
            "In the causal host a late token leaves the first token's state as it is.",
            "0",
            moved["causal"],
            lambda v: v == 0,
            unit="max change",
        ),
    ]


@torch.no_grad()
def _invariances() -> list[Finding]:
    x, mask = _noise(3, 7, DIM), torch.arange(7) < torch.tensor([7, 1, 4])[:, None]
    pool, permuted = _pool(normalize=True), _pool(normalize=True)
    vectors = pool(x, mask)
    permuted.block.latents.copy_(pool.block.latents.flip(0))
    weights = 7.0 * mask[..., None]
    scaled = F.normalize((weights * pool.transform(x)).sum(dim=1) / weights.sum(dim=1), dim=-1)
    return [
        _at_most("Permuting the latents changes nothing.", float((permuted(x, mask) - vectors).abs().max()), 1e-5),
        _at_most(
            "Scaling the pool mask changes nothing.",
            float((scaled - vectors).abs().max()),
            1e-5,
            note="Masks are boolean here; this is the published mean under a mask of sevens against ours.",
        ),
        _at_most("Normalised embeddings have length 1.", float((vectors.norm(dim=-1) - 1).abs().max()), 1e-6),
    ]


def _costs() -> list[Finding]:
    """Counted without computing, on tensors that have a shape only."""
    widths = (128, 256, 512)
    folded, published = zip(*(_multiplications(width, batch=8, tokens=24) for width in widths), strict=True)
    slope = (published[2] - published[1]) / (published[1] - published[0])
    # What a sequence costs beyond its tokens: 2 C(T=1) - C(T=2), in units of what a token costs.
    at_one, at_two = (_multiplications(512, batch=1, tokens=t) for t in (1, 2))
    fixed = [2 * one - two for one, two in zip(at_one, at_two, strict=True)]
    predicted = 2 * TIMED["num_latents"] * TIMED["dim"] * TIMED["num_heads"] * 512
    per_token = at_two[1] - at_one[1]
    return [
        finding(
            "Folded, the attention's cost does not depend on the width of a head.",
            "1",
            max(folded) / min(folded),
            lambda v: v == 1,
            unit="x multiplications, widest over narrowest",
            note=f"Multiplications of 8 sequences of 24 tokens at head widths {widths}: "
            + ", ".join(f"{v / 1e6:.0f} M" for v in folded)
            + ".",
        ),
        finding(
            "In the published order the cost is linear in the width of a head.",
            "2 (256 to 512 adds twice what 128 to 256 adds)",
            slope,
            lambda v: abs(v - 2) < 1e-9,
            unit="x",
            note="Multiplications, as above: " + ", ".join(f"{v / 1e6:.0f} M" for v in published) + ".",
        ),
        finding(
            "The published order pays 2 r d h e for the latents of every sequence.",
            "1 (share of that formula)",
            fixed[1] / predicted,
            lambda v: abs(v - 1) < 1e-9,
            unit="x",
            note=f"At d = e = 512, h = 8, r = 64 this is as much as {fixed[1] / per_token:.0f} tokens cost.",
        ),
        finding(
            "Folded, in eval mode, a sequence costs nothing beyond its tokens but the MLP's second matrix.",
            "1 (share of 4 d^2)",
            fixed[0] / (4 * TIMED["dim"] ** 2),
            lambda v: abs(v - 1) < 1e-9,
            unit="x",
            note="That matrix is applied to the mean, once a sequence instead of once a token.",
        ),
    ]


def _multiplications(head_dim: int, batch: int, tokens: int) -> tuple[int, int]:
    """Folded in eval mode with the folded maps at hand, and in the published order."""
    with torch.device("meta"):
        pool, x = (
            LatentAttention(**TIMED, head_dim=head_dim).eval().requires_grad_(False),
            torch.empty(batch, tokens, TIMED["dim"]),
        )
    multiplications(lambda: pool(x))
    return multiplications(lambda: pool(x)), multiplications(lambda: tokens_read(pool.block, x).mean(dim=1))


@torch.no_grad()
def timings() -> list[Finding]:
    """What the folded layer saves, as ratios of times taken in turn."""
    pools = {width: _pool(**TIMED, head_dim=width) for width in (64, 512)}
    x = _noise(8, 24, TIMED["dim"])
    wide: Callable[[], Tensor] = lambda: pools[512](x)  # noqa: E731
    return [
        finding(
            "With d = e = 512, r = 64, h = 8, 8 sequences of 24 tokens, the folded layer beats the published order.",
            "at least 5 x (specification: 6.4 x on one thread)",
            time_ratio(lambda: tokens_read(pools[512].block, x).mean(dim=1), wide),
            lambda v: v >= 5,
            unit="x time",
            note=f"{torch.get_num_threads()} thread(s); the two in turn, median of the ratios.",
        ),
        finding(
            "The folded layer takes as long with heads of 512 as with heads of 64.",
            "1 (0.8 to 1.25)",
            time_ratio(wide, lambda: pools[64](x), rounds=15),
            lambda v: 0.8 <= v <= 1.25,
            unit="x time",
        ),
    ]


def _at_most(claim: str, value: float, bound: float, note: str = "") -> Finding:
    return finding(claim, f"at most {bound:g}", value, lambda v: v <= bound, unit="max abs difference", note=note)
