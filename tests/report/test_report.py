"""The page itself: complete, self-contained, and working in a browser."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest

from cenote.report import write_report
from cenote.report.probe_report import render
from report import synthetic

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
RESULTS = {
    "image": synthetic.image_result,
    "text": synthetic.text_result,
    "multilabel": synthetic.multilabel_result,
    "regression": synthetic.regression_result,
    "many classes": lambda: synthetic.image_result(120),
}


@pytest.mark.parametrize("name", RESULTS)
def test_page_loads_nothing_from_anywhere(name):
    page = render(RESULTS[name]())
    assert not re.search(r"https?://", page)
    assert not re.search(r"(?:src|href)\s*=\s*[\"'](?!data:|#)", page)
    assert "@import" not in page
    assert not re.search(r"url\((?!data:)", page)
    assert len(page) < 400_000


def test_sections_depend_on_the_task():
    pages = {name: render(make()) for name, make in RESULTS.items()}
    headings = {name: re.findall(r"<h2[^>]*>\s*(.*?)\s*</h2>", page, re.S) for name, page in pages.items()}
    assert any("confuses" in h for h in headings["image"])
    assert "Accuracy by class" in headings["image"]
    assert "Score by layer" in headings["image"]
    assert "Score by layer" not in headings["text"]
    assert "Quality by label" in headings["multilabel"]
    assert not any("confuses" in h for h in headings["multilabel"])
    assert any("Residuals" in h for h in headings["regression"])
    assert not any("Calibration" in h for h in headings["regression"])
    assert 'aria-label="confusion matrix"' in pages["image"]
    assert 'aria-label="confusion matrix"' not in pages["many classes"]
    assert "Most frequent mistakes" in pages["many classes"]
    assert "3 items could not be read" in pages["image"]


def test_foreign_text_cannot_become_markup():
    page = render(synthetic.text_result())
    assert "<b>negative</b>" not in page
    assert "&lt;b&gt;negative&lt;/b&gt;" in page
    assert page.count("</script>") == 2
    assert "\\u003c/script\\u003e" in page


def test_undefined_numbers_and_missing_predictions_are_left_out():
    result = synthetic.image_result()
    broken = dataclasses.replace(
        result.rows[1],
        score=float("nan"),
        ci_low=float("nan"),
        ci_high=float("nan"),
        latency_ms=float("nan"),
        train_seconds=float("nan"),
    )
    page = render(dataclasses.replace(result, rows=(result.rows[0], broken), predictions={}, galleries=()))
    assert ">nan<" not in page.lower()
    assert "confusion matrix" not in page


def test_report_appears_whole_and_refuses_an_empty_result(tmp_path):
    path = write_report(synthetic.image_result(), tmp_path / "report.html")
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    assert path.read_text().rstrip().endswith("</html>")
    with pytest.raises(ValueError, match="at least one row"):
        write_report(dataclasses.replace(synthetic.image_result(), rows=()), tmp_path / "other.html")


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM.exists():
        pytest.skip(f"no browser at {CHROMIUM}")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        instance = playwright.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        yield instance
        instance.close()


def open_page(browser, path, **options):
    page = browser.new_page(**options)
    page.complaints, page.loaded = [], []
    page.on(
        "console",
        lambda message: page.complaints.append(message.text) if message.type in ("error", "warning") else None,
    )
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.on("request", lambda request: page.loaded.append(request.url))
    page.goto(path.as_uri())
    return page


def column(page, index):
    return page.locator(f"#ranking tbody tr td:nth-child({index})").all_inner_texts()


def test_headers_sort_the_table(browser, tmp_path):
    page = open_page(browser, write_report(synthetic.image_result(), tmp_path / "report.html"))
    ranks = [str(k) for k in range(1, 14)]
    assert column(page, 1) == ranks
    header = page.get_by_role("button", name="params")
    header.click()
    order = column(page, 1)
    params = [synthetic.TABLE[int(rank) - 1][4] for rank in order]
    assert order != ranks
    assert params == sorted(params)
    header.click()
    assert column(page, 1)[0] == "3"  # the largest, siglip
    page.get_by_role("button", name="entropy").click()
    assert [text != "–" for text in column(page, 13)] == [True] * 6 + [False] * 7  # undefined ones last
    page.get_by_role("button", name="#").click()
    assert column(page, 1) == ranks
    page.locator("svg [data-tip]").first.hover()
    assert page.locator("#tip.on").is_visible()
    assert page.complaints == []
    assert [url for url in page.loaded if not url.startswith(("file:", "data:"))] == []
    page.close()


def test_gallery_draws_attention_where_it_lies(browser, tmp_path):
    result = synthetic.image_result()
    weights = np.full((8, 2, 16), 0.002)
    weights[:, 0, 0], weights[:, 1, 15] = 0.97, 0.97
    spot = dataclasses.replace(result.galleries[0], weights=weights, entropy=np.array([0.1, 0.2]))
    page = open_page(browser, write_report(dataclasses.replace(result, galleries=(spot,)), tmp_path / "report.html"))
    page.wait_for_selector("#gallery-view canvas")
    assert page.locator("#gallery-view canvas").count() == 8 * (1 + 1 + 2)
    assert page.complaints == []  # before this test itself reads pixels back, which the browser warns about
    brightness = """(index) => {
        const canvas = document.querySelectorAll("#gallery-view tbody tr:first-child canvas")[index];
        const size = canvas.width;
        const context = canvas.getContext("2d");
        const at = (x, y) => context.getImageData(x, y, 1, 1).data.slice(0, 3).reduce((a, b) => a + b);
        return [at(4, 4), at(size - 5, canvas.height - 5)];
    }"""
    first, second = page.evaluate(brightness, 2), page.evaluate(brightness, 3)
    assert first[0] > first[1] + 200
    assert second[1] > second[0] + 200
    page.close()


def test_text_gallery_follows_the_chosen_query(browser, tmp_path):
    page = open_page(browser, write_report(synthetic.text_result(), tmp_path / "report.html"))

    def opacity():
        spans = page.locator(".text-item span")
        return spans.evaluate_all("(all) => all.map((e) => e.style.getPropertyValue('--w'))")

    before = opacity()
    assert len(before) == 12 + 5
    assert page.locator(".text-item").nth(1).inner_text() == "[CLS] </script><b> dull [SEP]"
    page.select_option("#gallery-extra", index=2)
    assert opacity() != before
    assert page.complaints == []
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", RESULTS)
def test_every_kind_of_page_opens_without_complaint(browser, tmp_path, name, scheme):
    page = open_page(
        browser,
        write_report(RESULTS[name](), tmp_path / "report.html"),
        color_scheme=scheme,
        viewport={"width": 1240, "height": 800},
    )
    ink, paper = page.evaluate(
        "(() => { const s = getComputedStyle(document.body); return [s.color, s.backgroundColor]; })()"
    )
    light = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (ink, paper)]
    assert (light[0] < light[1]) == (scheme == "light")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.complaints == []
    page.close()
