"""Texts and planted facts decoded token by token by trained models, under TidalDecode and its peers."""

from __future__ import annotations

import gzip
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import fmean
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache

from cenote.attention import PreallocatedLayer, Recipe, TidalDecode
from cenote.attention.base import LayerCall
from cenote.attention.host import Host, cache_argument, give_cache_layers
from cenote.attention.tidal_decode import TidalDecodeSession
from cenote.attention.window import Window
from cenote.backbones.embedded_language import evaluation_text, load_embedded_language, training_descriptions
from cenote.compress.teacher_forced import teacher_forced_logits, text_nll
from cenote.ops.gather_attention import decode_logits, topk_positions
from cenote.reproductions.base import Settings
from cenote.worlds.planted_facts import PlantedFactsBatch, answer_accuracy

STORIES, STORIES_TEXT = "models/stories260K", "tiny_stories_slice/stories.txt.gz"
SHAKESPEARE = "tiny_shakespeare/input.txt.gz"


@dataclass(frozen=True)
class Subject:
    """A trained model, a text that it never saw, and where TidalDecode chooses in it.

    Attributes:
        name: how findings call it.
        model: in evaluation mode.
        text: the text's tokens.
        length: tokens of a stretch of it.
        bos: the token in front of a stretch.
        choose: the two layers that choose; those below the first are dense.
    """

    name: str
    model: Any
    text: Int[Tensor, " tokens"]
    length: int
    bos: int
    choose: tuple[int, int]

    def recipe(self, budget: int) -> TidalDecode:
        """TidalDecode in this model."""
        return TidalDecode(budget, *self.choose)

    def stretches(self, count: int, seed: int) -> Int[Tensor, "count length"]:
        """Stretches of the text from random places, each behind the first token."""
        generator = torch.Generator().manual_seed(seed)
        places = torch.randint(len(self.text) - self.length, (count,), generator=generator)
        rows = torch.stack([self.text[place : place + self.length - 1] for place in places])
        return torch.cat([torch.full((count, 1), self.bos), rows], dim=1)


def subjects(settings: Settings) -> list[Subject]:
    """The shipped language model on held-out prose, choosing from layer 2 on, as published, and from the middle on.

    Where the data is, stories260K as well (five layers leave no freedom), and Shakespeare in full runs. Where the
    second choice is made is tuned, as in the paper, on other text than the judged one.
    """
    model, tokenizer = load_embedded_language()
    bos = int(model.config.bos_token_id)  # type: ignore[arg-type]
    prose, other = (tokens(tokenizer, text) for text in (evaluation_text(), training_descriptions()))
    shipped = Subject("held-out prose", model, prose, 1024, bos, (2, 3))
    found = []
    for first in (2, model.config.num_hidden_layers // 2):
        settings.progress(f"tuning the second choice behind layer {first}")
        choose = tuned(replace(shipped, text=other), first)
        found.append(
            replace(shipped, name=f"held-out prose, choosing in layers {choose[0]} and {choose[1]}", choose=choose)
        )
    data = settings.data_dir
    if data is not None and (data / STORIES).is_dir() and (data / STORIES_TEXT).is_file():
        from transformers import AutoModelForCausalLM, AutoTokenizer

        stories, words = (kind.from_pretrained(data / STORIES) for kind in (AutoModelForCausalLM, AutoTokenizer))
        text = tokens(words, gzip.decompress((data / STORIES_TEXT).read_bytes()).decode())
        name = "stories (stories260K, choosing in layers 1 and 3)"
        found.append(Subject(name, stories.eval(), text, 512, int(stories.config.bos_token_id), (1, 3)))
    if not settings.quick and data is not None and (data / SHAKESPEARE).is_file():
        text = tokens(tokenizer, gzip.decompress((data / SHAKESPEARE).read_bytes()).decode())
        found += [
            replace(each, name=each.name.replace("held-out prose", "Shakespeare"), text=text) for each in found[:2]
        ]
    return found


def tuned(subject: Subject, first: int, count: int = 4, steps: int = 48) -> tuple[int, int]:
    """The place of the second choice with the least loss at 10 % of the context, at least one layer reusing it."""
    ids = subject.stretches(count, seed=0)
    places = range(first + 1, subject.model.config.num_hidden_layers - 1)
    recipes = {str(place): TidalDecode(subject.length // 10, first, place) for place in places}
    losses = text_losses(subject.model, ids, steps, dict(recipes))
    return first, int(min(losses, key=lambda place: losses[place]))


def tokens(tokenizer: Any, text: str) -> Int[Tensor, " tokens"]:
    """Without special ones."""
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


@dataclass(frozen=True)
class PeerSets(TidalDecode):
    """The layers of TidalDecode with other sets in those that reuse: each its own best ones, or random ones."""

    sets: str = "own"
    seed: int = 0

    def start(self, host: Host) -> TidalDecodeSession:
        return _PeerSession(host, self)


class _PeerSession(TidalDecodeSession):
    def __init__(self, host: Host, recipe: PeerSets) -> None:
        super().__init__(host, recipe.plan_for(host.num_layers), recipe)
        self.random = torch.Generator().manual_seed(recipe.seed) if recipe.sets == "random" else None

    def attend(self, call: LayerCall) -> Float[Tensor, "batch heads queries head_dim"]:
        if self.sparse(call) and self.plan.role(call.layer) == "reuse":
            scores = decode_logits(call.query, call.key, call.scale)
            if self.random is not None:
                scores = torch.rand(scores.shape, generator=self.random)
            self.chosen[self.plan.source(call.layer)] = topk_positions(scores, int(self.recipe.budget))
        return super().attend(call)


def peers(subject: Subject, budget: int, seed: int) -> dict[str, Recipe | None]:
    """TidalDecode, and others with the same dense layers."""
    ours = subject.recipe(budget)
    plan = ours.plan_for(subject.model.config.num_hidden_layers)
    return {
        "dense": None,
        "TidalDecode": ours,
        "no second choice": replace(ours, correction_layer=()),
        "own sets in every layer": PeerSets(budget, *subject.choose, sets="own"),
        "window": Window(budget, dense_layers=plan.layers("full") + plan.layers("select")),
        "random sets": PeerSets(budget, *subject.choose, sets="random", seed=seed),
    }


def decoded(
    model: Any, ids: Int[Tensor, "batch tokens"], prompt: int, recipes: dict[str, Recipe | None]
) -> dict[str, Float[Tensor, "batch predictions vocabulary"]]:
    """Teacher-forced logits under each recipe behind one dense pass over the prompt, whose last column is a step."""
    cache = DynamicCache(config=model.config)
    give_cache_layers(cache, PreallocatedLayer, model.config.num_hidden_layers, static=False)
    with torch.no_grad():
        model(ids[:, : prompt - 1], use_cache=True, logits_to_keep=1, **cache_argument(cache))
    said = {}
    for name, recipe in recipes.items():
        if recipe is None:
            said[name] = teacher_forced_logits(model, ids, prompt=prompt, cache=cache)
        else:
            with recipe(model):
                said[name] = teacher_forced_logits(model, ids, prompt=prompt, cache=cache)
        cache.crop(prompt - 1 - ids.shape[1])
    return said


def text_losses(
    model: Any, ids: Int[Tensor, "batch tokens"], steps: int, recipes: dict[str, Recipe | None]
) -> dict[str, float]:
    """Mean negative log-likelihood in nats of the last ``steps`` tokens under each recipe."""
    said = decoded(model, ids, ids.shape[1] - steps, recipes)
    return {name: float(text_nll(logits, ids).mean()) for name, logits in said.items()}


def retrieval(model: Any, batch: PlantedFactsBatch, recipes: dict[str, Recipe | None]) -> dict[str, float]:
    """Share of right answers in per cent; the question itself is decoded step by step."""
    asked = batch.answer_positions[:, -1, 0] - batch.question_lengths[:, -1]
    prompt = int(asked.min())
    shares = {}
    for name, logits in decoded(model, batch.input_ids, prompt, recipes).items():
        whole = torch.cat([logits.new_zeros(len(logits), prompt - 1, logits.shape[2]), logits], dim=1)
        shares[name] = 100 * float(answer_accuracy(whole, batch).float().mean())
    return shares


def neighbour_overlap(subject: Subject, ids: Int[Tensor, "batch tokens"], steps: int, budget: int) -> float:
    """Mean share of a head's set that the same head of the next layer would choose too, over chance."""
    model, layers, first = subject.model, subject.model.config.num_hidden_layers, subject.choose[0]
    recipe = TidalDecode(budget, plan=("full",) * first + ("select",) * (layers - first))
    shares: list[float] = []
    with recipe(model) as session:

        def compare(*_: object) -> None:
            masks = [chosen.to_mask(ids.shape[1]) for _, chosen in sorted(session.chosen.items())]
            shares.extend(float((a & b).sum(-1).float().mean()) / budget for a, b in pairwise(masks))

        hook = model.register_forward_hook(compare)
        teacher_forced_logits(model, ids, prompt=ids.shape[1] - steps)
        hook.remove()
    return fmean(shares) / (budget / ids.shape[1])
