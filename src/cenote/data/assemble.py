"""From all rows of a source to three checked parts."""

from __future__ import annotations

import hashlib
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from cenote.data.base import Data, Skipped, Split
from cenote.data.items import Chosen, Unreadable
from cenote.data.labels import Encoded, encode_labels
from cenote.data.source import PARTS, PartName, Source
from cenote.data.splits import holdout
from cenote.types import Task


def assemble(
    source: Source,
    *,
    validation_fraction: float = 0.1,
    test_fraction: float = 0.2,
    seed: int = 0,
    on_error: Literal["raise", "skip"] = "raise",
    limit: int | None = None,
    task: Task | None = None,
    labelled: bool = True,
) -> Data:
    """Divide, limit, check and encode; see :func:`cenote.data.load_data`.

    ``labelled=False`` takes any labels, as long as there are some: for items of which only the pixels or words count.
    """
    for option, fraction in (("validation_fraction", validation_fraction), ("test_fraction", test_fraction)):
        if not 0 < fraction < 1:
            raise ValueError(f"{option} must lie between 0 and 1, got {fraction}")
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error must be 'raise' or 'skip', got {on_error!r}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")

    skipped: list[Skipped] = []
    parts = np.array(source.parts if source.parts is not None else ["train"] * len(source.items))
    for part in PARTS:
        rows = np.flatnonzero(parts == part)
        if len(rows) and all(int(row) in source.problems for row in rows):
            raise ValueError(f"the labels of the {part} part of {source.name} are missing")
    for row, reason in source.problems.items():
        _report(source, row, str(parts[row]), reason, on_error, skipped)
    usable = np.array([row for row in range(len(source.items)) if row not in source.problems], dtype=int)
    encoded = encode_labels(
        [source.labels[row] for row in usable],
        task,
        source.classes,
        None if source.label_names is None else [source.label_names[row] for row in usable],
        source.name,
    )
    groups = encoded.targets.numpy() if encoded.task == "classification" else np.zeros(len(usable), dtype=int)
    chosen = _divide(parts[usable], groups, validation_fraction, test_fraction, seed, source.name)
    if limit is not None:
        for part, index in chosen.items():
            if len(index) > limit:
                # Kept rather than held out: what stays behind shows every class, as long as there are so many places.
                chosen[part] = index[holdout(groups[index], len(index) - limit, seed)[0]]

    splits: dict[PartName, Split] = {}
    for part in PARTS:
        readable = [i for i in chosen[part] if _readable(source, int(usable[i]), part, on_error, skipped)]
        if not readable:
            raise ValueError(f"the {part} part of {source.name} has no readable items")
        splits[part] = _split(source, usable[readable], encoded.targets[readable])
    if labelled:
        _check_labels(source.name, encoded, splits)
    return Data(source.name, source.modality, encoded.task, encoded.classes, **splits, skipped=tuple(skipped))


def _divide(
    parts: np.ndarray, groups: np.ndarray, validation_fraction: float, test_fraction: float, seed: int, name: str
) -> dict[PartName, np.ndarray]:
    """Rows of each part: those found stay, those missing are taken out of the training part, test first."""
    chosen: dict[PartName, np.ndarray] = {part: np.flatnonzero(parts == part) for part in PARTS}
    fractions: tuple[tuple[PartName, float], ...] = (("test", test_fraction), ("validation", validation_fraction))
    if not len(chosen["train"]):
        raise ValueError(f"{name} has no training part: its splits are {', '.join(sorted(set(parts.tolist())))}")
    for part, fraction in fractions:
        if not len(chosen[part]):
            pool = chosen["train"]
            if len(pool) < 2:
                raise ValueError(f"{name} has too few items to take a {part} part from: {len(pool)} left for training")
            kept, held = holdout(groups[pool], max(1, round(len(pool) * fraction)), seed)
            chosen["train"], chosen[part] = pool[kept], pool[held]
    return chosen


def _readable(source: Source, row: int, part: str, on_error: str, skipped: list[Skipped]) -> bool:
    """Whether an item can be read: decoded whole if it may be skipped, its head looked at if it may not."""
    try:
        if on_error == "skip":
            source.items[row]
        else:
            source.items.check(row)
    except Unreadable as error:
        _report(source, row, part, str(error), on_error, skipped)
        return False
    return True


def _report(source: Source, row: int, part: str, reason: str, on_error: str, skipped: list[Skipped]) -> None:
    if on_error == "raise":
        raise ValueError(
            f"cannot read {source.ids[row]} of {source.name}: {reason} "
            "(on_error='skip', --on-error skip, leaves such items out)"
        )
    skipped.append(Skipped(part, source.ids[row], reason))


def _split(source: Source, rows: np.ndarray, targets: Tensor) -> Split:
    digest = hashlib.sha256(source.digest.encode())
    digest.update(rows.astype("<i8").tobytes())
    digest.update(targets.contiguous().numpy().tobytes())
    ids = [source.ids[int(row)] for row in rows]
    return Split(Chosen(source.items, rows, ids, source.name), targets, ids, digest.hexdigest())


def _check_labels(name: str, encoded: Encoded, splits: dict[PartName, Split]) -> None:
    if encoded.task == "regression":
        for part, split in splits.items():
            if not torch.isfinite(split.targets).all():
                worst = int((~torch.isfinite(split.targets)).nonzero()[0])
                raise ValueError(f"{split.ids[worst]} of {name} ({part}) has the label {split.targets[worst].item()}")
        return
    seen = {part: _classes_in(encoded, split.targets) for part, split in splits.items()}
    if len(encoded.classes) < 2 or (encoded.task == "classification" and len(seen["train"]) < 2):
        only = ", ".join(encoded.classes[i] for i in sorted(seen["train"]))
        raise ValueError(f"the training part of {name} has one class only ({only}): there is nothing to tell apart")
    for part in PARTS[1:]:
        unseen = sorted(seen[part] - seen["train"])
        if unseen:
            listed = ", ".join(encoded.classes[i] for i in unseen[:5]) + (", ..." if len(unseen) > 5 else "")
            raise ValueError(
                f"{len(unseen)} labels of the {part} part of {name} never occur in its training part: {listed}"
            )


def _classes_in(encoded: Encoded, targets: Tensor) -> set[int]:
    if encoded.task == "multilabel":
        return set(targets.any(dim=0).nonzero().flatten().tolist())
    return set(targets.unique().tolist())
