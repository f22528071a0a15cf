"""``cenote compress`` as it is typed."""

import json

import pytest

from cenote import cli
from cenote.cli.compress import _names, _shares

SMALL = ["--context", "160", "--steps", "4", "--documents", "1"]


def test_it_prints_the_table_and_writes_the_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "150")
    text = tmp_path / "text.txt"
    text.write_text("A pool in the rock shows the layers underneath. " * 60)
    out = tmp_path / "out"
    assert (
        cli.main(["compress", "--method", "window", "--budget", "0.25", "--text", str(text), "--out", str(out), *SMALL])
        == 0
    )
    printed = capsys.readouterr().out
    assert "window 0.25" in printed
    assert "kept: window 0.25" in printed
    assert json.loads((out / "results.json").read_text())[0]["method"] == "dense"
    assert json.loads((out / "settings.json").read_text())["text"] == "text.txt"


@pytest.mark.parametrize(
    ("args", "hint"),
    [
        (["--method", "qest"], "did you mean quest"), (["--budget", "a"], "--budget takes shares"),
        (["--method", "quest", "--methods", "all"], "not both"),
        (["no/such/model", "--method", "window"], "no/such/model"),
        (["--text", "no/such/file"], "no/such/file"), (["--steps", "0"], "steps"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_status_2(args, hint, capsys, tmp_path):
    assert cli.main(["compress", *args, "--out", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    lines = [line for line in printed.err.splitlines() if line.startswith("cenote: ")]
    assert len(lines) == 1
    assert hint in lines[0]
    assert not (tmp_path / "out").exists()


def test_lists_on_the_line():
    assert _names("all") == "all"
    assert _names("window(budget=8, sinks=2), rtn") == ["window(budget=8, sinks=2)", "rtn"]
    assert _shares("0.1,0.25") == [0.1, 0.25]
