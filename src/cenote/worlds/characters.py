"""Text, letter by letter."""

from __future__ import annotations

import gzip
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cenote.worlds.base import Sequences, World


@dataclass(frozen=True)
class CharacterText(World[Sequences]):
    """Stretches of a text, each letter asking for the next.

    The last ``held_out`` share of the text is never trained on: ``part="test"`` draws from it alone.

    Args:
        text: the whole text.
        length: letters of a stretch.
        part: ``"train"`` or ``"test"``.
        held_out: share of the text kept for ``"test"``.
        order: letters that the reference predictor looks back.
    """

    name: ClassVar[str] = "character_text"
    predictor: ClassVar[str] = "n-gram counts of the training part, backing off"
    text: str = field(repr=False)
    length: int = 64
    part: str = "train"
    held_out: float = 0.1
    order: int = 4

    def __post_init__(self) -> None:
        if self.part not in ("train", "test") or not 0 < self.held_out < 1 or self.order < 0:
            raise ValueError(
                f"expected part 'train' or 'test', a share held out between 0 and 1 and an order of at least 0, got "
                f"{self.part!r}, {self.held_out}, {self.order}"
            )
        smallest = min(len(self._letters("train")), len(self._letters("test")))
        if self.length < 1 or smallest <= self.length:
            raise ValueError(f"the smaller part has {smallest} letters: stretches of {self.length} do not fit")

    @classmethod
    def from_file(cls, path: str | Path, **settings: object) -> CharacterText:
        """The text of a UTF-8 file, which may be compressed (``.gz``)."""
        raw = Path(path).read_bytes()
        text = (gzip.decompress(raw) if Path(path).suffix == ".gz" else raw).decode("utf-8")
        return cls(text, **settings)  # type: ignore[arg-type]

    @property
    def alphabet(self) -> str:
        """Letters in the order of their symbols."""
        return "".join(sorted(set(self.text)))

    @property
    def vocabulary(self) -> int:
        """Number of symbols."""
        return len(set(self.text))

    def encode(self, text: str) -> Int[Tensor, "letters"]:
        """Letters to symbols; ``ValueError`` for one that the text does not have."""
        number = {letter: symbol for symbol, letter in enumerate(self.alphabet)}
        if missing := sorted(set(text) - set(number)):
            raise ValueError(f"the text has no letter(s) {missing[:10]}")
        return torch.tensor([number[letter] for letter in text])

    def decode(self, symbols: Int[Tensor, "letters"]) -> str:
        """Symbols to letters."""
        letters = self.alphabet
        return "".join(letters[symbol] for symbol in symbols.tolist())

    def _letters(self, part: str) -> str:
        cut = round(len(self.text) * (1 - self.held_out))
        return self.text[:cut] if part == "train" else self.text[cut:]

    def _symbols(self, part: str) -> Tensor:
        cache = self.__dict__.setdefault("_encoded", {})
        if part not in cache:
            cache[part] = self.encode(self._letters(part))
        return cache[part]

    def _sample(self, size: int, generator: torch.Generator) -> Sequences:
        symbols = self._symbols(self.part)
        start = torch.randint(len(symbols) - self.length, (size, 1), generator=generator)
        stretch = symbols[start + torch.arange(self.length + 1)]
        return Sequences(stretch[:, :-1], stretch[:, 1:])

    def best(self, batch: Sequences) -> Float[Tensor, "batch tokens symbols"]:
        """Probabilities of the next letter by counting: with ``c`` sightings of the last k letters, ``m`` different
        letters behind them and ``n`` of this one, ``(n + m p_shorter) / (c + m)`` (Witten-Bell), down to a uniform
        guess.
        """
        tables = self.__dict__.setdefault("_tables", {})
        symbols, size = self._symbols("train"), self.vocabulary
        if size ** (self.order + 1) > 2**62:
            raise ValueError(f"an order of {self.order} over {size} letters is too long to count")
        probabilities = torch.full((*batch.inputs.shape, size), 1 / size, dtype=torch.float64)
        for order in range(self.order + 1):
            if order not in tables:
                tables[order] = _contexts(symbols, order, size).unique(return_counts=True)
            known, counts = tables[order]
            seen = _windows(batch.inputs, order, size)
            key = seen[..., None] * size + torch.arange(size)
            place = torch.searchsorted(known, key).clamp(max=len(known) - 1)
            count = torch.where(known[place] == key, counts[place], 0).double()
            total, kinds = count.sum(-1, keepdim=True), (count > 0).sum(-1, keepdim=True)
            mixed = (count + kinds * probabilities) / (total + kinds).clamp(min=1)
            far = torch.arange(batch.inputs.shape[1])[:, None] < order - 1
            probabilities = torch.where((total == 0) | far, probabilities, mixed)
        return probabilities

    def best_loss(self, items: int = 200, seed: int = 1_000_000) -> float:
        """Cross-entropy of :meth:`best` on fresh stretches, in nats a letter."""
        batch = self.sample(items, seed)
        chosen = self.best(batch).gather(-1, batch.targets[..., None])
        return -chosen.log().mean().item()

    def unigram_entropy(self) -> float:
        """Entropy of the letters of the training part, in nats."""
        share = self._symbols("train").bincount(minlength=self.vocabulary).double()
        share = share[share > 0] / share.sum()
        return -math.fsum((share * share.log()).tolist())


def _windows(symbols: Tensor, order: int, size: int) -> Tensor:
    """The last ``order`` symbols up to each place as one number; places before the first count as symbol 0."""
    number = torch.zeros_like(symbols)
    for back in range(order - 1, -1, -1):
        number = number * size + torch.nn.functional.pad(symbols, (back, 0))[..., : symbols.shape[-1]]
    return number


def _contexts(symbols: Tensor, order: int, size: int) -> Tensor:
    """Each stretch of ``order`` symbols with the one behind it, as one number."""
    return _windows(symbols, order, size)[max(order - 1, 0) : -1] * size + symbols[max(order, 1) :]
