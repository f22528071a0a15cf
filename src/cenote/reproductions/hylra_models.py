"""Trained models and their texts for HyLRA's claims, and what decoding under a plan costs in quality."""

from __future__ import annotations

import gzip
import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from cenote.attention.hylra import HyLRA
from cenote.attention.hylra_profile import LayerProfile, profile_layers
from cenote.attention.plan import LayerPlan
from cenote.backbones.embedded_language import evaluation_text, load_embedded_language
from cenote.compress.teacher_forced import teacher_forced_logits, text_nll

STORIES = "models/stories260K"
STORIES_TEXT = "tiny_stories_slice/stories.txt.gz"
DRAWS = 4


@dataclass(frozen=True)
class Trained:
    """A trained language model with text it never saw.

    Attributes:
        name: how findings call it.
        model: in evaluation mode.
        ids: the text's tokens.
        window: tokens of one piece of it.
        recipe: HyLRA's settings for pieces of this length.
    """

    name: str
    model: Any
    ids: Tensor
    window: int
    recipe: HyLRA

    @property
    def prompt(self) -> int:
        """Tokens of a piece that are read in one pass; the rest are decoded."""
        return self.window * 7 // 8

    def windows(self, seed: int) -> Tensor:
        """The pieces of the text, in an order of the seed's."""
        pieces = self.ids[: len(self.ids) // self.window * self.window].view(-1, self.window)
        return pieces[torch.randperm(len(pieces), generator=torch.Generator().manual_seed(seed))]


def trained_models(quick: bool, data_dir: Path | None) -> list[Trained]:
    """The embedded language model and, where the data is, the stories model.

    A set has 16 chunks of which five are fixed, as in the published plan for Qwen3-4B, and is 13 to 15 % of the keys. A
    model of five layers has reusing ones only where fewer may select than the official script's 0.3.
    """
    model, tokenizer = load_embedded_language()
    ids = torch.tensor(tokenizer(evaluation_text(), add_special_tokens=False).input_ids)
    recipe = HyLRA(top_k=64, chunk_size=4, threshold=0, sparsity=0.8, compute_ratio=0.2)
    found = [Trained("the embedded language model", model, ids, 480, recipe)]
    if not quick:
        longer = replace(recipe, top_k=128, chunk_size=8)
        found.append(Trained("the embedded language model at 960 tokens", model, ids, 960, longer))
    if data_dir is not None and (data_dir / STORIES).is_dir() and (data_dir / STORIES_TEXT).is_file():
        from transformers import AutoModelForCausalLM, AutoTokenizer

        stories = AutoModelForCausalLM.from_pretrained(data_dir / STORIES).eval()
        read = gzip.decompress((data_dir / STORIES_TEXT).read_bytes()).decode()
        tokens = AutoTokenizer.from_pretrained(data_dir / STORIES)(read, add_special_tokens=False, verbose=False)
        found.append(Trained("stories260K", stories, torch.tensor(tokens.input_ids), 480, recipe))
    return found


def calibration(trained: Trained, seed: int, texts: int = 2) -> list[dict[str, Tensor]]:
    """One batch of pieces that :func:`evaluation` never takes."""
    return [{"input_ids": trained.windows(seed)[:texts, : trained.window - 32]}]


def evaluation(trained: Trained, seed: int, texts: int) -> Tensor:
    """Pieces behind those of the calibration."""
    return trained.windows(seed)[2 : 2 + texts]


def free_overlap(trained: Trained, seed: int) -> tuple[Tensor, float]:
    """Overlap ``(kv_heads, layers, layers)`` of sets without fixed chunks, and that of random ones: the budget."""
    sets = replace(trained.recipe.sets, first=0, last=0)
    batches = calibration(trained, seed)
    measured: LayerProfile = profile_layers(trained.model, batches, sets, trained.recipe.steps)
    seen = batches[0]["input_ids"].shape[1] + (trained.recipe.steps + 1) / 2
    return measured.overlap[0], trained.recipe.top_k / seen


@dataclass(frozen=True)
class Quality:
    """How decoding differs from dense decoding.

    Attributes:
        nll: nats per token of the text, perplexity's logarithm.
        divergence: mean Kullback-Leibler divergence from the dense predictions, nats.
    """

    nll: float
    divergence: float


class Judge:
    """Decodes the same pieces under any plan.

    Args:
        trained: the model.
        seed: of the pieces.
        texts: their number.
    """

    def __init__(self, trained: Trained, seed: int, texts: int) -> None:
        self.trained, self.ids = trained, evaluation(trained, seed, texts)
        self._dense = self._decode()
        self.dense = self._quality(self._dense)
        self._known: dict[LayerPlan, Quality] = {}

    def __call__(self, plan: LayerPlan) -> Quality:
        """The plan's quality, measured once."""
        if plan not in self._known:
            with replace(self.trained.recipe, plan=plan)(self.trained.model):
                self._known[plan] = self._quality(self._decode())
        return self._known[plan]

    def mean(self, plans: Sequence[LayerPlan]) -> Quality:
        """The mean quality of several plans."""
        each = [self(plan) for plan in plans]
        return Quality(fmean(q.nll for q in each), fmean(q.divergence for q in each))

    def _decode(self) -> Tensor:
        return teacher_forced_logits(self.trained.model, self.ids, prompt=self.trained.prompt)

    def _quality(self, logits: Tensor) -> Quality:
        ours, dense = (x[:, 1:].log_softmax(dim=-1) for x in (logits, self._dense))
        divergence = (dense.exp() * (dense - ours)).sum(dim=-1).mean()
        return Quality(float(text_nll(logits, self.ids).mean()), float(divergence))


@dataclass(frozen=True)
class Rivals:
    """Plans with as many full and as many selecting layers as a planned one.

    Attributes:
        even: the same full layers, sources spread evenly over the others.
        uniform: the first layers full, sources spread evenly over the others: nothing measured.
        sources: the same full layers, other sources drawn at random (all of them where they are few).
        plans: full layers and sources drawn at random.
    """

    even: LayerPlan
    uniform: LayerPlan
    sources: list[LayerPlan]
    plans: list[LayerPlan]


def rivals(plan: LayerPlan, seed: int) -> Rivals:
    """What a plan is compared with, each at the same cost."""
    full, count, layers = plan.layers("full"), len(plan.layers("select")), len(plan)
    chance = random.Random(seed)
    others = [layer for layer in range(layers) if layer not in full]
    choices = [(others[0], *rest) for rest in itertools.combinations(others[1:], count - 1)]
    drawn = [each for each in choices if LayerPlan.from_selectors(layers, full, each) != plan]
    free = []
    for _ in range(DRAWS):
        some = tuple(sorted(chance.sample(range(layers), len(full))))
        first, *rest = [layer for layer in range(layers) if layer not in some]
        free.append(LayerPlan.from_selectors(layers, some, (first, *chance.sample(rest, count - 1))))
    return Rivals(
        LayerPlan.from_selectors(layers, full, evenly(others, count)),
        LayerPlan.from_selectors(layers, range(len(full)), evenly(range(len(full), layers), count)),
        [
            LayerPlan.from_selectors(layers, full, each)
            for each in (chance.sample(drawn, DRAWS) if len(drawn) > DRAWS else drawn)
        ],
        free,
    )


def evenly(items: Sequence[int], count: int) -> list[int]:
    """``count`` of the items at even distances, the first among them."""
    return [items[number * len(items) // count] for number in range(count)]
