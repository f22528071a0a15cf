"""Readouts compared across data sets: means, wins and losses, the exact Wilcoxon signed-rank test with Holm's
correction."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from cenote.files import write_all
from cenote.probe.result import ProbeResult
from cenote.probe.signed_rank import comparison_table
from cenote.report.critical_difference import critical_difference


def score_table(results: Sequence[ProbeResult]) -> pd.DataFrame:
    """Data sets as rows, readouts as columns, best mean first; only readouts that have a score on every data set.

    Raises:
        ValueError: fewer than two results, or fewer than two readouts in common.
    """
    if len(results) < 2:
        raise ValueError(f"comparing across data sets needs at least two results, got {len(results)}")
    names = [f"{number}-{Path(str(result.settings['data'])).stem}" for number, result in enumerate(results)]
    table = pd.DataFrame(
        {n: {ProbeResult.key(r): r.score for r in result.rows} for n, result in zip(names, results, strict=True)}
    ).T
    common = table.dropna(axis="columns")
    if common.shape[1] < 2:
        raise ValueError("the results have fewer than two readouts in common")
    return common[common.mean().sort_values(ascending=False, kind="stable").index]


def compare_across(results: Sequence[ProbeResult], folder: Path) -> pd.DataFrame:
    """The best readout against every other over all data sets; writes ``across.csv`` (scores), ``across_pairs.csv``
    (all pairs) and ``critical_difference.svg``.

    With fewer than six data sets no difference can reach 0.05; the ``note`` column says so.
    """
    scores = score_table(results)
    pairs = comparison_table(scores)
    contents = {}
    for name, frame in {"across.csv": scores, "across_pairs.csv": pairs}.items():
        buffer = io.StringIO()
        frame.to_csv(buffer, index=name == "across.csv")
        contents[name] = buffer.getvalue()
    contents["critical_difference.svg"] = critical_difference(scores)
    write_all(folder, contents)
    return pairs[pairs["first"] == scores.columns[0]].reset_index(drop=True)
