"""The one face of a labelled data set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from cenote.types import Modality, Task


@runtime_checkable
class Items(Protocol):
    """Raw items, decoded when asked for: PIL images, strings, clips or graphs."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Any: ...


@dataclass(frozen=True)
class Split:
    """One part of a data set.

    Attributes:
        items: raw items, decoded on access.
        targets: ``(items,)`` int64 for classification, ``(items, classes)`` float for multi-label, ``(items,)`` float
            for regression.
        ids: a name an item (file path or row number), for messages.
        fingerprint: digest of the content of this part.
    """

    items: Items
    targets: Tensor
    ids: Sequence[str]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.items)


@dataclass(frozen=True)
class Skipped:
    """An item that could not be read and was left out."""

    split: str
    id: str
    reason: str


@dataclass(frozen=True)
class Data:
    """A data set with its three parts.

    Attributes:
        name: what it was loaded from.
        modality: ``"image"``, ``"text"``, ``"audio"`` or ``"graph"``.
        task: what the targets are.
        classes: class names in label order; empty for regression.
        train, validation, test: the parts.
        skipped: items left out under ``on_error="skip"``.
    """

    name: str
    modality: Modality
    task: Task
    classes: tuple[str, ...]
    train: Split
    validation: Split
    test: Split
    skipped: tuple[Skipped, ...] = field(default=())
