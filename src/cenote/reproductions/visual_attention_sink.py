"""Visual attention redistribution on given maps and in a decoder with planted massive activations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cenote.attention.host import cache_argument, output_cache
from cenote.attention.sink_dimensions import find_sink_dimensions
from cenote.attention.visual_attention_redistribution import VisualAttentionRedistribution
from cenote.integrations.attention_capture import AttentionCapture
from cenote.integrations.attention_interface import Attended, AttentionCall, redirected
from cenote.ops.attention_sinks import redistribute_attention, sink_scores
from cenote.reproductions.base import Finding, Reproduction, Settings, at_most, finding
from cenote.reproductions.golden import golden_findings

SINK, IMAGE_SINK, SPAN, TAU = 1, 50, (4, 12), 4.0
"""Token in front, token on the image's background, the image's tokens, threshold."""


def run(settings: Settings) -> list[Finding]:
    """Sums, identities and ratios on random maps; search and redistribution in the planted decoder."""
    found: list[list[Finding]] = []
    for seed in settings.seeds:
        settings.progress(f"seed {seed}: a decoder with planted sinks")
        found.append(_planted(seed, settings.quick))
    joined = [
        replace(
            parts[0],
            values=tuple(part.values[0] for part in parts),
            passed=tuple(part.passed[0] for part in parts),
        )
        for parts in zip(*found, strict=True)
    ]
    return [*joined, *golden_findings("visual-attention-sink"), *_exact()]


def _exact() -> list[Finding]:
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(2, 8, 16, 40, generator=generator).mul(2).softmax(-1)
    image = torch.zeros(2, 40, dtype=torch.bool)
    image[:, 4:20] = True
    sinks = torch.zeros_like(image)
    sinks[0, [0, 5, 9]], sinks[1, [0, 12]] = True, True
    rows = torch.ones(2, 16, dtype=torch.bool)
    after = redistribute_attention(weights, sinks, image, rows, rho=0.6)
    chosen = after.selected
    text = (~sinks & ~image)[:, None, None].expand_as(weights)
    same = torch.equal(after.weights[~chosen], weights[~chosen]) and torch.equal(after.weights[text], weights[text])
    nothing = [
        redistribute_attention(weights, sinks, image, rows, moved=0.0).weights,
        redistribute_attention(weights, sinks, image, rows, rho=1.1).weights,
        redistribute_attention(weights, torch.zeros_like(sinks), image, rows, rho=0.0).weights,
    ]
    whole = redistribute_attention(weights, sinks, image, rows, moved=1.0, rho=0.0, min_mass=0.0)
    free = (image & ~sinks)[:, None, None]
    shares = [part * free / (part * free).sum(-1, keepdim=True) for part in (after.weights, weights)]
    x = torch.randn(1, 30, 64, generator=generator)
    scores = sink_scores(x, (3, 9))
    x[0, 7, 20] = 500.0
    outside = float(sink_scores(x, (3, 9))[0, 7])
    return [
        at_most("Rows keep their sum.", float((after.weights.sum(-1) - 1).abs().max()), 1e-6),
        at_most("No entry is negative.", float((-after.weights).clamp(min=0).max()), 0.0),
        at_most("Rows not selected, and text that is no sink, stay bit for bit.", float(not same), 0.0, unit="changed"),
        at_most(
            "Nothing moved, no sinks or rho above 1 give the map back.",
            float(not all(torch.equal(each, weights) for each in nothing)),
            0.0,
            unit="changed",
        ),
        at_most(
            "With everything moved, sinks of selected rows get no attention.",
            float((whole.weights * sinks[:, None, None])[whole.selected].max()),
            0.0,
        ),
        at_most(
            "Ratios between image tokens that are no sinks stay.", float((shares[0] - shares[1]).abs().max()), 1e-6
        ),
        at_most(
            "The sink score does not depend on the scale of a token.",
            float((sink_scores(x[:, :7] * 50, (3, 9)) / scores[:, :7] - 1).abs().max()),
            1e-4,
            unit="relative difference",
        ),
        at_most("A large activation outside the sink dimensions makes no sink.", outside, TAU, unit="score"),
    ]


def planted_decoder(seed: int, layers: int = 6) -> Any:
    """A random Llama in which two tokens carry massive activations in two dimensions, and those dimensions."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=4, head_dim=8, initializer_range=0.15,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    dimensions = tuple(sorted(torch.randperm(64)[:2].tolist()))
    for token in (SINK, IMAGE_SINK):
        model.model.embed_tokens.weight[token, list(dimensions)] = 400.0
    return model, dimensions


def planted_ids(seed: int, rows: int, tokens: int = 28) -> Tensor:
    """Texts with a sink in front and two in the image, which is tokens 4 to 15."""
    ids = torch.randint(2, 49, (rows, tokens), generator=torch.Generator().manual_seed(seed))
    ids[:, 0] = SINK
    ids[:, [6, 11]] = IMAGE_SINK
    return ids


@torch.no_grad()
def _planted(seed: int, quick: bool) -> list[Finding]:
    model, dimensions = planted_decoder(seed)
    ids = planted_ids(seed + 100, 4 if quick else 32)
    found = find_sink_dimensions(model, [{"input_ids": ids}], tau=TAU)
    recipe = VisualAttentionRedistribution(
        found, tau=TAU, rho=0.0, min_mass=0.0, image_span=SPAN, first_layers=1, moved=0.6
    )
    gained, lost = _moved(model, recipe, ids)
    with recipe(model):
        whole = model(ids).logits[:, 20:]
        out = model(ids[:, :21])
        steps = [out.logits[:, -1]]
        for place in range(21, ids.shape[1]):
            out = model(ids[:, place : place + 1], **cache_argument(output_cache(out)))
            steps.append(out.logits[:, -1])
    away = float((torch.stack(steps, dim=1) - whole).abs().max())
    right = float(found == dimensions)
    return [
        finding(
            "The search finds the planted sink dimensions.", "both and no other", right, lambda v: v == 1, unit="found"
        ),
        at_most(
            "Attention on image tokens that are no sinks rises by exactly the moved share of the sinks' attention.",
            float((gained - 0.6 * lost).abs().max()),
            1e-5,
        ),
        finding(
            "In the decoder, sinks draw attention that can be moved.",
            "above 0",
            float(lost.mean()),
            lambda v: v > 0,
            unit="attention a row",
        ),
        at_most("Cached decoding equals running the whole sequence with the same sinks.", away, 1e-4),
    ]


def _moved(model: Any, recipe: VisualAttentionRedistribution, ids: Tensor) -> tuple[Tensor, Tensor]:
    """What a changed layer's image tokens gained, from the maps before and after, and what its sinks held."""
    layer = 1  # the first that changes: its queries and keys are the dense model's
    seen: dict[str, Tensor] = {}
    with AttentionCapture(model, keep="maps") as maps:
        model(ids)
    before = maps.layers[layer]
    assert isinstance(before, Tensor)
    sinks = torch.zeros_like(ids, dtype=torch.bool)
    sinks[:, [0, 6, 11]] = True
    image = torch.zeros_like(sinks)
    image[:, SPAN[0] : SPAN[0] + SPAN[1]] = True
    with recipe(model), _map_read(model.model.layers[layer].self_attn, model, seen):
        model(ids)
    after = seen["map"]
    free = (image & ~sinks)[:, None, None]
    rows = slice(SPAN[0] + SPAN[1], None)
    gained = ((after - before) * free).sum(-1)[:, :, rows]
    return gained, (before * sinks[:, None, None]).sum(-1)[:, :, rows]


@contextmanager
def _map_read(attention: Any, model: Any, seen: dict[str, Tensor]) -> Iterator[None]:
    """Within the block, keep the map that a layer attends by: what it makes of values that are rows of the identity."""

    def read(call: AttentionCall) -> Attended:
        if call.module is not attention:
            return call.proceed()
        batch, heads, keys, _ = call.value.shape
        output, _ = call.proceed(value=torch.eye(keys).expand(batch, heads, keys, keys))
        seen["map"] = output.transpose(1, 2)
        values = call.value.repeat_interleave(call.query.shape[1] // heads, dim=1)
        return (seen["map"] @ values).transpose(1, 2).contiguous(), None

    with redirected(model.model, read, lazy_mask=True):
        yield


REPRODUCTION = Reproduction(
    "visual-attention-sink",
    "A few image tokens draw attention whatever the question; moving part of it to the rest of the image, in heads "
    "that look at the image, changes nothing else.",
    run,
)
