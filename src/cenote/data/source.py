"""What every format is read into before splits are made."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from cenote.data.base import Items
from cenote.types import Modality

PartName = Literal["train", "validation", "test"]
PARTS: tuple[PartName, ...] = ("train", "validation", "test")

SPLIT_NAMES: dict[str, PartName] = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}
"""The usual names of the parts."""


class Checkable(Items, Protocol):
    """Items whose readability can be looked at without decoding them."""

    def check(self, index: int) -> None: ...


@dataclass
class Source:
    """All rows of a data set, in the order in which they were found.

    Attributes:
        name: what was loaded.
        modality: ``"image"``, ``"text"``, ``"audio"`` or ``"graph"``.
        items: one a row, decoded on access.
        labels: one a row, as found: integers, strings, floats or lists; ``None`` where there is none.
        ids: a name a row, for messages.
        digest: of the content.
        parts: the part each row belongs to, or ``None`` where the data set is not divided.
        classes: class names where the format declares them; integer labels then count into it.
        label_names: a readable name a row, where the format has one beside the label.
        problems: rows that cannot be used, found without decoding them, and why.
    """

    name: str
    modality: Modality
    items: Checkable
    labels: list[Any]
    ids: Sequence[str]
    digest: str
    parts: Sequence[PartName] | None = None
    classes: tuple[str, ...] | None = None
    label_names: Sequence[Any] | None = None
    problems: dict[int, str] = field(default_factory=dict)


def part_name(found: object, where: str) -> PartName:
    """``"val"`` to ``"validation"`` and so on.

    Raises:
        ValueError: not a usual name of a part.
    """
    part = SPLIT_NAMES.get(str(found).strip().lower())
    if part is None:
        raise ValueError(
            f"unknown split {found!r} in {where}: expected {', '.join(SPLIT_NAMES)}{near(str(found), SPLIT_NAMES)}"
        )
    return part


def near(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'a' or 'b'?"`` for what resembles ``name``, else nothing."""
    matches = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(map(repr, matches))}?" if matches else ""
