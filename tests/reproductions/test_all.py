"""Every reproduction in turn: the table, going on after an interruption, and what a broken one does."""

import json
import sys
import types

import pytest

from cenote import cli
from cenote.catalog import SYSTEMS
from cenote.reproductions import reproduce, reproduce_all
from cenote.reproductions.base import Reproduction, finding


@pytest.fixture
def fakes(monkeypatch):
    """Three reproductions and no others; gives how often each ran."""
    runs = dict.fromkeys(("ggem", "spp", "ponet"), 0)

    def install(slug, values, error=None):
        def run(settings):
            runs[slug] += 1
            if error is not None:
                raise error
            return [
                finding(f"{slug} works.", "at least 1", values, lambda v: v >= 1),
                finding("It is exact.", "0", 0.0, lambda v: v == 0),
            ]

        module = types.ModuleType(f"cenote.reproductions.{slug}")
        module.REPRODUCTION = Reproduction(slug, "A claim.", run)
        monkeypatch.setitem(sys.modules, module.__name__, module)

    monkeypatch.setattr("cenote.reproductions.all.available", lambda: [s.slug for s in SYSTEMS if s.slug in runs])
    monkeypatch.delenv("CENOTE_DATA", raising=False)
    install("ggem", (2.0, 3.0))
    install("spp", (0.0, 3.0))
    install("ponet", (), RuntimeError("no luck"))
    return runs, install


def test_table_holds_every_system_and_a_broken_one_stops_nothing(fakes, tmp_path, capsys):
    overview = reproduce_all(out=tmp_path, seeds=(0, 1))
    outcome = {each.slug: each for each in overview.outcomes}
    assert [each.slug for each in overview.outcomes] == [system.slug for system in SYSTEMS]
    assert outcome["ggem"].verdict == "holds"
    assert (outcome["ggem"].holds, outcome["ggem"].does_not_hold, outcome["ggem"].inconclusive) == (2, 0, 0)
    assert outcome["spp"].verdict == "inconclusive"
    assert (outcome["ponet"].verdict, outcome["ponet"].note) == ("failed", "RuntimeError: no luck")
    assert overview.failed == ("ponet",)
    assert sum(each.verdict == "planned" for each in overview.outcomes) == len(SYSTEMS) - 3
    assert "35 planned" in capsys.readouterr().out
    kept = json.loads((tmp_path / "overview.json").read_text())
    assert kept == overview.frame().to_dict("records")


def test_it_goes_on_where_it_stopped_unless_the_settings_changed(fakes, tmp_path):
    runs, install = fakes
    first = reproduce_all(out=tmp_path, seeds=(0,), verbose=False)
    install("ponet", (5.0,))
    second = reproduce_all(out=tmp_path, seeds=(0,), verbose=False)
    assert runs == {"ggem": 1, "spp": 1, "ponet": 2}
    assert not second.failed
    assert [a for a in first.outcomes if a.slug != "ponet"] == [b for b in second.outcomes if b.slug != "ponet"]
    reproduce_all(out=tmp_path, seeds=(0, 1), verbose=False)
    assert runs == {"ggem": 2, "spp": 2, "ponet": 3}
    (tmp_path / "spp" / "results.json").write_text("[")
    reproduce_all(out=tmp_path, seeds=(0, 1), verbose=False)
    assert runs == {"ggem": 2, "spp": 3, "ponet": 3}
    reproduce("ggem", quick=False, out=tmp_path / "ggem", seeds=(0, 1), verbose=False)  # into the same folder
    assert runs == {"ggem": 3, "spp": 3, "ponet": 3}
    reproduce_all(out=tmp_path, seeds=(0, 1), verbose=False)
    assert runs == {"ggem": 4, "spp": 3, "ponet": 3}


def test_command_line(fakes, tmp_path, capsys):
    assert cli.main(["reproduce", "--all", "--quick", "--seeds", "1", "--out", str(tmp_path)]) == 1
    assert "failed" in capsys.readouterr().out
    for wrong in (["reproduce"], ["reproduce", "ggem", "--all"]):
        assert cli.main(wrong) == 2
        assert "name one system" in capsys.readouterr().err
