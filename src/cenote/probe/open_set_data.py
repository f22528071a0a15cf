"""Which items a probe must not know: held-out classes, or a second data set."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cenote.data.assemble import assemble
from cenote.data.base import Data, Split
from cenote.data.items import Chosen
from cenote.data.load import find_source
from cenote.data.source import near

PASSED_ON = ("limit", "on_error", "seed")
"""Options of the data set that also hold for a second one."""


@dataclass(frozen=True)
class OpenSet:
    """A data set of known classes, with two kinds of unknown items.

    Attributes:
        known: the data, without the held-out classes, its classes numbered anew.
        surrogate: unknowns that choose the threshold together with the validation part; targets -1. At most as many
            as that part has items, so that neither side rules the choice.
        unknown: unknowns of the test; targets -1.
        settings: where they come from, JSON-able.
        note: the same in words.
    """

    known: Data
    surrogate: Split
    unknown: Split
    settings: dict[str, Any]
    note: str

    @property
    def parts(self) -> tuple[tuple[str, Split], tuple[str, Split]]:
        """The unknown parts by name."""
        return ("surrogate unknowns", self.surrogate), ("test unknowns", self.unknown)

    @classmethod
    def of(cls, spec: str | Sequence[Any] | Data, data: Data, options: Mapping[str, Any] | None = None) -> OpenSet:
        """From ``"3,7"`` or ``["cat", "dog"]`` (classes of ``data``), or the spec of a second data set.

        The first half of the classes named gives the surrogate unknowns (from the training part), the others the test
        unknowns (from the test part); a single class gives both. Of a second data set the training part is surrogate
        and the test part is test; its labels are not looked at.

        Raises:
            ValueError: data that is no classification, names of which only some are classes, fewer than two classes
                left, no unknown item left, a second data set of another modality or the same one again.
        """
        if data.task != "classification":
            raise ValueError(f"open_set judges classification; {data.name} is {data.task}")
        held = None if isinstance(spec, Data) else _held_out(spec, data)
        if held is not None:
            return _without(held, data)
        return _beside(spec if isinstance(spec, Data) else _load(str(spec), data, options or {}), data)


def _held_out(spec: str | Sequence[Any], data: Data) -> list[int] | None:
    """Class numbers that ``spec`` names, in its order; ``None`` if it must be a data set."""
    if isinstance(spec, str) and not spec.strip():
        raise ValueError("open_set names nothing: give classes to hold out (3,7) or a second data set")
    given = spec.split(",") if isinstance(spec, str) else spec
    names = [str(name).strip() for name in given]
    number = {name: index for index, name in enumerate(data.classes)}
    number = {str(index): index for index in range(len(data.classes))} | number  # a name goes before a number
    unknown = [name for name in names if name not in number]
    if isinstance(spec, str) and len(unknown) == len(names):
        return None
    if unknown or not names:
        raise ValueError(
            f"open_set names {', '.join(map(repr, unknown)) or 'nothing'}, not classes of {data.name}: "
            f"{', '.join(data.classes[:20])}{near(unknown[0], data.classes) if unknown else ''}"
        )
    return list(dict.fromkeys(number[name] for name in names))


def _load(spec: str, data: Data, options: Mapping[str, Any]) -> Data:
    chosen = {key: value for key, value in options.items() if key in PASSED_ON}
    try:
        return assemble(find_source(spec, {}), labelled=False, **chosen)
    except ValueError as error:
        raise ValueError(
            f"open_set={spec!r} is neither classes of {data.name} ({', '.join(data.classes[:20])}) nor a data set that "
            f"could be read: {error}"
        ) from error


def _without(held: list[int], data: Data) -> OpenSet:
    first, rest = (held[: len(held) // 2], held[len(held) // 2 :]) if len(held) > 1 else (held, held)
    known = _keep_classes(data, [k for k in range(len(data.classes)) if k not in held])
    surrogate = _unknowns(data.train, _rows(data.train, first), len(known.validation), data.name)
    unknown = _unknowns(data.test, _rows(data.test, rest), None, data.name)
    names = {"surrogate": [data.classes[k] for k in first], "test": [data.classes[k] for k in rest]}
    same = " It is one class, so the threshold of OOSA has seen its like." if first == rest else ""
    note = (
        f"Open set: {', '.join(data.classes[k] for k in held)} held out of training and validation. Thresholds were "
        f"chosen on {len(surrogate)} surrogate unknowns ({', '.join(names['surrogate'])}, from the training part); the "
        f"test has {len(unknown)} unknowns ({', '.join(names['test'])}) of the same data set.{same}"
    )
    return OpenSet(known, surrogate, unknown, {"held_out": names, **_fingerprints(surrogate, unknown)}, note)


def _beside(other: Data, data: Data) -> OpenSet:
    if other.modality != data.modality:
        raise ValueError(f"open_set needs {data.modality}s like {data.name}, but {other.name} holds {other.modality}s")
    if other.test.fingerprint == data.test.fingerprint:
        raise ValueError(f"open_set={other.name!r} is the data set itself: none of it is unknown")
    known = _keep_classes(data, list(range(len(data.classes))))
    surrogate = _unknowns(other.train, np.arange(len(other.train)), len(known.validation), other.name)
    unknown = _unknowns(other.test, np.arange(len(other.test)), None, other.name)
    note = (
        f"Open set: thresholds were chosen on {len(surrogate)} surrogate unknowns (training part of {other.name}); the "
        f"test has {len(unknown)} unknowns (its test part). Both come from the same source, so OOSA is what one gets "
        "when unknowns of the kind to come are at hand."
    )
    return OpenSet(known, surrogate, unknown, {"data": other.name, **_fingerprints(surrogate, unknown)}, note)


def _keep_classes(data: Data, classes: list[int]) -> Data:
    """The data without the other classes, and without classes that have no training item to learn from."""
    seen = set(data.train.targets.tolist())
    classes = [k for k in classes if k in seen]
    if len(classes) < 2:
        raise ValueError(f"open_set leaves {len(classes)} known class(es) of {data.name}: at least 2 are needed")
    if classes == list(range(len(data.classes))):
        return data
    number = torch.full((len(data.classes),), -1)
    number[classes] = torch.arange(len(classes))
    parts: dict[str, Any] = {}
    for part in ("train", "validation", "test"):
        split: Split = getattr(data, part)
        rows = _rows(split, classes)
        if not len(rows):
            raise ValueError(f"open_set leaves no item in the {part} part of {data.name}")
        parts[part] = _subset(split, rows, number[split.targets[rows]], data.name)
    return dataclasses.replace(data, classes=tuple(data.classes[k] for k in classes), **parts)


def _rows(split: Split, classes: Sequence[int]) -> np.ndarray:
    return np.flatnonzero(np.isin(split.targets.numpy(), classes))


def _unknowns(split: Split, rows: np.ndarray, most: int | None, name: str) -> Split:
    """Items without a class, thinned evenly to ``most``."""
    if not len(rows):
        raise ValueError(f"open_set finds no unknown items in a part of {name}")
    if most is not None and len(rows) > most:
        rows = rows[np.linspace(0, len(rows) - 1, most).round().astype(int)]
    return _subset(split, rows, torch.full((len(rows),), -1), name)


def _subset(split: Split, rows: np.ndarray, targets: torch.Tensor, name: str) -> Split:
    digest = hashlib.sha256(split.fingerprint.encode())
    digest.update(rows.astype("<i8").tobytes() + targets.numpy().tobytes())
    ids = [split.ids[row] for row in rows]
    return Split(Chosen(split.items, rows, ids, name), targets, ids, digest.hexdigest())


def _fingerprints(surrogate: Split, unknown: Split) -> dict[str, Any]:
    return {"fingerprints": [surrogate.fingerprint, unknown.fingerprint]}
