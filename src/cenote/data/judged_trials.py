"""Which pairs of items a verification is tried on."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cenote.data.judged import Pairs
from cenote.data.source import near

SAME = {"1": 1.0, "1.0": 1.0, "true": 1.0, "target": 1.0, "same": 1.0}
OTHER = {"0": 0.0, "0.0": 0.0, "false": 0.0, "nontarget": 0.0, "imposter": 0.0, "impostor": 0.0, "different": 0.0}


DENSE = 1 << 23
"""Pairs up to which all are listed before some are drawn."""


def read_trials(path: Path, ids: Sequence[str], left_out: Sequence[str] = ()) -> tuple[Pairs, int]:
    """Trials from a file with a line ``first, second, label`` a pair, separated by commas, tabs or spaces.

    The label is 1 (``target``, ``same``) or 0 (``nontarget``, ``different``); it may also stand first, as VoxCeleb's
    lists have it. A first line of column names is passed over. Items are named as the data set names them, by the end
    of that name (``1688/142285.flac`` for ``/data/1688/142285.flac``), or by the number of their row.

    Args:
        path: of the file.
        ids: names of the items.
        left_out: names of items that are not used although they are there: lines that name one are passed over.

    Returns:
        The trials, and how many lines were passed over.

    Raises:
        ValueError: a line that does not read so, an item that is not there (nearest names suggested), no trials, or
            trials of one kind only.
    """
    lines = path.read_text().splitlines()
    numbers = _lookup([*ids, *left_out])
    found: list[tuple[int, int, float]] = []
    passed_over = 0
    for count, line in enumerate(lines, 1):
        if not line.strip():
            continue
        fields = next(csv.reader([line])) if "," in line else line.split("\t") if "\t" in line else line.split()
        fields = [field.strip() for field in fields]
        if len(fields) == 3 and fields[2].lower() not in SAME | OTHER and fields[0].lower() in SAME | OTHER:
            fields = [fields[1], fields[2], fields[0]]
        if len(fields) != 3 or fields[2].lower() not in SAME | OTHER:
            if count == 1 and len(fields) == 3:
                continue
            raise ValueError(f"line {count} of {path} is not 'first, second, label' with a label 0 or 1: {line!r}")
        pair = []
        for name in fields[:2]:
            if name not in numbers:
                raise ValueError(f"line {count} of {path} names {name!r}, which is no item{near(name, numbers)}")
            pair.append(numbers[name])
        if max(pair) < len(ids):
            found.append((pair[0], pair[1], (SAME | OTHER)[fields[2].lower()]))
        else:
            passed_over += 1
    if not found:
        raise ValueError(
            f"{path} holds no trials" + (f" of items that are used ({passed_over} of others)" if passed_over else "")
        )
    first, second, value = zip(*found, strict=True)
    if len(set(value)) < 2:
        raise ValueError(f"{path} needs trials of both kinds, but all {len(found)} have the label {value[0]:g}")
    return Pairs(np.array(first, dtype=int), np.array(second, dtype=int), np.array(value, dtype=float)), passed_over


def _lookup(ids: Sequence[str]) -> dict[str, int]:
    """Names to item numbers; an ending of a path counts where only one item has it."""
    numbers: dict[str, int] = {}
    ambiguous: set[str] = set()
    for number, name in enumerate(ids):
        steps = name.split("/")
        for start in range(1, len(steps)):
            ending = "/".join(steps[start:])
            if ending in numbers:
                ambiguous.add(ending)
            numbers[ending] = number
        if name.rpartition("row ")[0] == "" and name.startswith("row "):
            numbers[name.removeprefix("row ")] = number
    for ending in ambiguous:
        del numbers[ending]
    return numbers | {name: number for number, name in enumerate(ids)}


def cross_trials(enrolled: np.ndarray, tested: np.ndarray, label: np.ndarray, most: int, seed: int) -> Pairs:
    """Every enrolled item with every tested one, ``label`` by item number; see :func:`draw_pairs` for ``most``."""
    if len(enrolled) * len(tested) <= DENSE:
        first, second = (grid.ravel() for grid in np.meshgrid(enrolled, tested, indexing="ij"))
        return draw_pairs(first, second, label, most, seed)
    tested = tested[np.argsort(label[tested], kind="stable")]
    start, end = (np.searchsorted(label[tested], label[enrolled], side=side) for side in ("left", "right"))
    return _draw_unlisted(enrolled, tested, (start, end - start), (end, len(tested) - (end - start)), most, seed)


def all_trials(items: np.ndarray, label: np.ndarray, most: int, seed: int) -> Pairs:
    """Every pair of two items once; see :func:`draw_pairs` for ``most``."""
    count = len(items)
    if count * (count - 1) // 2 <= DENSE:
        rows, columns = np.triu_indices(count, 1)
        return draw_pairs(items[rows], items[columns], label, most, seed)
    items = items[np.argsort(label[items], kind="stable")]
    after, end = np.arange(1, count + 1), np.searchsorted(label[items], label[items], side="right")
    return _draw_unlisted(items, items, (after, end - after), (end, count - end), most, seed)


def draw_pairs(first: np.ndarray, second: np.ndarray, label: np.ndarray, most: int, seed: int) -> Pairs:
    """The pairs with 1 for one label and 0 for two; of more than ``most``, so many drawn by ``seed``.

    Pairs of one label, the rarer kind, may make up half of what is kept: error rates count each kind by itself, so
    this changes their precision and not their expectation.

    Raises:
        ValueError: no pair of one label, or none of two.
    """
    same = label[first] == label[second]
    if same.all() or not same.any():
        raise ValueError(f"verification needs pairs of one label and of two, got {int(same.sum())} of {len(same)} same")
    if len(first) > most:
        generator = np.random.default_rng(seed)
        targets = generator.permutation(np.flatnonzero(same))[: most // 2]
        others = generator.permutation(np.flatnonzero(~same))[: most - len(targets)]
        kept = np.sort(np.concatenate([targets, others]))
        first, second, same = first[kept], second[kept], same[kept]
    return Pairs(first, second, same.astype(float))


def _draw_unlisted(
    first: np.ndarray, second: np.ndarray, same: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray],
    most: int, seed: int,
) -> Pairs:  # fmt: skip
    """As :func:`draw_pairs`, in memory for the pairs that are kept only.

    ``same`` and ``other`` say where the partners of each of ``first`` start in ``second``, sorted by label, and how
    many they are; behind the end of ``second`` they go on at its start.
    """
    targets, others = (int(count.sum()) for _, count in (same, other))
    if not targets or not others:
        raise ValueError(f"verification needs pairs of one label and of two, got {targets} of {targets + others} same")
    keep = targets if targets + others <= most else min(targets, most // 2)
    generator = np.random.default_rng(seed)
    parts = []
    for (start, count), total, wanted in ((same, targets, keep), (other, others, min(others, most - keep))):
        ranks = np.sort(generator.choice(total, wanted, replace=False))
        ends = np.cumsum(count)
        rows = np.searchsorted(ends, ranks, side="right")
        place = start[rows] + ranks - (ends[rows] - count[rows])
        parts.append((first[rows], second[place % len(second)]))
    (one, two), (three, four) = parts
    value = np.repeat([1.0, 0.0], [len(one), len(three)])
    return Pairs(np.concatenate([one, three]), np.concatenate([two, four]), value)
