"""The documentation site builds strictly, its code runs, and it is complete."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from cenote import cli
from cenote.catalog import FAMILIES, SYSTEMS
from cenote.inspection import OPEN_SET_SCORES
from test_readme import blocks

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if "evidence" not in path.parts)
WITH_CODE = [path for path in PAGES if any(True for _ in blocks(path.read_text()))]


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: str(page.relative_to(DOCS)))
def test_code_of_a_page_runs_from_top_to_bottom(page, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CENOTE_CACHE", str(tmp_path / "cache"))
    scope = {"__name__": "page"}
    for code in blocks(page.read_text()):
        exec(compile(code, str(page.name), "exec"), scope)


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_has_a_page_with_its_options(verb):
    text = (DOCS / "verbs" / f"{verb}.md").read_text()
    assert text.startswith(f"# cenote {verb}\n")
    assert f"<!-- options: {verb}" in text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_command_lines_name_verbs_and_options_that_exist(page):
    for line in re.findall(r"^ {4}(cenote .+)$", page.read_text(), re.MULTILINE):
        words = line.split()
        assert words[1] in cli.VERBS, line
        command = typer.main.get_command(cli.load_verb(words[1]))
        command = getattr(command, "commands", {}).get(words[2], command) if len(words) > 2 else command
        known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
        assert {word for word in words if word.startswith("--")} <= known, line


def test_site_builds_strictly_and_holds_every_family_and_system(tmp_path):
    pytest.importorskip("mkdocs", reason="needs the extra docs")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", tmp_path / "site"],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for family in FAMILIES:
        html = (tmp_path / "site" / "families" / f"{family}.html").read_text()
        for system in SYSTEMS:
            if system.family == family:
                assert system.slug in html
                if not system.planned:
                    assert f'id="{system.entry_point.replace(":", ".")}"' in html, system.slug
    inspection = (tmp_path / "site" / "reference" / "inspection.html").read_text()
    for score in OPEN_SET_SCORES.values():
        assert f'id="{score.__module__}.{score.__name__}"' in inspection
    assert "--readouts" in (tmp_path / "site" / "verbs" / "probe.html").read_text()
    assert ":class:" not in (tmp_path / "site" / "families" / "pooling.html").read_text()
