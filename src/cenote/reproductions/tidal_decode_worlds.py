"""Texts and planted facts decoded token by token by the shipped language model, under TidalDecode and its peers."""

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
from cenote.backbones.embedded_language import evaluation_text, load_embedded_language
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
    said = decoded(model, batch.input_ids, prompt, recipes)
    shares = {}
    for name, logits in said.items():
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
