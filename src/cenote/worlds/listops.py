"""ListOps: nested operations on lists of digits, whose value is a digit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from cenote.worlds.base import World

PAD, OPERATIONS, CLOSE = 0, ("[MIN", "[MAX", "[MED", "[SM"), 15
SYMBOLS = ("<pad>", *"0123456789", *OPERATIONS, "]")
"""Text of each symbol: padding, the digits, the four operations, the closing bracket."""
_DIGIT, _OPERATION = 1, 11


class ListOpsBatch(NamedTuple):
    """Expressions and their values.

    Attributes:
        inputs: symbols, :data:`PAD` behind the end, ``(batch, tokens)``.
        mask: ``True`` for a real symbol, ``(batch, tokens)``.
        targets: the value, a digit, ``(batch,)``.
    """

    inputs: Int[Tensor, "batch tokens"]
    mask: Bool[Tensor, "batch tokens"]
    targets: Int[Tensor, "batch"]


@dataclass(frozen=True)
class ListOps(World[ListOpsBatch]):
    """``[MAX 4 3 [MIN 2 3 ] 1 0 [MED 1 5 8 9 2 ] ]`` is 5.

    MIN, MAX, MED (median, rounded down) and SM (sum modulo 10) of two to ``max_arguments`` arguments, each a digit or,
    down to ``max_depth``, another list (with chance ``nesting``). Expressions whose length is outside
    ``[min_length, max_length]`` are drawn again. All items of a batch grow together, level by level.

    Args:
        min_length: fewest symbols.
        max_length: most symbols, and the width of a batch.
        max_depth: lists within lists.
        max_arguments: arguments of an operation, at least 2.
        nesting: chance that an argument is a list.
    """

    name: ClassVar[str] = "listops"
    predictor: ClassVar[str] = "evaluation of the expression"
    min_length: int = 8
    max_length: int = 64
    max_depth: int = 4
    max_arguments: int = 5
    nesting: float = 0.25

    def __post_init__(self) -> None:
        if not 4 <= self.min_length <= self.max_length:
            raise ValueError(f"an expression has at least 4 symbols, got {self.min_length} to {self.max_length}")
        if self.max_depth < 1 or self.max_arguments < 2 or not 0 <= self.nesting < 1:
            raise ValueError(
                f"expected max_depth >= 1, max_arguments >= 2 and nesting in [0, 1), got {self.max_depth}, "
                f"{self.max_arguments}, {self.nesting}"
            )

    @property
    def vocabulary(self) -> int:
        """Number of symbols, padding among them."""
        return len(SYMBOLS)

    def _sample(self, size: int, generator: torch.Generator) -> ListOpsBatch:
        kept = torch.zeros(0, self.max_length, dtype=torch.long)
        for _ in range(1000):
            drawn = self._expressions(2 * size, generator)
            length = (drawn != PAD).sum(dim=1)
            kept = torch.cat(
                [kept, drawn[(length >= self.min_length) & (length <= self.max_length), : self.max_length]]
            )
            if len(kept) >= size:
                inputs = kept[:size]
                return ListOpsBatch(inputs, inputs != PAD, evaluate(inputs))
        raise ValueError(
            f"hardly any expression has {self.min_length} to {self.max_length} symbols: allow more nesting"
        )

    def _expressions(self, size: int, generator: torch.Generator) -> Tensor:
        """Expressions of any length up to a little over ``max_length``; longer ones are cut and stay too long."""
        width = self.max_length + 1
        hole = len(SYMBOLS)  # a place that becomes a list at the next level
        rows = torch.full((size, width), PAD)
        rows[:, 0] = hole
        for depth in range(self.max_depth):
            last = depth == self.max_depth - 1
            holes = rows == hole
            arguments = torch.randint(2, self.max_arguments + 1, rows.shape, generator=generator)
            grown = torch.where(holes, arguments + 2, (rows != PAD).long())
            start = grown.cumsum(dim=1) - grown
            total = grown.sum(dim=1, keepdim=True)
            place = torch.arange(width).expand(size, -1).contiguous()
            source = (torch.searchsorted(start.contiguous(), place, right=True) - 1).clamp(max=width - 1)
            offset = place - start.gather(1, source)
            from_hole, span = holes.gather(1, source), grown.gather(1, source)
            operation = torch.randint(_OPERATION, _OPERATION + 4, rows.shape, generator=generator)
            digit = torch.randint(_DIGIT, _DIGIT + 10, rows.shape, generator=generator)
            nested = torch.rand(rows.shape, generator=generator) < (0.0 if last else self.nesting)
            inside = torch.where(nested, hole, digit)
            fresh = torch.where(offset == 0, operation, torch.where(offset == span - 1, CLOSE, inside))
            rows = torch.where(place < total, torch.where(from_hole, fresh, rows.gather(1, source)), PAD)
        return rows.masked_fill(rows == hole, _DIGIT)

    def best(self, batch: ListOpsBatch) -> Tensor:
        """The value of each expression, worked out."""
        return evaluate(batch.inputs)


def evaluate(inputs: Int[Tensor, "batch tokens"]) -> Int[Tensor, "batch"]:
    """Value of each expression, all read together from left to right with a stack each.

    Raises:
        ValueError: brackets that do not match, an operation without arguments.
    """
    batch, tokens = inputs.shape
    depth = tokens // 2 + 2
    counts = torch.zeros(batch, depth, 10, dtype=torch.long)  # how often each digit is an argument of each open list
    operation = torch.zeros(batch, depth, dtype=torch.long)
    level = torch.zeros(batch, dtype=torch.long)
    every = torch.arange(batch)
    for symbol in inputs.T:
        opens = (symbol >= _OPERATION) & (symbol < CLOSE)
        closes, digit = symbol == CLOSE, (symbol >= _DIGIT) & (symbol < _OPERATION)
        level = level + opens.long()
        operation[every[opens], level[opens]] = symbol[opens] - _OPERATION
        counts[every[opens], level[opens]] = 0
        value = symbol - _DIGIT
        if bool(closes.any()):
            if bool((level[closes] < 1).any()) or bool((counts[every[closes], level[closes]].sum(1) == 0).any()):
                raise ValueError("not a ListOps expression: brackets do not match, or a list is empty")
            value = value.clone()
            value[closes] = _apply(operation[every[closes], level[closes]], counts[every[closes], level[closes]])
            level = level - closes.long()
        given = closes | digit
        counts[every[given], level[given], value[given]] += 1
    if bool((level != 0).any()) or bool((counts[:, 0].sum(dim=1) != 1).any()):
        raise ValueError("not a ListOps expression: brackets do not match")
    return counts[:, 0].argmax(dim=1)


def _apply(operation: Tensor, counts: Tensor) -> Tensor:
    """Minimum, maximum, median (mean of the middle two rounded down) or sum modulo 10 of arguments given by counts."""
    total, upto = counts.sum(dim=1, keepdim=True), counts.cumsum(dim=1)
    there = (counts > 0).int()
    smallest, largest = there.argmax(dim=1), 9 - there.flip(1).argmax(dim=1)
    lower = (upto > (total - 1) // 2).int().argmax(dim=1)
    upper = (upto > total // 2).int().argmax(dim=1)
    summed = (counts * torch.arange(10)).sum(dim=1) % 10
    values = torch.stack([smallest, largest, (lower + upper) // 2, summed], dim=1)
    return values.gather(1, operation[:, None])[:, 0]


def to_text(inputs: Int[Tensor, "tokens"]) -> str:
    """An expression as it is written."""
    return " ".join(SYMBOLS[symbol] for symbol in inputs.tolist() if symbol != PAD)
