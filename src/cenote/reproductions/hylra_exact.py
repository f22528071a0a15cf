"""What holds of HyLRA whatever the model: its limits, its dynamic program, its measures."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cenote.attention.hylra import HyLRA
from cenote.attention.hylra_profile import ChunkSets, LayerStatistics
from cenote.attention.plan import LayerPlan
from cenote.compress.teacher_forced import teacher_forced_logits
from cenote.integrations.attention_interface import redirected
from cenote.ops.chunk_scores import TokenOrder
from cenote.ops.layer_policy import merge_overlap, plan_sources
from cenote.ops.selection import select_topk
from cenote.reproductions.base import Finding, at_most
from cenote.reproductions.golden import golden_findings


def exact_findings(model: Any, ids: Tensor) -> list[Finding]:
    """Limits on a live model and pieces ``(texts, tokens)``; properties of program and measures on random input."""
    return [*_limits(model, ids), *golden_findings("hylra"), *_program(), *_measures()]


def _limits(model: Any, ids: Tensor) -> list[Finding]:
    layers, prompt = model.config.num_hidden_layers, ids.shape[1] - 12
    base = HyLRA(top_k=64, chunk_size=4, threshold=0)
    shared = LayerPlan(("select", *[0] * (layers - 1)))

    def decoded(recipe: HyLRA | None = None) -> Tensor:
        if recipe is None:
            return teacher_forced_logits(model, ids, prompt=prompt)
        with recipe(model):
            return teacher_forced_logits(model, ids, prompt=prompt)

    dense = decoded()
    own = decoded(replace(base, plan=LayerPlan(("select",) * layers)))
    everything = replace(base, plan=shared, top_k=ids.shape[1] // 4 * 4 + 4)
    with redirected(model, _own_top_k(base), lazy_mask=True):
        expected = decoded()
    return [
        at_most(
            "With every layer selecting, each attends to its own top-k and nothing else.", _away(own, expected), 1e-3
        ),
        at_most("With k at least the number of keys decoding is dense.", _away(decoded(everything), dense), 1e-3),
        at_most(
            "With every layer full decoding is dense.", _away(decoded(replace(base, plan=("full",) * layers)), dense), 0
        ),
    ]


def _own_top_k(recipe: HyLRA) -> Any:
    """Each layer's top-k by a mask over its whole attention map."""

    def attend(call: Any) -> tuple[Tensor, None]:
        if call.query.shape[2] > 1:
            return call.proceed()
        group = call.query.shape[1] // call.key.shape[1]
        key, value = (x.repeat_interleave(group, dim=1) for x in (call.key, call.value))
        logits = (call.query @ key.mT)[:, :, 0] * call.scaling
        mean = logits.softmax(dim=-1).unflatten(1, (-1, group)).mean(dim=2)
        size, tokens = recipe.chunk_size, key.shape[2]
        mass = torch.stack([part.sum(dim=-1) for part in mean.split(size, dim=-1)], dim=-1)
        mass[..., : recipe.first] = mass[..., -recipe.last :] = float("inf")
        seen = select_topk(mass, recipe.top_k // size).repeat_interleave(size, dim=-1)[..., :tokens]
        masked = logits.masked_fill(~seen.repeat_interleave(group, dim=1), float("-inf"))
        return (masked.softmax(dim=-1).unsqueeze(2) @ value).transpose(1, 2), None

    return attend


def _program() -> list[Finding]:
    short, over, later = 0.0, 0, 0
    for seed in range(400):
        generator = torch.Generator().manual_seed(seed)
        layers, allowed = 2 + seed % 7, seed % 5
        overlap = torch.rand(layers, layers, generator=generator).triu(1) + torch.eye(layers)
        policy = plan_sources(overlap[None], allowed)
        short = max(short, _best_minimum(overlap, allowed) - policy.minimum)
        over += policy.changes > allowed
        later += any(source > layer for layer, source in enumerate(policy.sources))
    constant = merge_overlap(torch.ones(2, 8, 8).triu(), (0, 1))
    sources = {source for source in plan_sources(constant[None], 4).sources if source > 1}
    cases = "of 400 random matrices of 2 to 8 layers"
    return [
        at_most("The program's smallest overlap is that of the best of all paths.", short, 0, f"short of it, {cases}"),
        at_most("The program changes its source no more often than it may.", float(over), 0, cases),
        at_most("No layer's source comes behind it.", float(later), 0, cases),
        at_most(
            "Constant overlap gives one source to all layers that are not full.",
            float(len(sources) - 1),
            0,
            "sources more",
        ),
    ]


def _best_minimum(overlap: Tensor, allowed: int) -> float:
    layers, best = len(overlap), 0.0
    for own in itertools.product((False, True), repeat=layers - 1):
        if sum(own) <= allowed:
            source, least = 0, 1.0
            for layer, changes in enumerate(own, start=1):
                source = layer if changes else source
                least = min(least, float(overlap[source, layer]))
            best = max(best, least)
    return best


def _measures() -> list[Finding]:
    away, outside = 0.0, 0.0
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        weights = (4 * torch.randn(3, 4, 1, 2, 80, generator=generator)).softmax(dim=-1)
        order = torch.cat([8 * chunk + torch.randperm(8, generator=generator) for chunk in range(10)])
        one, other = _statistics(weights), _statistics(weights[..., order])
        away = max(away, _away(one.ratio, other.ratio), _away(one.overlap, other.overlap))
        outside = max(outside, -float(one.ratio.min()), float((one.ratio >= 1).sum()))
    return [
        at_most("Permuting the keys inside a chunk changes neither spread nor overlap.", away, 0),
        at_most("The spread lies in [0, 1).", max(outside, 0.0), 0, "outside"),
    ]


def _statistics(weights: Tensor) -> LayerStatistics:
    found = LayerStatistics(weights.shape[1], ChunkSets(8, 5, 1, 2))
    for step in weights:
        for layer, rows in enumerate(step):
            found.add(layer, rows, TokenOrder.full(*rows.shape[::2]))
    return found


def _away(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())
