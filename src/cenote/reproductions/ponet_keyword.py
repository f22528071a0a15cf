"""PoNet: a word far from the class token decides, and the word in front of it has a say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from cenote.mixing.base import MixerContext
from cenote.worlds.base import IGNORE, Sequences, World
from cenote.worlds.models import SequenceModel
from cenote.worlds.training import fit_sequences, sequence_accuracy

CLS, SEP, NOT, KEYWORDS, ORDINARY = 0, 1, 2, 4, 16
"""Symbols: three of their own, then so many keywords, then so many ordinary words."""

MODELS = {
    "PoNet": "ponet(output_map=True)",
    "softmax attention": "softmax_attention",
    "feed-forward only": "identity",
    "PoNet without the global pooling": "ponet(poolings=('segment', 'local'), output_map=True)",
    "PoNet without the segment pooling": "ponet(poolings=('global', 'local'), output_map=True)",
    "PoNet without the local pooling": "ponet(poolings=('global', 'segment'), output_map=True)",
}
"""Mixers by the name that findings give them."""
RATES: tuple[float, ...] = (4e-3, 1e-3)


@dataclass(frozen=True)
class FarKeyword(World[Sequences]):
    """Sentences of ordinary words behind a class token; one keyword in the second half: which kind, and behind ``not``?

    Keywords are of two kinds, and ``not`` stands in front of half of them, which makes four answers. It also stands in
    front of ordinary words, where it means nothing. The answer is asked for at the class token.

    Args:
        length: tokens of a sequence; every eighth is a separator.
    """

    name: ClassVar[str] = "far_keyword"
    predictor: ClassVar[str] = "kind of the keyword, and whether the word in front of it is not"
    length: int = 33

    def _sample(self, size: int, generator: torch.Generator) -> Sequences:
        def draw(low: int, high: int, *shape: int) -> Tensor:
            return torch.randint(low, high, shape, generator=generator)

        first = 3 + KEYWORDS
        inputs = draw(first, first + ORDINARY, size, self.length)
        chance = torch.rand(size, self.length, generator=generator)
        inputs = inputs.masked_fill(chance < 0.1, NOT)
        inputs[:, 0], inputs[:, 8::8] = CLS, SEP
        # The keyword never touches a separator: its own place and the one in front are inside a sentence.
        places = torch.tensor([n for n in range(self.length // 2, self.length) if n % 8 > 1])
        place = places[draw(0, len(places), size)]
        rows = torch.arange(size)
        keyword, turned = draw(3, first, size), draw(0, 2, size)
        before = torch.where(turned == 1, NOT, draw(first, first + ORDINARY, size))
        inputs[rows, place], inputs[rows, place - 1] = keyword, before
        targets = torch.full_like(inputs, IGNORE)
        targets[:, 0] = (keyword - 3) % 2 + 2 * turned
        return Sequences(inputs, targets)

    def best(self, batch: Sequences) -> Tensor:
        """The right answers, found by looking for the keyword."""
        answers = torch.full_like(batch.targets, IGNORE)
        rows, place = ((batch.inputs >= 3) & (batch.inputs < 3 + KEYWORDS)).nonzero().T
        answers[rows, 0] = (batch.inputs[rows, place] - 3) % 2 + 2 * (batch.inputs[rows, place - 1] == NOT)
        return answers


def keyword_accuracies(mixer: str, seeds: Sequence[int], steps: int) -> tuple[list[float], float]:
    """Test accuracy in per cent for each seed, and the rate: the better of :data:`RATES` on the first seed's validation
    sequences, then kept."""
    world, rates, scores = FarKeyword(), RATES, []
    for seed in seeds:
        models = {rate: train_keyword(mixer, seed, steps, rate) for rate in rates}
        if len(rates) > 1:
            best = max(rates, key=lambda rate: sequence_accuracy(models[rate], world, items=2000, seed=2_000_000))
            rates = (best,)
        scores.append(100 * sequence_accuracy(models[rates[0]], world, items=2000))
    return scores, rates[0]


def train_keyword(mixer: str, seed: int, steps: int, lr: float, dim: int = 32) -> Callable[[Tensor], Tensor]:
    """Two layers with this mixer, trained: from symbols to logits, read at the class token."""
    world = FarKeyword()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SequenceModel(
            3 + KEYWORDS + ORDINARY, dim, 2, mixer, max_length=world.length, classes=4, causal=False,
            options={"num_heads": 2},
        )  # fmt: skip
    forward = with_special_tokens(model)
    fit_sequences(model, world, steps, batch=32, lr=lr, seed=seed, forward=forward)
    return forward


def with_special_tokens(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """The model on symbols, told which of them are class and separator tokens."""
    return lambda symbols: model(symbols, None, MixerContext(special_mask=(symbols == CLS) | (symbols == SEP)))
