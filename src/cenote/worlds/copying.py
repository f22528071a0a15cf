"""Copying at a fixed distance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from cenote.worlds.base import IGNORE, Sequences, World


@dataclass(frozen=True)
class FixedOffsetCopy(World[Sequences]):
    """A random string, then the same string again: from its second turn on, each next symbol stood ``offset`` back.

    At position ``t >= offset - 1`` the target is the symbol ``offset - 1`` places before, which is also what comes
    next. Positions before have no target.

    Args:
        offset: length of the string.
        vocabulary: number of symbols.
    """

    name: ClassVar[str] = "fixed_offset_copy"
    predictor: ClassVar[str] = "the symbol one string back"
    offset: int = 12
    vocabulary: int = 64

    def __post_init__(self) -> None:
        if self.offset < 1 or self.vocabulary < 2:
            raise ValueError(
                f"expected an offset of at least 1 and 2 symbols or more, got {self.offset} and {self.vocabulary}"
            )

    @property
    def length(self) -> int:
        """Tokens of a sequence: both turns but the last symbol, which has nothing behind it."""
        return 2 * self.offset - 1

    @property
    def chance(self) -> float:
        """Accuracy of guessing a symbol."""
        return 1 / self.vocabulary

    def _sample(self, size: int, generator: torch.Generator) -> Sequences:
        string = torch.randint(self.vocabulary, (size, self.offset), generator=generator)
        whole = string.repeat(1, 2)
        targets = whole[:, 1:].clone()
        targets[:, : self.offset - 1] = IGNORE
        return Sequences(whole[:, :-1], targets)

    def best(self, batch: Sequences) -> Tensor:
        """The symbol ``offset - 1`` places before; :data:`IGNORE` where there is none."""
        answers = torch.full_like(batch.targets, IGNORE)
        answers[:, self.offset - 1 :] = batch.inputs[:, : self.offset]
        return answers
