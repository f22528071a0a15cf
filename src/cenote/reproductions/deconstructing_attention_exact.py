"""What holds of the deconstructed variants whatever they are trained on."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from cenote.integrations.deconstructed_qwen2 import DeconstructedQwen2Config, DeconstructedQwen2ForCausalLM
from cenote.integrations.deconstructed_qwen2_config import FIXED, VARIANTS
from cenote.ops.key_softmax import key_logits, key_softmax_chunk, key_softmax_weights
from cenote.ops.taylor_attention import taylor_attention, taylor_attention_chunk, taylor_weights
from cenote.reproductions.base import Finding, at_most, finding
from cenote.reproductions.golden import golden_findings
from cenote.reproductions.timing import time_ratio

SYMBOLS, LAYERS = 40, 4
SHORT, LONG = 64, 2048


def exact_findings() -> list[Finding]:
    """Reference files, causality, maps, parameters, recurrence, fixed maps, the polynomial, the growth of states."""
    return [
        *golden_findings("deconstructing-attention"),
        _causal(),
        _rows(),
        *_parameters(),
        *_recurrence(),
        *_fixed_maps(),
        *_polynomial(),
        *_states(),
    ]


def small_model(
    variants: str | list[str], seed: int = 0, rows: int = 32, **settings: Any
) -> DeconstructedQwen2ForCausalLM:
    """Four layers of width 32 with four heads, weights far from their start."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "vocab_size": SYMBOLS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS,
        "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": rows,
        "initializer_range": 0.2,
    }  # fmt: skip
    model = DeconstructedQwen2ForCausalLM(DeconstructedQwen2Config(**{**sizes, **settings}, variants=variants)).eval()
    if model.model.fixed_input_ids is not None:
        model.set_fixed_text(torch.randint(SYMBOLS, (rows,)))
    return model


def _symbols(batch: int, tokens: int, seed: int = 0) -> Tensor:
    return torch.randint(SYMBOLS, (batch, tokens), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def _causal() -> Finding:
    ids, other = _symbols(2, 20), _symbols(2, 20, seed=1)
    changed = torch.cat([ids[:, :12], other[:, 12:]], dim=1)
    worst = 0.0
    for variant in VARIANTS:
        for variants in (variant, [variant, "standard"] * (LAYERS // 2)):
            model = small_model(variants)
            worst = max(worst, _away(model(ids).logits[:, :12], model(changed).logits[:, :12]))
    return at_most("In all variants, uniform and hybrid, later tokens change no earlier logit.", worst, 1e-5)


@torch.no_grad()
def _rows() -> Finding:
    worst = 0.0
    for variant in VARIANTS:
        model = small_model(variant, attn_implementation="eager", taylor_linear=False)
        for weights in model(_symbols(2, 20), output_attentions=True).attentions:
            if weights is not None:
                worst = max(worst, float((weights.sum(dim=-1) - 1).abs().max()))
    return at_most("Rows of every map sum to 1.", worst, 1e-5, "away from 1")


def _parameters() -> list[Finding]:
    counts = {}
    with torch.device("meta"):
        for variant in VARIANTS:
            model = DeconstructedQwen2ForCausalLM(DeconstructedQwen2Config.paper_size("70M", variants=variant))
            counts[variant] = sum(p.numel() for p in model.parameters())
    others = [abs(counts[v] - counts["standard"]) for v in VARIANTS if v != "mlp"]
    claim = "At the paper's 70M size all variants with queries and keys have the same number of parameters."
    return [
        at_most(claim, max(others), 0, "parameters apart"),
        at_most(
            "At the paper's 70M size the MLP variant has as many parameters.",
            100 * abs(counts["mlp"] / counts["standard"] - 1),
            0.2,
            "% apart",
        ),
    ]


def _recurrence() -> list[Finding]:
    findings = []
    for name in ("Non-approximate", "Approximate"):
        three = [x.requires_grad_() for x in torch.randn(3, 2, 4, 50, 8, generator=torch.Generator().manual_seed(0))]
        whole = _whole(name, three)
        wanted = torch.autograd.grad(whole.square().sum(), three)
        state, parts = None, []
        for t in range(50):
            mixed, state = _step(name, [x[:, :, t : t + 1] for x in three], state)
            parts.append(mixed)
        steps = torch.cat(parts, dim=2)
        got = torch.autograd.grad(steps.square().sum(), three)
        apart = max(
            _away(steps, whole), *(_away(a, b) / float(b.abs().max()) for a, b in zip(got, wanted, strict=True))
        )
        claim = f"{name}, token by token from its state, equals the whole map: values, and gradients by their largest."
        findings.append(at_most(claim, apart, 1e-5))
    return findings


def _whole(name: str, three: list[Tensor]) -> Tensor:
    query, key, value = three
    if name == "Approximate":
        return taylor_attention(query, key, value)
    return key_softmax_weights(key_logits(torch.nn.functional.silu(query), key)) @ value


def _step(name: str, three: list[Tensor], state: object) -> tuple[Tensor, object]:
    query, key, value = three
    if name == "Approximate":
        return taylor_attention_chunk(query, key, value, state)  # type: ignore[arg-type]
    return key_softmax_chunk(key_logits(torch.nn.functional.silu(query), key), value, state)  # type: ignore[arg-type]


@torch.no_grad()
def _fixed_maps() -> list[Finding]:
    cached, same, asked = 0.0, 0.0, 0
    for variant in FIXED:
        model = small_model(variant, attn_implementation="eager")
        ids = _symbols(2, 20)
        calls: list[int] = []
        with torch.enable_grad():  # never cached
            uncached = model(ids).logits
        model(ids)
        handles = [
            projection.register_forward_hook(lambda *_, calls=calls: calls.append(1))
            for layer in model.model.layers
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj)
        ]
        cached = max(cached, _away(model(ids).logits, uncached))
        asked += len(calls)
        for handle in handles:
            handle.remove()
        with torch.enable_grad():
            one, other = (
                model(_symbols(batch, 20, seed), output_attentions=True).attentions for batch, seed in ((2, 1), (5, 2))
            )
        same = max(same, *(_away(a, b) for a, b in zip(one, other, strict=True)))
    return [
        at_most("Cached fixed maps give the logits of uncached ones.", cached, 1e-6),
        at_most("Fixed maps are identical for any input and batch.", same, 0),
        at_most(
            "With cached maps a second forward pass forms no queries or keys, hence none of their products.",
            asked,
            0,
            "projections to queries or keys",
        ),
    ]


def _polynomial() -> list[Finding]:
    query, key, value = torch.randn(3, 2, 4, 30, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    later = torch.ones(30, 30, dtype=torch.bool).triu(1)

    def both(scale: float) -> tuple[Tensor, Tensor]:
        scores = scale * query @ key.transpose(-1, -2)
        polynomial = taylor_weights(scores).masked_fill(later, 0.0)
        exponential = scores.masked_fill(later, float("-inf")).softmax(dim=-1)
        return polynomial / polynomial.sum(dim=-1, keepdim=True) @ value, exponential @ value

    explicit, _ = both(8**-0.5)
    gaps = [_away(taylor_attention(query, key, value, scale=scale), both(scale)[1]) for scale in (0.02, 0.01)]
    return [
        at_most(
            "Joint Taylor equals attention with 1 + s + s^2/2 for exp(s).",
            _away(taylor_attention_chunk(query, key, value)[0], explicit),
            1e-10,
        ),
        finding(
            "Joint Taylor tends to softmax attention with the third power of the scores.",
            "exponent between 2.8 and 3.2",
            math.log2(gaps[0] / gaps[1]),
            lambda v: 2.8 <= v <= 3.2,
            unit="exponent of the error",
        ),
    ]


@torch.no_grad()
def _states() -> list[Finding]:
    sizes, ratios = {}, {}
    for variant in ("non_approximate", "standard"):
        model = small_model(variant, rows=LONG + 64)
        pasts = [model(_symbols(1, tokens)).past_key_values for tokens in (SHORT, LONG)]
        sizes[variant] = pasts[1].num_bytes() / pasts[0].num_bytes()
        ratios[variant] = time_ratio(_next_token(model, pasts[1]), _next_token(model, pasts[0]), rounds=21)
    return [
        finding(
            f"The state of Non-approximate is as large behind {LONG} tokens as behind {SHORT}.",
            "exactly 1",
            sizes["non_approximate"],
            lambda v: v == 1,
            unit="x the bytes",
            note=f"Keys and values of standard attention: {sizes['standard']:.0f}x.",
        ),
        finding(
            f"Non-approximate takes as long for the next token behind {LONG} tokens as behind {SHORT}.",
            "at most 1.3",
            ratios["non_approximate"],
            lambda v: v <= 1.3,
            unit="x the time",
            note=f"Standard attention at this small size: {ratios['standard']:.2f}x.",
        ),
    ]


def _next_token(model: DeconstructedQwen2ForCausalLM, past: Cache | None) -> Callable[[], object]:
    one = _symbols(1, 1)
    return lambda: model(one, past_key_values=past)


def _away(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max())
