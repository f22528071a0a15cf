"""SeerAttention-R: compressed keys that do not depend on how the text came, and decoding on a budget against Quest."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import fmean

import torch
from torch import Tensor, nn

from cenote.attention.base import Recipe
from cenote.attention.compressed_keys import CompressedKeys
from cenote.attention.host import cache_argument, output_cache
from cenote.attention.quest import Quest
from cenote.attention.seer_decode import SeerDecode
from cenote.attention.seer_gate import DecodeGate
from cenote.reproductions.base import Finding, at_most, finding
from cenote.reproductions.seer_attention_worlds import World

PROMPT, STEPS = 400, 96
"""Together within 512 tokens, up to which the embedded language model predicts prose evenly well."""
BUDGETS = (96, 48)
"""About a fifth and a tenth of the keys."""


def compressed_from_scratch() -> Finding:
    """A prompt of any length and then single tokens give the compressed keys of the whole text."""
    torch.manual_seed(0)
    size, total = 8, 60
    gate = DecodeGate(4, 2, 16, size).requires_grad_(False)
    key, angles = torch.randn(1, 2, total, 16), torch.rand(1, total, 8).repeat(1, 1, 2)
    cos, sin = angles.cos(), angles.sin()
    whole = total // size * size
    expected = gate.keys(key[:, :, :whole], (cos[:, :whole:size], sin[:, :whole:size]))
    away = 0.0
    for prompt in range(1, total):
        state = CompressedKeys(gate)
        state.extend(key[:, :, :prompt], (cos[:, :prompt], sin[:, :prompt]))
        for place in range(prompt, total):
            new = slice(place, place + 1)
            state.extend(key[:, :, new], (cos[:, new], sin[:, new]))
        found = state.keys(whole // size + 1)
        away = max(away, float((found[:, :, :-1] - expected).abs().max()), float(found[:, :, -1].abs().max()))
    return at_most(
        "Compressed keys after a prompt and single steps are those from scratch, at any length of the prompt.",
        away, 1e-5, note=f"Prompts of 1 to {total - 1} tokens, blocks of {size}; the unfinished block is zero.",
    )  # fmt: skip


def decode_findings(world: World, seeds: Sequence[int], steps: int, progress: Callable[[str], None]) -> list[Finding]:
    """Single tokens behind a prompt: how far their distributions are from the dense model's, at equal budgets."""
    size = world.block_size
    dense = _decoded(world)
    plain = _perplexity(world, dense)
    quest = {budget: _decoded(world, Quest(budget, size, dense_layers=())) for budget in BUDGETS}
    runs: list[dict[int, Tensor]] = []
    for seed in seeds:
        progress(f"decode gates of {world.name}, seed {seed}")
        recipe = SeerDecode(block_size=size, token_budget=size)
        batches = [{"input_ids": part[:, : PROMPT + STEPS]} for part in world.training.split(4)]
        learned = recipe.calibrate(world.model, batches, steps=steps, seed=seed)
        # The first and the last block come on top of the budget.
        runs.append({budget: _decoded(world, replace(learned, token_budget=budget - 2 * size)) for budget in BUDGETS})
    found = []
    for budget in BUDGETS:
        away = [_divergence(run[budget], dense) for run in runs]
        rival = _divergence(quest[budget], dense)
        found.append(
            finding(
                f"Decoding {world.name} with {budget} tokens a step, the learned gate stays nearer to the dense model "
                "than Quest.",
                "above 0 %",
                [100 * (1 - each / rival) for each in away],
                lambda v: v > 0,
                unit="% lower KL divergence",
                note=f"{STEPS} steps behind {PROMPT} tokens, {len(world.judged)} texts, blocks of {size}, every layer "
                f"sparse; {steps} steps of training. Quest chooses for each query head, the gate for each key and "
                f"value head. KL {fmean(away):.4f} and {rival:.4f}; perplexity: dense {plain:.3f}, learned gate "
                f"{fmean(_perplexity(world, run[budget]) for run in runs):.3f}, Quest "
                f"{_perplexity(world, quest[budget]):.3f}.",
            )
        )
    return found


@torch.no_grad()
def _decoded(world: World, recipe: Recipe | None = None) -> Tensor:
    """Log-probabilities of the token behind each step, ``(texts, STEPS, vocabulary)``."""
    ids = world.judged[:, : PROMPT + STEPS]

    def run() -> Tensor:
        out = world.model(input_ids=ids[:, :PROMPT], use_cache=True)
        cache, found = output_cache(out), []
        for place in range(PROMPT, ids.shape[1]):
            found.append(world.model(input_ids=ids[:, place : place + 1], **cache_argument(cache)).logits)
        return torch.cat(found, dim=1).log_softmax(dim=-1)

    if recipe is None:
        return run()
    with recipe(world.model):
        return run()


def _divergence(found: Tensor, dense: Tensor) -> float:
    """Mean ``KL(dense || found)`` in nats."""
    return float(nn.functional.kl_div(found, dense, reduction="none", log_target=True).sum(dim=-1).mean())


def _perplexity(world: World, found: Tensor) -> float:
    target = world.judged[:, PROMPT + 1 : PROMPT + STEPS + 1]
    return math.exp(float(nn.functional.nll_loss(found.flatten(0, 1), target.flatten())))
