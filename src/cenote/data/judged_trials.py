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


def read_trials(path: Path, ids: Sequence[str]) -> Pairs:
    """Trials from a file with a line ``first, second, label`` a pair, separated by commas, tabs or spaces.

    The label is 1 (``target``, ``same``) or 0 (``nontarget``, ``different``); it may also stand first, as VoxCeleb's
    lists have it. A first line of column names is passed over. Items are named as the data set names them, by the end
    of that name (``1688/142285.flac`` for ``/data/1688/142285.flac``), or by the number of their row.

    Raises:
        ValueError: a line that does not read so, an item that is not there (nearest names suggested), or no trials.
    """
    lines = path.read_text().splitlines()
    numbers = _lookup(ids)
    found: list[tuple[int, int, float]] = []
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
        found.append((pair[0], pair[1], (SAME | OTHER)[fields[2].lower()]))
    if not found:
        raise ValueError(f"{path} holds no trials")
    first, second, value = zip(*found, strict=True)
    return Pairs(np.array(first, dtype=int), np.array(second, dtype=int), np.array(value, dtype=float))


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
    first, second = (grid.ravel() for grid in np.meshgrid(enrolled, tested, indexing="ij"))
    return draw_pairs(first, second, label, most, seed)


def all_trials(items: np.ndarray, label: np.ndarray, most: int, seed: int) -> Pairs:
    """Every pair of two items once; see :func:`draw_pairs` for ``most``."""
    rows, columns = np.triu_indices(len(items), 1)
    return draw_pairs(items[rows], items[columns], label, most, seed)


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
