"""What holds of TidalDecode whatever the model says: dense limits, untouched layers, correction, padding, speed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from cenote.attention import Recipe, TidalDecode
from cenote.compress.teacher_forced import teacher_forced_logits
from cenote.ops.gather_attention import decode_logits, gather_attention, topk_positions
from cenote.reproductions.base import Finding, at_most, finding
from cenote.reproductions.golden import golden_findings
from cenote.reproductions.timing import time_ratio

TOKENS, PROMPT, LEFT = 160, 140, 60
RECIPE = TidalDecode(12, 2, 4)


def exact_findings(model: Any, ids: Tensor) -> list[Finding]:
    """On a trained model and one text, ``(1, at least 160)``."""
    ids = ids[:1, :TOKENS].repeat(2, 1)
    ids[1, :LEFT] = 0
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, :LEFT] = False
    return [
        *golden_findings("tidal-decode"),
        *_dense(model, ids, mask),
        _correction(model, ids, mask),
        _padding(model, ids, mask),
    ]


def speed_finding() -> Finding:
    """Gather-and-attend against dense attention, as the specification measured it."""
    torch.manual_seed(0)
    query, (key, value) = torch.randn(1, 8, 1, 64), torch.randn(2, 1, 8, 16384, 64)
    chosen = topk_positions(decode_logits(query, key), 1638)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def dense() -> Tensor:
        return F.scaled_dot_product_attention(query, key, value)

    def ours() -> Tensor:
        return gather_attention(query, key, value, chosen)

    try:
        ratio, cold = _seconds(dense) / _seconds(ours), time_ratio(dense, ours)
    finally:
        torch.set_num_threads(threads)
    return finding(
        "Attention of one query at 10 % of 16384 keys (8 heads of 64, float32, one thread) is faster than dense.",
        "at least 10x",
        ratio,
        lambda v: v >= 10,
        unit="x",
        note="Each called again and again on the same keys. Taken in turn, so that a dense call empties the "
        f"processor's caches before each of ours, it is {cold:.1f}x.",
    )


def _seconds(call: Callable[[], Any], rounds: int = 15, warmup: int = 3) -> float:
    times = []
    for number in range(warmup + rounds):
        start = time.perf_counter()
        call()
        if number >= warmup:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def _dense(model: Any, ids: Tensor, mask: Tensor) -> list[Finding]:
    text = ids, mask, PROMPT
    expected = teacher_forced_logits(model, *text)
    away = []
    for recipe in (TidalDecode(TOKENS, 2, 4), TidalDecode(0.9999, 2, 4)):
        with recipe(model):
            away.append(_away(teacher_forced_logits(model, *text), expected))
    with torch.no_grad():
        plain = model(ids, attention_mask=mask.long()).logits
        with RECIPE(model):
            same = torch.equal(model(ids, attention_mask=mask.long()).logits, plain)
    runs = [_layer_outputs(model, text, recipe) for recipe in (None, RECIPE)]
    below = float(sum((a != b).sum() for a, b in zip(*runs, strict=True)))
    relative = float(expected.abs().max())
    return [
        at_most(
            "A budget of the whole context is dense decoding, token by token.",
            max(away) / relative,
            1e-5,
            "largest difference of logits over the largest logit",
            "Once by the dense path that it takes then, once by sets that hold every position.",
        ),
        finding("Logits of a prompt are those of the dense model.", "equal", float(same), bool, unit="1 = bit-equal"),
        at_most("Layers below the first selecting one give the same hidden states.", below, 0, "entries that differ"),
    ]


def _layer_outputs(model: Any, text: tuple[Tensor, Tensor, int], recipe: Recipe | None) -> list[Tensor]:
    kept: list[Tensor] = []
    hook = model.model.layers[RECIPE.sparse_layer_start - 1].register_forward_hook(
        lambda _, __, output: kept.append(output[0] if isinstance(output, tuple) else output)
    )
    if recipe is None:
        teacher_forced_logits(model, *text)
    else:
        with recipe(model):
            teacher_forced_logits(model, *text)
    hook.remove()
    return kept


def _correction(model: Any, ids: Tensor, mask: Tensor) -> Finding:
    caches = []
    for recipe in (TidalDecode(TOKENS, 2, 4), TidalDecode(12, 2, 4, correction_interval=1), RECIPE):
        cache: Any = DynamicCache(config=model.config)
        with recipe(model):
            teacher_forced_logits(model, ids, mask, PROMPT, cache=cache)
        caches.append([torch.cat([layer.keys, layer.values], -1)[:, :, :TOKENS] for layer in cache.layers])
    real = mask[:, None, :, None]
    dense, clean, polluted = ([layer.where(real, 0) for layer in cache] for cache in caches)
    scale = max(float(layer.abs().max()) for layer in dense)
    worst = max(_away(a, b) for a, b in zip(clean, dense, strict=True)) / scale
    without = max(_away(a, b) for a, b in zip(polluted, dense, strict=True)) / scale
    return at_most(
        "Correction after every token leaves the keys and values of dense decoding.",
        worst,
        1e-5,
        "largest difference over the largest entry",
        f"Without correction they differ by {without:.2g}.",
    )


def _padding(model: Any, ids: Tensor, mask: Tensor) -> Finding:
    with RECIPE(model):
        together = teacher_forced_logits(model, ids, mask, PROMPT)[1:]
        alone = teacher_forced_logits(model, ids[1:, LEFT:], prompt=PROMPT - LEFT)
    away = _away(together, alone) / float(alone.abs().max())
    return at_most(
        "A left-padded row decodes as it does alone.", away, 1e-5, "largest difference of logits over the largest logit"
    )


def _away(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).abs().max())
