"""Small frozen language models, their texts, and how well they predict them when prompts attend to chosen blocks."""

from __future__ import annotations

import gzip
import math
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from cenote.attention.base import Recipe
from cenote.attention.block_heuristic import BlockHeuristic
from cenote.attention.block_prefill import BlockPrefill
from cenote.attention.seer_attention import SeerAttention
from cenote.worlds.planted_facts import PlantedFacts, PlantedFactsBatch, answer_accuracy

STORIES_MODEL, STORIES = "models/stories260K", "tiny_stories_slice/stories.txt.gz"
RATIOS = (0.5, 0.3, 0.2, 0.1)
RULES = {
    "quest": "Quest bounds",
    "mean_pooled": "mean-pooled q.k",
    "local": "the nearest blocks",
    "random": "random blocks",
}
"""The strongest first."""
LEARNED = "the learned gate"

Curves = dict[str, dict[float, float]]
"""Perplexity by method and ``nz_ratio``; 1 is dense."""


@dataclass(frozen=True)
class World:
    """A frozen model, token ids to learn gates from ``(sequences, tokens)``, ids to judge on, and facts to find."""

    name: str
    model: nn.Module
    training: Tensor
    judged: Tensor
    block_size: int
    facts: PlantedFactsBatch | None = None


def stories_world(data: Path, seed: int, sequences: int = 20) -> World:
    """stories260K: gates learn from stories that the model itself writes, and are judged on real ones.

    The stories stand one behind the other, each with its beginning-of-text token, in windows of 512 tokens, as the
    model was trained.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(data / STORIES_MODEL).eval().requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(data / STORIES_MODEL)
    with gzip.open(data / STORIES, "rt", encoding="utf-8") as file:
        texts = [text for text in file.read().split("<|endoftext|>") if text.strip()]
    ids = [token for text in texts for token in tokenizer.encode(text.strip())]
    torch.manual_seed(seed)
    start = torch.full((sequences, 1), model.config.bos_token_id)
    written = model.generate(
        start, attention_mask=torch.ones_like(start), do_sample=True, top_k=0, min_new_tokens=511, max_new_tokens=511,
        pad_token_id=0,
    )  # fmt: skip
    return World("stories260K", model, written, windows(ids, 512), 8)


def embedded_world(sequences: int = 16) -> World | None:
    """The embedded language model on prose that it never saw and on planted facts, 1024 tokens at a time.

    Half of what gates learn from is prose, half planted facts with other names and numbers than those judged. ``None``
    where the model is not there.
    """
    try:
        from cenote.backbones.embedded_language import evaluation_text, load_embedded_language, training_descriptions

        model, tokenizer = load_embedded_language()
    except (ImportError, ValueError):
        return None
    model.requires_grad_(False)
    length, start = 1024, int(tokenizer.bos_token_id)

    def cut(text: str) -> Tensor:
        rows = windows(tokenizer.encode(text, add_special_tokens=False), length - 1)
        return torch.cat([torch.full((len(rows), 1), start), rows], dim=1)

    prose, half = cut(training_descriptions()), sequences // 2
    planted = PlantedFacts(tokenizer, filler=training_descriptions()).batch(sequences - half, length, seed=1)
    training = torch.cat([prose[:half], planted.input_ids])
    facts = PlantedFacts(tokenizer).batch(32, length, seed=2)
    return World("the embedded language model", model, training, cut(evaluation_text())[:8], 16, facts)


def windows(ids: list[int], length: int) -> Tensor:
    """Consecutive stretches of so many tokens; what is left over is dropped."""
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


def trained_gate(world: World, seed: int, steps: int) -> SeerAttention:
    """The recipe with gates that learnt from the world's training ids."""
    recipe = SeerAttention(block_size=world.block_size, last_block_dense=False)
    batches = [{"input_ids": part} for part in world.training.split(4)]
    return recipe.calibrate(world.model, batches, steps=steps, seed=seed)


def perplexity(world: World, recipe: Recipe | None = None) -> float:
    """Of the judged ids, every sequence a prompt of its own."""
    total, count = 0.0, 0
    for ids in world.judged.split(8):
        logits = _logits(world.model, ids, recipe)
        total += float(nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"))
        count += ids[:, 1:].numel()
    return math.exp(total / count)


def facts_found(world: World, recipe: Recipe | None = None) -> float:
    """Share of the planted facts that the model answers right, in per cent; the world must have some."""
    assert world.facts is not None
    right = []
    for first in range(0, len(world.facts.input_ids), 8):
        part = slice(first, first + 8)
        batch = PlantedFactsBatch(**{f.name: getattr(world.facts, f.name)[part] for f in fields(world.facts)})
        right.append(answer_accuracy(_logits(world.model, batch.input_ids, recipe), batch))
    return 100 * float(torch.cat(right).float().mean())


@torch.no_grad()
def _logits(model: nn.Module, ids: Tensor, recipe: Recipe | None) -> Tensor:
    if recipe is None:
        return model(input_ids=ids, use_cache=False).logits
    with recipe(model):
        return model(input_ids=ids, use_cache=False).logits


def curves(world: World, learned: SeerAttention, seed: int, known: Curves | None = None) -> Curves:
    """Perplexity of every method at every density; at the same ratio all keep equally many blocks of every row.

    Args:
        known: curves that do not depend on the seed, from an earlier run.
    """
    dense = perplexity(world)
    found: Curves = dict(known or {})
    for name, recipe in recipes_of(world, learned, seed).items():
        if name not in found:
            found[name] = {1.0: dense, **{r: perplexity(world, replace(recipe, nz_ratio=r)) for r in RATIOS}}
    return found


def recipes_of(world: World, learned: SeerAttention, seed: int) -> dict[str, BlockPrefill]:
    """Every method by its name."""
    recipes: dict[str, BlockPrefill] = {LEARNED: learned}
    for rule, name in RULES.items():
        recipes[name] = BlockHeuristic(block_size=world.block_size, last_block_dense=False, rule=rule, seed=seed)
    return recipes
