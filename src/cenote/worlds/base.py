"""What a small world is: a seeded generator with the best known predictor beside it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor

IGNORE = -100
"""Target of a position that no loss is asked at, as in ``torch.nn.functional.cross_entropy``."""

BatchT = TypeVar("BatchT")


class Sequences(NamedTuple):
    """A batch of a world of symbols.

    Attributes:
        inputs: symbols, ``(batch, tokens)``.
        targets: the symbol asked for at each position, :data:`IGNORE` where none is, ``(batch, tokens)``.
    """

    inputs: Int[Tensor, "batch tokens"]
    targets: Int[Tensor, "batch tokens"]


class World(ABC, Generic[BatchT]):
    """A generator of tasks whose best answer is known. Subclasses are frozen dataclasses of their settings.

    ``world.sample(size, seed)`` gives one batch, the same for the same seed; ``world.stream(size, seed)`` fresh ones
    without end; ``world.best(batch)`` what the best known predictor answers (:attr:`predictor` names it). Generators
    are vectorised: no loop over items.
    """

    name: ClassVar[str]
    predictor: ClassVar[str]

    def sample(self, size: int, seed: int) -> BatchT:
        """One batch; ``ValueError`` for a size below 1."""
        if size < 1:
            raise ValueError(f"a batch has at least one item, got {size}")
        return self._sample(size, torch.Generator().manual_seed(seed))

    def stream(self, size: int, seed: int) -> Iterator[BatchT]:
        """Fresh batches without end from one generator."""
        if size < 1:
            raise ValueError(f"a batch has at least one item, got {size}")
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield self._sample(size, generator)

    @abstractmethod
    def _sample(self, size: int, generator: torch.Generator) -> BatchT:
        """A batch drawn with this generator alone."""

    @abstractmethod
    def best(self, batch: BatchT) -> Any:
        """Answers of the best known predictor, shaped as the batch's targets."""
