"""Multi-query associative recall: pairs are shown, then some of their keys are asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from cenote.worlds.base import IGNORE, Sequences, World


@dataclass(frozen=True)
class AssociativeRecall(World[Sequences]):
    """``k1 v1 k2 v2 ... kP vP`` with distinct keys, then the keys again in another order, each asking for its value.

    Symbols ``0 .. keys-1`` are keys, the ``values`` symbols behind them values, drawn with replacement. At each queried
    key the target is the value that followed it, so that the answer stands nowhere behind its question.

    Args:
        pairs: pairs shown, P.
        queries: keys asked for; all P by default.
        keys: symbols that can be keys, at least P.
        values: symbols that can be values.
        shuffled: ask in random order instead of the order shown, which can be answered by counting back.
    """

    name: ClassVar[str] = "associative_recall"
    predictor: ClassVar[str] = "look-up of the pair"
    pairs: int = 8
    queries: int | None = None
    keys: int = 32
    values: int = 32
    shuffled: bool = True

    def __post_init__(self) -> None:
        asked = self.asked
        if not 1 <= asked <= self.pairs <= self.keys or self.values < 1:
            raise ValueError(
                f"recall needs 1 <= queries <= pairs <= keys and a value, got queries={asked}, pairs={self.pairs}, "
                f"keys={self.keys}, values={self.values}"
            )

    @property
    def asked(self) -> int:
        """Number of queries."""
        return self.pairs if self.queries is None else self.queries

    @property
    def vocabulary(self) -> int:
        """Number of symbols."""
        return self.keys + self.values

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return 2 * self.pairs + self.asked

    @property
    def chance(self) -> float:
        """Accuracy of guessing a value."""
        return 1 / self.values

    def _sample(self, size: int, generator: torch.Generator) -> Sequences:
        key = torch.rand(size, self.keys, generator=generator).argsort(dim=1)[:, : self.pairs]
        value = torch.randint(self.keys, self.vocabulary, (size, self.pairs), generator=generator)
        order = torch.rand(size, self.pairs, generator=generator).argsort(dim=1)
        if not self.shuffled:
            order = torch.arange(self.pairs).expand(size, -1)
        order = order[:, : self.asked]
        inputs = torch.cat([torch.stack([key, value], dim=2).flatten(1), key.gather(1, order)], dim=1)
        targets = torch.full_like(inputs, IGNORE)
        targets[:, 2 * self.pairs :] = value.gather(1, order)
        return Sequences(inputs, targets)

    def best(self, batch: Sequences) -> Tensor:
        """The value that followed each queried key; :data:`IGNORE` elsewhere."""
        shown = 2 * self.pairs
        key, value, query = batch.inputs[:, :shown:2], batch.inputs[:, 1:shown:2], batch.inputs[:, shown:]
        answers = torch.full_like(batch.targets, IGNORE)
        answers[:, shown:] = value.gather(1, (query[:, :, None] == key[:, None]).int().argmax(dim=2))
        return answers
