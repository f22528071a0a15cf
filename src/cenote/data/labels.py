"""From labels as found to targets: which task it is, and the numbers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cenote.types import Task

TASKS: tuple[Task, ...] = ("classification", "multilabel", "regression")


class Encoded(NamedTuple):
    """Targets of all rows; see :class:`cenote.data.base.Split` for their shapes."""

    task: Task
    targets: Tensor
    classes: tuple[str, ...]


def infer_task(labels: Sequence[Any]) -> Task:
    """Lists are multi-label, fractional numbers regression, everything else classification."""
    if any(isinstance(label, list | tuple) for label in labels):
        return "multilabel"
    if any(isinstance(label, float) for label in labels):
        return "regression"
    return "classification"


def encode_labels(
    labels: Sequence[Any],
    task: Task | None = None,
    classes: tuple[str, ...] | None = None,
    label_names: Sequence[Any] | None = None,
    name: str = "the data set",
) -> Encoded:
    """Turn labels into targets.

    Args:
        labels: integers, strings or booleans (classification); lists of them, or lists of zeros and ones, one a class
            (multi-label); floats (regression). None missing.
        task: ``None`` to infer it. ``"multilabel"`` also takes strings such as ``"red|round"`` (separated by ``|``,
            ``;`` or ``,``), ``"regression"`` also integers and numbers written as strings.
        classes: declared names; integer labels count into them.
        label_names: a readable name a row, used where each label has exactly one.
        name: of the data set, for messages.

    Raises:
        ValueError: unknown task, or labels that do not fit it.
    """
    task = task or infer_task(labels)
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    if task == "regression":
        try:
            return Encoded(task, torch.tensor([float(label) for label in labels], dtype=torch.float32), ())
        except (TypeError, ValueError) as error:
            raise ValueError(f"regression on {name} needs numbers as labels: {error}") from error
    if task == "multilabel":
        return _multilabel(labels, classes, name)
    wrong = next((label for label in labels if isinstance(label, list | tuple | dict)), None)
    if wrong is not None:
        raise ValueError(
            f"classification on {name} needs one label a row, got {wrong!r}: did you mean task='multilabel'?"
        )
    values = _plain(labels)
    if classes is not None and all(isinstance(value, int) for value in values):
        _check_range(values, classes, name)
        return Encoded(task, torch.tensor(values, dtype=torch.int64), classes)
    known = sorted(set(values), key=_order)
    number = {value: index for index, value in enumerate(known)}
    targets = torch.tensor([number[value] for value in values], dtype=torch.int64)
    return Encoded(task, targets, _names(known, values, label_names))


def _multilabel(labels: Sequence[Any], classes: tuple[str, ...] | None, name: str) -> Encoded:
    rows = [_plain(_listed(label)) for label in labels]
    # A set of labels never repeats one; a row of zeros and ones over three or more classes must.
    if any(len(row) != len(set(row)) for row in rows):
        width = len(rows[0])
        if any(len(row) != width or not set(row) <= {0, 1} for row in rows):
            raise ValueError(f"multi-label rows of {name} must be lists of classes, or of zeros and ones of one length")
        if classes is not None and len(classes) != width:
            raise ValueError(f"rows of {name} have {width} entries for {len(classes)} classes")
        names = classes or tuple(str(index) for index in range(width))
        return Encoded("multilabel", torch.tensor(rows, dtype=torch.float32), names)
    values = [value for row in rows for value in row]
    if classes is not None and all(isinstance(value, int) for value in values):
        _check_range(values, classes, name)
        known: list[Any] = list(range(len(classes)))
    else:
        known = sorted(set(values), key=_order)
        classes = tuple(str(value) for value in known)
    number = {value: index for index, value in enumerate(known)}
    targets = torch.zeros(len(rows), len(known))
    for target, row in zip(targets, rows, strict=True):
        target[[number[value] for value in row]] = 1.0
    return Encoded("multilabel", targets, classes)


def _listed(label: Any) -> list[Any]:
    if isinstance(label, str):
        return [part.strip() for part in re.split(r"[|;,]", label) if part.strip()]
    return list(label) if isinstance(label, list | tuple) else [label]


def _plain(values: Sequence[Any]) -> list[Any]:
    """Whole floats as integers: a column that once had gaps should name its classes ``3``, not ``3.0``."""
    return [int(v) if isinstance(v, bool) or (isinstance(v, float) and v.is_integer()) else v for v in values]


def _order(value: Any) -> tuple[bool, Any, str]:
    number = isinstance(value, int | float)
    return (not number, value if number else 0, str(value))


def _names(known: list[Any], values: list[Any], label_names: Sequence[Any] | None) -> tuple[str, ...]:
    if label_names is not None:
        found: dict[Any, set[Any]] = {}
        for value, readable in zip(values, label_names, strict=True):
            found.setdefault(value, set()).add(readable)
        readable_names = [str(next(iter(names))) for names in (found[value] for value in known) if len(names) == 1]
        if len(readable_names) == len(known) == len(set(readable_names)):
            return tuple(readable_names)
    return tuple(str(value) for value in known)


def _check_range(values: list[int], classes: tuple[str, ...], name: str) -> None:
    wrong = next((value for value in values if not 0 <= value < len(classes)), None)
    if wrong is not None:
        raise ValueError(f"{name} has the label {wrong}, but declares {len(classes)} classes (0 to {len(classes) - 1})")
