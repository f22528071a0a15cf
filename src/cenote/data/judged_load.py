"""Judged data from its one-line name: pairs, queries and documents, trials, clusters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np

from cenote.data.base import Skipped
from cenote.data.judged import JudgedData, Judgement, Labels, Pairs
from cenote.data.judged_labels import (
    ItemPool,
    Labelled,
    hold_out_labels,
    labels_of,
    read_labelled,
    renamed,
    usable_rows,
)
from cenote.data.judged_pairs import pair_parts
from cenote.data.judged_retrieval import hold_out_queries, relevance_parts
from cenote.data.judged_tables import TextPool, Troubles, column_names
from cenote.data.judged_trials import all_trials, cross_trials, read_trials
from cenote.data.source import PartName
from cenote.types import JUDGED_TASKS, JudgedTask

VALIDATION_PAIRS = 10_000
"""Most validation trials made from labels: they are judged after every epoch of every head."""


def load_judged(
    spec: str | Path,
    task: str,
    *,
    first_column: str | None = None,
    second_column: str | None = None,
    score_column: str | None = None,
    image_column: str | None = None,
    text_column: str | None = None,
    audio_column: str | None = None,
    label_column: str | None = None,
    split_column: str | None = None,
    train_on: str | Path | None = None,
    trials: str | Path | None = None,
    query_prompt: str = "",
    document_prompt: str = "",
    validation_fraction: float = 0.2,
    max_pairs: int = 100_000,
    seed: int = 0,
    on_error: str = "raise",
    limit: int | None = None,
) -> JudgedData:
    """Load data whose vectors are judged by each other.

    Where there is a training part but no validation part, one is held out of it. Without a training part nothing is
    trained on, nor where labels leave nothing to hold out; a note says so.

    A validation part of labels has the training classes, and then settings are chosen by how well these are told
    apart; or it has classes of its own (other speakers), and then it is judged by the task itself, as the test part
    is: all its pairs for verification (at most :data:`VALIDATION_PAIRS`), its clusters for clustering.

    * ``"similarity"``: a table (or folder of tables, or hub id) with two texts and a score a row.
    * ``"retrieval"``: a folder with ``corpus``, ``queries`` and ``qrels`` (parquet, or jsonl and tsv as in BEIR).
    * ``"verification"``: anything :func:`cenote.data.load_data` reads. Trials are those of the file ``trials``, or all
      pairs of an enrolled and a tested item where the split column says ``enrol`` and ``test``, or all pairs of the
      test part.
    * ``"clustering"``: likewise; clusters of the test part (of everything where there are no parts) are held against
      its labels.

    Args:
        spec: file, folder, or id of the hub.
        first_column, second_column, score_column: of a table of pairs; guessed from usual names.
        image_column, text_column, audio_column, label_column: of a labelled table; guessed, for verification from the
            usual names of speakers first. With ``train_on``, ``label_column`` holds there too where a table in a file
            has a column of that name, and is guessed where none has; the others hold for both.
        split_column: says the part of each row; guessed, ``""`` for none.
        train_on: another data set of the same kind for training: its training part (all of it where it has no parts);
            settings are then chosen on its validation part, for labels else on its test part.
        trials: file of trials; see :func:`cenote.data.judged_trials.read_trials`.
        query_prompt: put in front of queries, and of every text of the tasks without queries.
        document_prompt: put in front of documents.
        validation_fraction: share of the training part held out where there is no validation part.
        max_pairs: most trials made from labels.
        seed: of everything drawn.
        on_error: an item that cannot be used is an error that names it (``"raise"``), or left out and listed in
            :attr:`~cenote.data.judged.JudgedData.skipped` (``"skip"``).
        limit: at most so many pairs, queries or items a part; of a file of trials those between the items that remain.

    Raises:
        ValueError: an unknown task, options that the task does not have, no test part, ``train_on`` naming ``spec``
            again, test pairs of one score only, or whatever is wrong with the files (the item is named).
    """
    if task not in JUDGED_TASKS:
        raise ValueError(f"task must be one of {', '.join(JUDGED_TASKS)}, got {task!r}")
    kind = cast(JudgedTask, task)
    if not 0 < validation_fraction < 1:
        raise ValueError(f"validation_fraction must lie between 0 and 1, got {validation_fraction}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    if trials is not None and task != "verification":
        raise ValueError(f"trials belong to verification, not to {task}")
    if train_on is not None and _same_place(spec, train_on):
        raise ValueError(f"train_on names the data that is judged, {spec}: its own training part is used without it")
    if document_prompt and task != "retrieval":
        raise ValueError(f"document_prompt belongs to retrieval, not to {task}: query_prompt goes before every text")
    troubles = Troubles(str(spec), on_error)
    if task in ("similarity", "retrieval"):
        texts = _Texts(
            kind, troubles, (first_column, second_column, score_column, split_column), query_prompt, document_prompt,
            limit, seed,
        )  # fmt: skip
        return texts.load(str(spec), None if train_on is None else str(train_on), validation_fraction)
    columns = {
        "image_column": image_column, "text_column": text_column, "audio_column": audio_column,
        "label_column": label_column, "split_column": split_column,
    }  # fmt: skip
    found = read_labelled(str(spec), task, columns)
    other = None
    if train_on is not None:
        there = column_names(str(train_on))
        columns["label_column"] = label_column if label_column in there else None
        other = read_labelled(str(train_on), task, columns)
    if query_prompt and found.source.modality != "text":
        raise ValueError(f"prompts are for texts, and {spec} holds {found.source.modality}s")
    if other is not None and other.source.modality != found.source.modality:
        raise ValueError(f"{spec} holds {found.source.modality}s, but {train_on} holds {other.source.modality}s")
    pool = ItemPool(query_prompt)
    candidates = found.everything() if found.roles is None else found.rows("test", "enrol")
    tested = usable_rows(found, candidates, "test", troubles, limit, seed)
    if not len(tested):
        raise ValueError(f"{spec} has no test part")
    items = pool.add(found.source, tested)
    labels = labels_of(found.source, tested, items)
    train, validation, note = _training_labels(
        found, other, task, pool, troubles, limit, validation_fraction, max_pairs, seed
    )
    test: Judgement = labels
    if task == "verification":
        numbers = np.full(len(items), -1)
        numbers[labels.items] = labels.label
        enrolled = items[np.isin(tested, found.rows("enrol"))]
        if trials is not None:
            used = set(pool.ids)
            rest = [name for name in (found.source.ids[int(row)] for row in candidates) if name not in used]
            test, lost = read_trials(Path(trials), pool.ids[: len(items)], rest)
            if lost and limit is None:
                troubles.skipped.append(Skipped("test", f"{lost} trials of {trials}", "they name items left out"))
        elif len(enrolled):
            test = cross_trials(enrolled, items[~np.isin(items, enrolled)], numbers, max_pairs, seed)
        else:
            test = all_trials(items, numbers, max_pairs, seed)
    return JudgedData(
        str(spec), found.source.modality, kind, pool.items(), tuple(pool.ids), pool.fingerprint(), train, validation,
        test, tuple(troubles.skipped), () if note is None else (note,),
    )  # fmt: skip


def _same_place(one: str | Path, other: str | Path) -> bool:
    first, second = (Path(place).expanduser() for place in (one, other))
    return str(one) == str(other) or (first.exists() and first.resolve() == second.resolve())


def _training_labels(
    found: Labelled, other: Labelled | None, task: str, pool: ItemPool, troubles: Troubles, limit: int | None,
    share: float, most: int, seed: int,
) -> tuple[Labels | None, Judgement | None, str | None]:  # fmt: skip
    """Labels to train on, what to choose on, and a note.

    A validation part of the training classes is labels numbered like them. One that has other classes is judged as the
    test part is.
    """
    source, validating = (found, ("validation",)) if other is None else (other, ("validation", "test"))
    name = source.source.name
    rows = source.everything() if other is not None and source.roles is None else source.rows("train")
    rows = usable_rows(source, rows, "train", troubles, limit, seed)
    if not len(rows):
        return None, None, None
    items = pool.add(source.source, rows)
    train, note = labels_of(source.source, rows, items), None
    held = next((source.rows(role) for role in validating if len(source.rows(role))), np.arange(0))
    held = usable_rows(source, held, "validation", troubles, limit, seed)
    if len(train.names) > 1 and len(held):
        labels = labels_of(source.source, held, pool.add(source.source, held))
        if set(labels.names) <= set(train.names):
            return train, renamed(labels, train.names), None
        try:
            return train, _judged_labels(labels, task, len(pool.ids), min(most, VALIDATION_PAIRS), seed), None
        except ValueError as error:
            note = f"the validation part of {name} is not used: {error}"
    kept, held_out = hold_out_labels(train, share, seed)
    if len(train.names) > 1 and len(held_out.items):
        return kept, held_out, note
    trouble = (
        f"has one class only ({train.names[0]})"
        if len(train.names) < 2
        else "has too few items a class to hold any out for validation"
    )
    return None, None, f"the training part of {name} is not used: it {trouble}"


def _judged_labels(labels: Labels, task: str, items: int, most: int, seed: int) -> Judgement:
    """Labels as what the task judges: all pairs for verification."""
    if task != "verification":
        if len(labels.names) < 2:
            raise ValueError("it has one class only")
        return labels
    numbers = np.full(items, -1)
    numbers[labels.items] = labels.label
    return all_trials(labels.items, numbers, most, seed)


class _Texts:
    """Similarity and retrieval: both are parts of judged texts."""

    def __init__(
        self, task: JudgedTask, troubles: Troubles, columns: tuple[str | None, ...], query_prompt: str,
        document_prompt: str, limit: int | None, seed: int,
    ) -> None:  # fmt: skip
        self.task, self.troubles, self.columns = task, troubles, columns
        self.prompts, self.limit, self.seed = (query_prompt, document_prompt), limit, seed
        self.pool = TextPool()

    def parts(self, spec: str) -> Mapping[PartName, Any]:
        query_prompt, document_prompt = self.prompts
        if self.task == "similarity":
            first, second, score, split = self.columns
            return pair_parts(
                spec, self.pool, self.troubles, first=first, second=second, score=score, split=split,
                prompt=query_prompt, limit=self.limit, seed=self.seed,
            )  # fmt: skip
        folder = Path(spec).expanduser()
        if not folder.is_dir():
            raise ValueError(f"there is no folder {spec!r}: retrieval needs one with corpus, queries and qrels")
        return relevance_parts(
            folder, self.pool, self.troubles, query_prompt=query_prompt, document_prompt=document_prompt,
            limit=self.limit, seed=self.seed,
        )  # fmt: skip

    def load(self, spec: str, train_on: str | None, share: float) -> JudgedData:
        own = self.parts(spec)
        if "test" not in own:
            raise ValueError(f"{spec} has no test part: its parts are {', '.join(own) or 'empty'}")
        value = getattr(own["test"], "value", None)
        if value is not None and not np.ptp(value) > 0:
            raise ValueError(f"all {len(value)} test pairs of {spec} have the score {value[0]:g}: nothing to rank by")
        others = own if train_on is None else self.parts(train_on)
        train, validation = others.get("train"), others.get("validation")
        if train_on is not None and set(others) == {"test"}:
            train = others["test"]  # no parts: all of it is for training
        if train is not None and validation is None:
            train, validation = self._hold_out(train, share)
        return JudgedData(
            spec, "text", self.task, self.pool.items(), tuple(self.pool.ids), self.pool.fingerprint(), train,
            validation, own["test"], tuple(self.troubles.skipped),
        )  # fmt: skip

    def _hold_out(self, train: Any, share: float) -> tuple[Any, Any]:
        if self.task == "retrieval":
            return (train, None) if len(train.queries) < 2 else hold_out_queries(train, share, self.seed)
        if len(train.first) < 2:
            return train, None
        order = np.random.default_rng(self.seed).permutation(len(train.first))
        cut = min(len(order) - 1, max(1, round(share * len(order))))
        held, kept = np.sort(order[:cut]), np.sort(order[cut:])
        some, rest = (Pairs(train.first[rows], train.second[rows], train.value[rows]) for rows in (kept, held))
        return some, rest
