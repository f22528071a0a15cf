"""Small worlds in which a deconstructed variant can be watched to learn, or not."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cenote.integrations.deconstructed_qwen2 import DeconstructedQwen2Config, DeconstructedQwen2ForCausalLM
from cenote.mixing import MixerContext
from cenote.worlds.base import Sequences, World
from cenote.worlds.characters import CharacterText
from cenote.worlds.copying import FixedOffsetCopy
from cenote.worlds.models import SequenceModel
from cenote.worlds.recall import AssociativeRecall
from cenote.worlds.training import fit_sequences, sequence_accuracy

MIXERS = {
    "standard": "softmax_attention",
    "MLP": "token_mlp",
    "Approximate": "taylor_attention",
    "Non-approximate": "key_softmax",
    "RndEmbQK": "fixed_attention",
    "StaticEmbQK": "static_attention",
}
"""The paper's names of variants as mixers. FixedSeqQK is RndEmbQK with another start of the stream."""
DIM, DEPTH, HEADS = 48, 2, 4


class Task(NamedTuple):
    """A world, how long it is trained on, and what is asked there in words."""

    world: AssociativeRecall | FixedOffsetCopy
    steps: int
    batch: int
    words: str


RECALL = Task(AssociativeRecall(pairs=6), 500, 128, "recall of 6 pairs asked for in random order")
COPYING = Task(FixedOffsetCopy(offset=12), 300, 32, "copying what stood 12 places before")


def learnt_accuracy(task: Task, variants: str, seed: int) -> float:
    """Accuracy behind training of two layers, ``"RndEmbQK"`` or ``"RndEmbQK, standard"``."""
    torch.manual_seed(seed)
    world = task.world
    model = SequenceModel(
        world.vocabulary, DIM, DEPTH, ", ".join(MIXERS[name] for name in variants.split(", ")),
        norm="rms", feed_forward="swiglu", mlp_ratio=1.0, options={"num_heads": HEADS, "rope_theta": 1e4},
    )  # fmt: skip
    context = MixerContext(stream=torch.randn(1, world.length, DIM))

    def forward(symbols: Tensor) -> Tensor:
        return model(symbols, None, context)

    fit_sequences(model, world, task.steps, lr=3e-3, batch=task.batch, seed=seed, forward=forward)
    return sequence_accuracy(forward, world, seed=1_000_000 + seed)


class Language(NamedTuple):
    """Loss on text that was never trained on, in nats a letter.

    Attributes:
        whole: of the model as trained.
        skipped: of its standard layers alone; ``None`` where all layers are of a kind.
    """

    whole: float
    skipped: float | None


LANGUAGE_MODELS = {
    "standard": ("standard", None),
    "MLP": ("mlp", None),
    "RndEmbQK": ("random_fixed", None),
    "StaticEmbQK": ("static", None),
    "hybrid RndEmbQK": ("random_fixed", "even"),
    "hybrid Non-approximate": ("non_approximate", "even"),
}


def learnt_language(text: CharacterText, name: str, seed: int, steps: int = 1500) -> Language:
    """A Qwen2-type model of four layers on letters, trained on the training part and judged on the other."""
    variants, hybrid = LANGUAGE_MODELS[name]
    torch.manual_seed(seed)
    config = DeconstructedQwen2Config(
        vocab_size=text.vocabulary, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=text.length, variants=variants, hybrid=hybrid, use_cache=False,
    )  # fmt: skip
    model = DeconstructedQwen2ForCausalLM(config)

    def forward(symbols: Tensor) -> Tensor:
        return model(symbols).logits

    fit_sequences(model, text, steps, lr=3e-3, batch=32, weight_decay=0.1, seed=seed, forward=forward)
    test = CharacterText(text.text, length=text.length, part="test")
    whole = _loss(forward, test)
    if hybrid is None:
        return Language(whole, None)
    with model.without_simple_layers():
        return Language(whole, _loss(forward, test))


@torch.no_grad()
def _loss(forward: Callable[[Tensor], Tensor], world: World[Sequences], items: int = 500) -> float:
    examples = world.sample(items, seed=1_000_000)
    losses = [
        F.cross_entropy(forward(inputs).flatten(0, 1), targets.flatten(), reduction="sum").item()
        for inputs, targets in zip(examples.inputs.split(100), examples.targets.split(100), strict=True)
    ]
    return sum(losses) / examples.targets.numel()
