"""The frame of reproductions: verdicts, results.json, the evidence page, and what is refused."""

import importlib.util
import json
import sys
import types
from pathlib import Path

import pytest

from cenote.reproductions import reproduce
from cenote.reproductions.base import Finding, Reproduction, finding
from cenote.reproductions.evidence import evidence_page

FIELDS = {"slug", "claim", "expected", "measured", "spread", "seeds", "verdict", "seconds"}  # promised by the design


def _run(settings):
    settings.progress("fitting")
    gains = [6.0 + seed for seed in settings.seeds]
    found = [
        finding(
            "EP beats the mean.",
            "at least 5",
            gains,
            lambda v: v >= 5,
            paper="9 | 10",
            unit="points",
            note="Tiny model.",
        ),
        finding("Folding is exact.", "at most 1e-5", 2e-6, lambda v: v <= 1e-5),
    ]
    return (
        found
        if settings.data_dir is None
        else [*found, finding("On real data too.", "at least 1", 3.0, lambda v: v >= 1)]
    )


@pytest.fixture
def fake(monkeypatch):
    """Puts a reproduction of ``ggem`` in place of the real one."""

    def install(run=_run, **options):
        module = types.ModuleType("cenote.reproductions.ggem")
        module.REPRODUCTION = Reproduction("ggem", "Groups of channels want their own exponent.", run, **options)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.delenv("CENOTE_DATA", raising=False)

    return install


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ((6.0, 7.0), "holds"),
        ((1.0, 2.0), "does not hold"),
        ((1.0, 7.0), "inconclusive"),
        (5.0, "holds"),
        (float("nan"), "does not hold"),
    ],
)
def test_verdict_is_the_agreement_of_the_seeds(values, verdict):
    assert finding("c", "at least 5", values, lambda v: v >= 5).verdict == verdict


def test_measured_and_spread():
    one = finding("c", "e", [1.0, 4.0, 7.0], lambda v: True)
    assert (one.measured, one.spread) == (4.0, 6.0)


def test_the_first_finding_decides(fake):
    fake(lambda settings: [finding("a", "", 0.0, lambda v: v > 1), finding("b", "", 2.0, lambda v: v > 1)])
    assert reproduce("ggem", verbose=False).verdict == "does not hold"


def test_results_file(fake, tmp_path):
    fake()
    result = reproduce("ggem", seeds=(0, 1), out=tmp_path / "out", verbose=False)
    objects = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [set(each) >= FIELDS for each in objects] == [True, True]
    first, second = objects
    assert first | {"seconds": 0} == {
        "slug": "ggem", "claim": "EP beats the mean.", "expected": "at least 5", "paper": "9 | 10",
        "measured": 6.5, "spread": 1.0, "values": [6.0, 7.0], "unit": "points", "seeds": 2, "verdict": "holds",
        "seconds": 0, "note": "Tiny model.", "quick": True,
    }  # fmt: skip
    assert (second["measured"], second["spread"], second["seeds"]) == (2e-6, 0.0, 1)
    assert all(each["seconds"] == round(result.seconds, 3) for each in objects)
    assert list(result.frame().columns) == list(first)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"results.json", "evidence.md", "figure.png"}
    assert (tmp_path / "out" / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_numbers_that_are_not_finite_stay_valid_json(fake, tmp_path):
    fake(lambda settings: [finding("a", "finite", [float("nan"), float("inf")], lambda v: v < 1)])
    reproduce("ggem", out=tmp_path, verbose=False)
    (one,) = json.loads((tmp_path / "results.json").read_text())
    assert (one["measured"], one["values"], one["verdict"]) == (None, [None, None], "does not hold")


def test_own_figure_is_drawn(fake, tmp_path):
    fake(figure=lambda findings, path: path.write_bytes(f"{len(findings)} findings".encode()) and None)
    reproduce("ggem", out=tmp_path, verbose=False)
    assert (tmp_path / "figure.png").read_text() == "2 findings"


def test_results_are_kept_where_nothing_can_be_drawn(fake, tmp_path, monkeypatch, capsys):
    fake()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    reproduce("ggem", out=tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "evidence.md"}
    assert "pip install matplotlib" in capsys.readouterr().out
    assert "figure.png" not in (tmp_path / "evidence.md").read_text()


def test_prints_measured_against_expected(fake, capsys):
    fake()
    reproduce("ggem", seeds=(0, 1))
    printed = capsys.readouterr()
    words = " ".join(printed.out.split())
    for part in ("at least 5", "6.5 points", "9 | 10", "ggem holds (quick run"):
        assert part in words
    assert "fitting" in printed.err


def test_evidence_page(fake):
    fake()
    page = evidence_page(reproduce("ggem", quick=False, seeds=(0, 1, 2), verbose=False), "ggem.png")
    assert page.startswith(
        "# ggem\n\n[Group Generalized Mean Pooling for Vision Transformer](https://arxiv.org/abs/2212.04114), 2022."
    )
    assert "**Claim.** Groups of channels want their own exponent." in page
    assert "**Verdict: holds.**" in page
    assert "| EP beats the mean. | 9 \\| 10 | at least 5 | 7 points | 2 | 3 | holds |" in page
    assert "| Folding is exact. | - | at most 1e-5 | 2e-06 | - | 1 | holds |" in page
    assert "![Measured values of every claim](ggem.png)" in page
    assert "- EP beats the mean. Tiny model." in page
    assert "cenote reproduce ggem --full" in page


def test_missing_data_is_named(fake, tmp_path, monkeypatch):
    fake(needs=("cifar10",))
    without = reproduce("ggem", verbose=False)
    assert (without.skipped, len(without.findings)) == (("cifar10",), 2)
    assert "Left out, because the data was not there: cifar10." in evidence_page(without)
    (tmp_path / "cifar10").mkdir()
    monkeypatch.setenv("CENOTE_DATA", str(tmp_path))
    found = reproduce("ggem", verbose=False)
    assert (found.skipped, len(found.findings)) == ((), 3)


def test_refusals(fake, tmp_path):
    with pytest.raises(ValueError, match="planned"):
        reproduce("zoo-prune")
    with pytest.raises(ValueError, match="efficient-probing"):
        reproduce("efficient-probin")
    fake()
    with pytest.raises(ValueError, match="at least one seed"):
        reproduce("ggem", seeds=())
    with pytest.raises(FileNotFoundError, match="nowhere"):
        reproduce("ggem", data_dir=tmp_path / "nowhere")
    fake(lambda settings: [], needs=("cifar10",))
    with pytest.raises(ValueError, match=r"nothing could be measured; missing data: cifar10"):
        reproduce("ggem", verbose=False)
    fake(lambda settings: [Finding("a", "b", (), ())])
    with pytest.raises(ValueError, match="needs values"):
        reproduce("ggem", verbose=False)


def test_an_import_error_inside_a_reproduction_is_not_taken_for_a_missing_one(monkeypatch, tmp_path):
    (tmp_path / "zoo_prune.py").write_text("import a_library_that_is_not_there\n")
    import cenote.reproductions as package

    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    with pytest.raises(ModuleNotFoundError, match="a_library_that_is_not_there"):
        reproduce("zoo-prune")


def test_tool_writes_page_numbers_and_picture(fake, tmp_path, monkeypatch):
    fake()
    file = Path(__file__).parents[2] / "tools" / "write_evidence.py"
    spec = importlib.util.spec_from_file_location("write_evidence", file)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    monkeypatch.setenv("CENOTE_DATA", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["write_evidence.py", "ggem", "--seeds", "2", "--docs", str(tmp_path)])
    assert tool.main() == 0
    assert {path.name for path in tmp_path.iterdir()} == {"ggem.md", "ggem.json", "ggem.png"}
    assert "![Measured values of every claim](ggem.png)" in (tmp_path / "ggem.md").read_text()
    assert [each["quick"] for each in json.loads((tmp_path / "ggem.json").read_text())] == [False] * 3
