"""The table on terminals of several widths."""

import io

import numpy as np
import pytest
from rich.console import Console

from cenote.probe.result import ProbeResult, Row
from cenote.probe.table import print_table

LONG = "weighted_layers > efficient_probing(num_queries=8)"


def printed(width, task="classification", extra=None, layers="4", terminal=True):
    row = Row(
        LONG, layers, "patches", 0.6123, 0.5432, 0.6789, "accuracy", 0.6, 1234567, 12345678, 12.345, 123.4, 0.01, None,
        10.0, 0.52, 9.0, 3, 1, extra=extra or {},
    )  # fmt: skip
    settings = {"backbone": "embedded", "data": "digits", "task": task}
    result = ProbeResult((row,), settings, (), {}, np.zeros(7))
    out = io.StringIO()
    print_table(result, Console(file=out, width=width, force_terminal=terminal, color_system=None))
    return out.getvalue()


@pytest.mark.parametrize("width", [40, 60, 80, 100, 120, 200])
@pytest.mark.parametrize("layers", ["4", "1,2,3,4,5,6,7,8,9,10,11,12"])
def test_no_number_is_cut_at_any_width(width, layers):
    text = printed(width, layers=layers)
    assert "…" not in text
    assert "0.6123" in text
    assert ("0.5432 0.6789" in text) or width < 70
    # The name comes whole, over as many lines as it takes.
    cells = [line.split("│")[2] for line in text.splitlines() if line.startswith("│")]
    assert "".join(cells).replace(" ", "") == LONG.replace(" ", "")
    assert max(map(len, text.splitlines())) <= width


def test_a_file_gets_every_column():
    text = printed(40, terminal=False)
    assert "train s" in text
    assert "1,234,567" in text


@pytest.mark.parametrize(
    ("task", "units", "figure"),
    [("verification", "pairs", "eer"), ("retrieval", "queries", "recall@100"), ("clustering", "items", "homogeneity")],
)
def test_judged_tasks_count_their_own_units_and_show_a_figure_where_there_is_room(task, units, figure):
    wide = printed(200, task, {figure: 0.3877, "other": 0.1111})
    assert f"on 7 {units}" in wide
    assert figure in wide
    assert "0.3877" in wide
    assert figure not in printed(80, task, {figure: 0.3877})
    assert "on 7 test items" in printed(200)
