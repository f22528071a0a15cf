"""Comparison of readouts across data sets."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
from scipy.stats import wilcoxon

from cenote.probe.across import compare_across, score_table
from cenote.probe.result import ProbeResult, Row


def result(data, scores):
    base = Row("", "4", "both", 0, 0, 1, "accuracy", 0, 1, 1, 0.1, 0.1, None, None, None, None, None, 1, 1)
    rows = tuple(dataclasses.replace(base, readout=name, score=score) for name, score in scores.items())
    return ProbeResult(rows, {"data": data}, (), {}, np.zeros(1))


def test_pairs_hold_the_exact_signed_rank_test(tmp_path):
    generator = np.random.default_rng(0)
    a, b = generator.random(8), generator.random(8) - 0.3
    results = [result(f"set{i}.csv", {"a": a[i], "b": b[i]}) for i in range(8)]
    table = compare_across(results, tmp_path)
    assert table["first"].item() == "a | 4 | both"
    assert table["p"].item() == pytest.approx(wilcoxon(a, b, method="exact").pvalue)
    assert len(pd.read_csv(tmp_path / "across.csv")) == 8
    assert (tmp_path / "across_pairs.csv").exists()


def test_readouts_missing_somewhere_are_left_out():
    results = [result("x", {"a": 0.1, "b": 0.2, "c": 0.5}), result("y", {"a": 0.1, "b": 0.3})]
    assert list(score_table(results).columns) == ["b | 4 | both", "a | 4 | both"]
    with pytest.raises(ValueError, match="fewer than two readouts"):
        score_table([result("x", {"a": 0.1}), result("y", {"b": 0.3})])
    with pytest.raises(ValueError, match="at least two results"):
        score_table(results[:1])
