"""Pairs of texts with a degree of similarity, from a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from cenote.data.judged import Pairs
from cenote.data.judged_tables import TextPool, Troubles, choose, parts_of, read_frame, text_of
from cenote.data.source import PartName

if TYPE_CHECKING:
    import pandas as pd

FIRST = ("sentence1", "sentence_1", "text1", "text_1", "sent1", "first", "sentence_a", "question1", "premise")
SECOND = ("sentence2", "sentence_2", "text2", "text_2", "sent2", "second", "sentence_b", "question2", "hypothesis")
SCORE = ("score", "similarity", "similarity_score", "relatedness_score", "gold", "label")


def pair_parts(
    spec: str, pool: TextPool, troubles: Troubles, *, first: str | None, second: str | None, score: str | None,
    split: str | None, prompt: str, limit: int | None, seed: int,
) -> dict[PartName, Pairs]:  # fmt: skip
    """Read a table of pairs into its parts; without a split column all pairs are test.

    Raises:
        ValueError: an unknown column or split; and, unless ``troubles`` skips them, an empty text or a score that is no
            finite number (the row is named).
    """
    import pandas as pd

    frame = read_frame(spec).reset_index(drop=True)
    columns = list(frame.columns)
    one = frame[choose(columns, first, FIRST, "the first text (first_column)", spec)].map(text_of)
    other = frame[choose(columns, second, SECOND, "the second text (second_column)", spec)].map(text_of)
    given = frame[choose(columns, score, SCORE, "the score (score_column)", spec)]
    numbers = pd.to_numeric(given, errors="coerce").to_numpy(float)
    parts: dict[PartName, Pairs] = {}
    for part, rows in parts_of(frame, split, spec).items():
        if limit is not None and len(rows) > limit:
            rows = np.sort(np.random.default_rng(seed).permutation(rows)[:limit])
        kept = [row for row in rows.tolist() if _usable(row, one, other, given, numbers, part, troubles)]
        if kept:
            parts[part] = Pairs(
                np.array([pool.add(prompt + one[row], f"row {row} first") for row in kept], dtype=int),
                np.array([pool.add(prompt + other[row], f"row {row} second") for row in kept], dtype=int),
                numbers[kept],
            )
    return parts


def _usable(
    row: int, one: pd.Series, other: pd.Series, given: pd.Series, numbers: np.ndarray, part: str, troubles: Troubles
) -> bool:
    if not one[row] or not other[row]:
        troubles.report(part, f"row {row}", f"its {'second' if one[row] else 'first'} text is empty")
    elif not np.isfinite(numbers[row]):
        troubles.report(part, f"row {row}", f"its score {given[row]!r} is no number")
    else:
        return True
    return False
