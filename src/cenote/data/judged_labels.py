"""Labelled items of any modality for verification (speakers, identities) and clustering (topics, intents)."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cenote.data.base import Items
from cenote.data.items import Chosen, Unreadable
from cenote.data.judged import Labels
from cenote.data.judged_tables import Troubles, column_names, optional
from cenote.data.labels import encode_labels
from cenote.data.load import find_source
from cenote.data.source import Source, part_name
from cenote.data.splits import holdout

SPEAKERS = ("speaker", "speaker_id", "spk", "spk_id", "client_id", "identity", "person", "person_id")
ENROLMENT = ("enrol", "enroll", "enrolment", "enrollment")


@dataclass
class Labelled:
    """Rows of a source with what each is for.

    Attributes:
        source: the rows.
        roles: ``"train"``, ``"validation"``, ``"test"`` or ``"enrol"`` a row; ``None`` where there are no parts.
    """

    source: Source
    roles: np.ndarray | None

    def rows(self, *roles: str) -> np.ndarray:
        """Rows of these roles."""
        return np.flatnonzero(np.isin(self.roles, roles)) if self.roles is not None else np.arange(0)

    def everything(self) -> np.ndarray:
        return np.arange(len(self.source.items))


def read_labelled(spec: str, task: str, columns: dict[str, str | None]) -> Labelled:
    """A source whose split column may also say ``enrol``; speakers are looked for first where ``task`` verifies.

    Raises:
        ValueError: as :func:`cenote.data.load.find_source`.
    """
    columns = {name: column for name, column in columns.items() if column is not None}
    there = column_names(spec)
    if task == "verification" and not columns.get("label_column"):
        speaker = optional(there, SPEAKERS)
        columns |= {"label_column": speaker} if speaker else {}
    split = columns.get("split_column", optional(there, ("split", "partition", "subset")))
    if not split or split not in there:
        source = find_source(spec, columns)
        return Labelled(source, None if source.parts is None else np.array(source.parts))
    # Read once as a label: enrolment is no part that labelled data knows.
    names = find_source(spec, {**columns, "label_column": split, "split_column": ""}).labels
    roles = {name: "enrol" if str(name).lower() in ENROLMENT else part_name(name, spec) for name in set(names)}
    source = find_source(spec, {**columns, "split_column": ""})
    return Labelled(source, np.array([roles[name] for name in names]))


class Joined:
    """Items of several sources end to end, with a prompt in front of texts."""

    def __init__(self, parts: Sequence[Items], prompt: str) -> None:
        self.parts, self.prompt = parts, prompt
        self.ends = np.cumsum([len(part) for part in parts]).tolist()

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> Any:
        part = bisect_right(self.ends, index)
        item = self.parts[part][index - (self.ends[part - 1] if part else 0)]
        return self.prompt + item if self.prompt else item


class ItemPool:
    """Collects rows of sources as items; the same rows come once.

    Attributes:
        ids: a name an item.
    """

    def __init__(self, prompt: str) -> None:
        self.prompt, self.ids = prompt, list[str]()
        self._parts: list[Chosen] = []
        self._digest = hashlib.sha256(prompt.encode())

    def add(self, source: Source, rows: np.ndarray) -> np.ndarray:
        """The item numbers of new rows."""
        start = len(self.ids)
        names = [source.ids[int(row)] for row in rows]
        self._parts.append(Chosen(source.items, rows, names, source.name))
        self._digest.update(source.digest.encode() + rows.astype("<i8").tobytes())
        self.ids += names
        return np.arange(start, len(self.ids))

    def items(self) -> Joined:
        return Joined(self._parts, self.prompt)

    def fingerprint(self) -> str:
        return self._digest.hexdigest()


def usable_rows(
    found: Labelled, rows: np.ndarray, part: str, troubles: Troubles, limit: int | None, seed: int
) -> np.ndarray:
    """Rows with a label that can be read, at most ``limit``, each label giving its share."""
    source, kept = found.source, []
    labels = np.array([str(source.labels[int(row)]) for row in rows])
    if limit is not None and len(rows) > limit:
        rows = rows[holdout(labels, len(rows) - limit, seed)[0]]
    for row in map(int, rows):
        if row in source.problems:
            troubles.report(part, source.ids[row], source.problems[row])
            continue
        try:
            # What may be left out must be known now, so it is decoded whole; else its head is looked at.
            source.items[row] if troubles.on_error == "skip" else source.items.check(row)
        except Unreadable as error:
            troubles.report(part, source.ids[row], str(error))
            continue
        kept.append(row)
    return np.array(kept, dtype=int)


def labels_of(source: Source, rows: np.ndarray, items: np.ndarray) -> Labels:
    """The labels of some rows as classes that count from 0, those of these rows only.

    Raises:
        ValueError: labels that are lists.
    """
    found = [source.labels[int(row)] for row in rows]
    names = None if source.label_names is None else [source.label_names[int(row)] for row in rows]
    encoded = encode_labels(found, "classification", source.classes, names, source.name)
    present, label = np.unique(encoded.targets.numpy(), return_inverse=True)
    return Labels(items, label.astype(int), tuple(encoded.classes[i] for i in present))


def hold_out_labels(whole: Labels, share: float, seed: int) -> tuple[Labels, Labels]:
    """Labels without and of a share of the items, each class giving its part; classes keep their numbers."""
    count = min(len(whole.label) - len(whole.names), max(1, round(share * len(whole.label))))
    kept, held = holdout(whole.label, max(0, count), seed)
    return Labels(whole.items[kept], whole.label[kept], whole.names), Labels(
        whole.items[held], whole.label[held], whole.names
    )


def renamed(labels: Labels, names: Sequence[str]) -> Labels:
    """Labels counted into a longer list of class names."""
    number = np.array([names.index(name) for name in labels.names])
    return Labels(labels.items, number[labels.label], tuple(names))
