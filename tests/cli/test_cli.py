"""The command line: quick to answer, bad input in one line, catalogue verbs."""

import json
import os
import subprocess
import sys

import pytest

from cenote import __version__, cli
from cenote.catalog import SYSTEMS

HEAVY = ("torch", "transformers", "datasets", "pandas", "sklearn", "scipy", "numpy", "plotly", "matplotlib")


def run(*args, **environment):
    """A fresh process, without the run-time shape checks of the test suite."""
    return subprocess.run(
        [sys.executable, "-m", "cenote", *args],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "120", **environment},
        timeout=60,
    )


QUICK = [[], ["--version"], ["list"], ["show", "ggem"], ["list", "--json"]]
HELP = [["--help"], *([verb, "--help"] for verb in cli.VERBS)]


@pytest.mark.parametrize("args", QUICK + HELP, ids=" ".join)
def test_answers_without_heavy_imports(args):
    code = (
        "import sys; import cenote; from cenote.cli import main; status = main(sys.argv[1:]); "
        f"print('HEAVY', [name for name in {HEAVY} if name in sys.modules], status)"
    )
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "HEAVY [] 0", done.stdout + done.stderr


@pytest.mark.parametrize("verb", sorted(cli.VERBS))
def test_help_of_every_verb_teaches_by_example(verb, capsys):
    assert cli.main([verb, "--help"]) == 0
    printed = capsys.readouterr().out
    assert f"cenote {verb}" in printed
    if verb != "cache":  # a group: its subcommands have their own help
        assert "Examples" in printed


def test_overview_names_every_verb(capsys):
    assert cli.main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(verb in printed for verb in cli.VERBS)


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"cenote {__version__}\n"


@pytest.mark.parametrize(
    ("args", "hint"),
    [
        (["show", "effcient-probing"], "efficient-probing"),
        (["list", "--family", "pool"], "pooling"),
        (["reproduce", "no-such-paper"], "no-such-paper"),
        (["reproduce", "zoo-prune"], "planned"),
        (["reproduce", "ggem", "--data", "no/such/folder"], "no/such/folder"),
        (["reproduce", "ggem", "--seeds", "0"], "seeds"),
        (["prob"], "prob"),
        (["list", "--nope"], "--nope"),
        (["show"], "SLUG"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_status_2(args, hint):
    done = run(*args)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("cenote: ")
    assert hint in done.stderr


@pytest.fixture
def failing(monkeypatch):
    """Makes ``cenote list`` raise."""

    def install(error):
        def command() -> None:
            raise error

        monkeypatch.setattr("cenote.cli.catalog.list_command", command)

    return install


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("two\nlines"), 2), (TypeError("x"), 2), (FileNotFoundError(2, "gone", "file"), 2),
        (OSError(28, "disk full"), 2),
        (ImportError("no timm: pip install 'cenote[vision]'"), 2), (ValueError(), 2),
        (KeyboardInterrupt(), 130), (RuntimeError("bug"), 1),
    ],
)  # fmt: skip
def test_errors_inside_a_verb(failing, capsys, error, status):
    failing(error)
    assert cli.main(["list"]) == status
    printed = capsys.readouterr()
    assert len(printed.err.splitlines()) == 1
    assert "Traceback" not in printed.err
    assert cli.main(["list", "--debug"]) == status
    assert "Traceback" in capsys.readouterr().err


def test_debug_by_environment():
    assert "Traceback" in run("show", "nope", CENOTE_DEBUG="1").stderr
    assert "Traceback" not in run("show", "nope", CENOTE_DEBUG="0").stderr


def test_closed_pipe_is_no_error():
    command = f"{sys.executable} -m cenote list --json | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60)
    assert done.stdout == "[\n"
    assert done.stderr == ""


def test_list_as_json_is_the_whole_catalogue():
    listed = json.loads(run("list", "--json").stdout)
    assert [each["slug"] for each in listed] == [system.slug for system in SYSTEMS]
    assert set(listed[0]) == {"slug", "title", "year", "arxiv", "family", "purpose", "entry_point", "hosts"}
    pooling = json.loads(run("list", "--json", "--family", "pooling").stdout)
    assert {each["family"] for each in pooling} == {"pooling"}


def test_list_and_show_for_people():
    printed = run("list").stdout
    assert all(system.slug in printed for system in SYSTEMS)
    shown = run("show", "efficient-probing").stdout
    assert "arxiv.org/abs/2506.10178" in shown
    assert "from cenote.pooling.efficient_probing import EfficientProbing" in shown


def test_reproduce_passes_its_options_on(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr("cenote.reproductions.run.reproduce", lambda *args, **options: calls.append((args, options)))
    assert (
        cli.main(["reproduce", "ggem", "--full", "--seeds", "2", "--out", str(tmp_path), "--data", str(tmp_path)]) == 0
    )
    assert calls == [(("ggem",), {"quick": False, "out": tmp_path, "seeds": (0, 1), "data_dir": tmp_path})]
