"""The judged part of the report, and the critical-difference diagram."""

import dataclasses
import re
import xml.etree.ElementTree as ElementTree
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from scipy.stats import norm

from cenote.probe.across import compare_across
from cenote.probe.result import ProbeResult
from cenote.probe.signed_rank import comparison_table
from cenote.report.critical_difference import cliques, critical_difference, mean_ranks
from cenote.report.judged_report import det_chart, judged_section
from cenote.report.probe_report import render
from report import synthetic


def result(task, metric, extra):
    generator = np.random.default_rng(0)
    rows = tuple(dataclasses.replace(row, extra=extra) for row in synthetic.rows(synthetic.TABLE[:3], metric))
    same = (np.arange(400) % 4 == 0).astype(float)
    targets = same if task == "verification" else generator.random(400) * 5
    outputs = {
        ProbeResult.key(row): (targets + generator.normal(0, 0.5 + k, (row.seeds, 400))) for k, row in enumerate(rows)
    }
    return ProbeResult(rows, {**synthetic.SETTINGS, "task": task, "p_target": 0.05}, (), outputs, targets)


def test_sections_by_task():
    page = render(result("verification", "1 - equal error rate", {"eer": 0.25, "min_dcf": 0.5}))
    assert "Detection error trade-off" in page
    assert "P(target) = 0.05" in page
    assert '<th class="plain">min dcf</th>' in page
    for absent in ("Calibration", "confuses", "Residuals", "Cosines of"):
        assert absent not in page
    page = render(result("similarity", "Spearman correlation", {"pearson": 0.5}))
    assert "Cosines of" in page
    assert "Detection error" not in page
    assert not re.search(r"https?://", page)
    assert judged_section(synthetic.regression_result()) is None


def test_detection_curve_of_normal_scores_is_straight():
    generator = np.random.default_rng(0)
    same = np.arange(40_000) % 2 == 0
    scores = generator.normal(0, 1, 40_000) + 2 * same
    rows = synthetic.rows(synthetic.TABLE[:1])
    made = ProbeResult(rows, {"task": "verification"}, (), {ProbeResult.key(rows[0]): scores[None]}, same.astype(float))
    plot = det_chart(made, rows)
    shape = next(shape for shape in plot.shapes if "series s0" in shape)
    points = np.array(
        [[float(v) for v in point.split(",")] for point in re.search(r'points="(.*?)"', shape)[1].split()]
    )
    inner = points[(points[:, 0] > plot.px(norm.ppf(0.02))) & (points[:, 1] < plot.py(norm.ppf(0.02)))]
    slope, _ = np.polyfit(inner[:, 0], inner[:, 1], 1)
    across = (plot.px(1) - plot.px(0), plot.py(1) - plot.py(0))
    assert slope / (across[1] / across[0]) == pytest.approx(-1, abs=0.05)
    # The circle of the equal error rate stands on the diagonal, at the rate that two unit normals 2 apart give.
    circle = next(shape for shape in plot.shapes if "hollow" in shape)
    assert float(re.search(r'cx="(.*?)"', circle)[1]) == pytest.approx(plot.px(-1.0), abs=4)
    rate = float(re.search(r"equal error rate ([\d.]+) %", circle)[1])
    assert rate == pytest.approx(100 * norm.cdf(-1), abs=0.3)


def table(count=12):
    generator = np.random.default_rng(0)
    noise = generator.random((count, 4)) * 0.05
    return pd.DataFrame(noise + np.array([0.9, 0.88, 0.88, 0.5]), columns=["a", "b <i>", "c", "d"])


def test_ranks_and_cliques_follow_the_corrected_tests():
    scores = table()
    ranks, pairs = mean_ranks(scores), comparison_table(scores)
    assert ranks["d"] == 4.0
    assert ranks.sum() == 1 + 2 + 3 + 4
    joined = {frozenset(pair) for clique in cliques(ranks, pairs) for pair in pairwise(clique)}
    for row in pairs.itertuples():
        neighbours = abs(list(ranks.index).index(row.first) - list(ranks.index).index(row.second)) == 1
        if neighbours:
            assert (frozenset((row.first, row.second)) in joined) == (row.p_holm > 0.05)


def test_cliques_are_the_largest_runs():
    ranks = pd.Series([1.0, 2.0, 3.0, 4.0], index=list("abcd"))

    def pairs(*different):
        named = [(x, y) for i, x in enumerate("abcd") for y in "abcd"[i + 1 :]]
        return pd.DataFrame(
            [{"first": x, "second": y, "p_holm": 0.01 if x + y in different else 0.9} for x, y in named]
        )

    assert cliques(ranks, pairs()) == [("a", "b", "c", "d")]
    assert cliques(ranks, pairs("ad")) == [("a", "b", "c"), ("b", "c", "d")]
    assert cliques(ranks, pairs("ac", "ad", "bd")) == [("a", "b"), ("b", "c"), ("c", "d")]
    assert cliques(ranks, pairs("ab", "ac", "ad", "bc", "bd", "cd")) == []


def test_the_diagram_is_well_formed_and_says_when_nothing_can_differ(tmp_path):
    drawn = critical_difference(table())
    root = ElementTree.fromstring(drawn)
    shown = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert any(text.startswith("b <i>") for text in shown)
    assert "cannot show a difference" not in drawn
    assert "cannot show a difference" in critical_difference(table(5))
    rows = synthetic.rows(synthetic.TABLE[:3])
    results = [ProbeResult(rows, {"data": name}, (), {}, np.zeros(1)) for name in "xy"]
    compare_across(results, tmp_path)
    ElementTree.parse(tmp_path / "critical_difference.svg")
