"""The report of a comparison: complete, self-contained, and working in a browser."""

import dataclasses
import re

import pytest

from cenote.compress.result import DENSE, CompressResult, Row, ranked
from cenote.report.compress_report import budget_chart, render, write_report
from report.test_report import browser, open_page  # noqa: F401

GRID = {"256": {"0": 1.0, "1": 0.5}, "1024": {"0": 0.25, "1": 0.75}}


def row(method, budget, quality, time, **more):
    return Row(**{
        "method": method, "spec": f"{method}(x=1)", "budget": budget, "quality": quality,
        "quality_name": "share of dense",
        "perplexity": 20 / quality, "agreement": 0.9, "kl": 0.02, "retrieval": 0.6, "retrieval_grid": GRID,
        "prefill_ms": 90.0, "prefill_ms_spread": 2.0, "decode_ms_per_token": time / 128, "decode_ms_spread": 0.1,
        "dense_prefill_ms": 90.0, "dense_decode_ms": 5.0, "request_ms": time, "peak_bytes": 10**7,
        "cache_bytes": 3 * 10**6,
        "weight_bytes": 4 * 10**6, "density": 0.25, "prefill_density": 1.0, "calibration_seconds": 3.0, **more,
    })  # fmt: skip


def result():
    rows = [
        row(DENSE, None, 1.0, 640, density=1.0), row("quest", 0.125, 0.8, 400), row("quest", 0.25, 0.97, 500),
        row("window", 0.125, 0.3, 300), row("window", 0.25, 0.4, 350),
        row("rtn", 0.25, 0.9, 640, note="bytes, not time"),
        row("odd<b>", None, float("nan"), 700, retrieval=None, retrieval_grid={}, density=None),
    ]  # fmt: skip
    settings = {"model": "embedded", "context": 1024, "request_tokens": 128, "methods": ["quest"]}
    return CompressResult(ranked(rows), settings, "quest 0.25", (("var", "needs images & such"),), ("a note",))


def test_it_holds_everything_and_loads_nothing():
    page = render(result())
    headings = re.findall(r"<h2[^>]*>\s*(.*?)\s*</h2>", page, re.S)
    assert headings == [
        "Notes", "Table", "Quality against time", "Quality against budget", "Planted facts found", "What does not fit",
    ]  # fmt: skip
    assert "quest 0.25 keeps 97.0 % of the dense quality; a token takes 1.3 times less time" in page
    assert "needs images &amp; such" in page
    assert "rtn 0.25: bytes, not time" in page
    assert "odd<b>" not in page
    assert ">nan<" not in page.lower()
    assert not re.search(r"https?://", page)
    assert not re.search(r"(?:src|href)\s*=\s*[\"'](?!data:|#)", page)


def test_lines_need_two_budgets():
    rows = [each for each in result().rows if each.budget != 0.125]
    assert budget_chart(rows) is None
    assert budget_chart(result().rows)["names"] == ["quest", "rtn", "window"]
    page = render(dataclasses.replace(result(), rows=tuple(rows), refused=(), notes=()))
    assert "Quality against budget" not in page
    assert "What does not fit" not in page


def test_it_refuses_an_empty_result(tmp_path):
    with pytest.raises(ValueError, match="at least one row"):
        write_report(dataclasses.replace(result(), rows=()), tmp_path / "report.html")


def test_it_works_in_a_browser(browser, tmp_path):  # noqa: F811
    page = open_page(browser, write_report(result(), tmp_path / "report.html"))

    def methods():
        return [text.split("\n")[0] for text in page.locator("#ranking tbody tr td:nth-child(2)").all_inner_texts()]

    before = methods()
    page.get_by_role("button", name="token ms").click()
    assert methods()[0].startswith("window")
    page.get_by_role("button", name="#").click()
    assert methods() == before
    page.locator("svg [data-tip]").first.hover()
    assert page.locator("#tip.on").is_visible()
    assert page.complaints == []
    assert [url for url in page.loaded if not url.startswith(("file:", "data:"))] == []
