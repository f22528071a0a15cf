"""Every reproduction one behind the other, with the outcome of all systems in one table."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cenote.catalog import SYSTEMS, System
from cenote.files import write_whole
from cenote.reproductions.run import _data_folder, available, reproduce

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Outcome:
    """One system's line of the table.

    Attributes:
        slug: the system.
        family: its room.
        verdict: of its central claim; ``"planned"`` where there is no reproduction yet, ``"failed"`` where it broke.
        holds: claims that hold.
        does_not_hold: claims that do not.
        inconclusive: claims on which the seeds disagree.
        seconds: wall time of its run.
        note: what broke, or which data sets were missing.
    """

    slug: str
    family: str
    verdict: str
    holds: int = 0
    does_not_hold: int = 0
    inconclusive: int = 0
    seconds: float = 0.0
    note: str = ""


@dataclass(frozen=True)
class Overview:
    """The outcomes of all systems, in the order of the catalogue."""

    outcomes: tuple[Outcome, ...]

    @property
    def failed(self) -> tuple[str, ...]:
        """Slugs of the reproductions that broke."""
        return tuple(outcome.slug for outcome in self.outcomes if outcome.verdict == "failed")

    def frame(self) -> pd.DataFrame:
        """A table with one row a system."""
        import pandas as pd

        return pd.DataFrame([asdict(outcome) for outcome in self.outcomes])

    def save(self, folder: str | Path) -> Path:
        """Write ``overview.json`` to a folder."""
        text = json.dumps([asdict(outcome) for outcome in self.outcomes], indent=2, ensure_ascii=False)
        Path(folder).mkdir(parents=True, exist_ok=True)
        return write_whole(Path(folder) / "overview.json", text + "\n")


def reproduce_all(
    quick: bool = True,
    out: str | Path = "runs",
    seeds: Sequence[int] = (0, 1, 2),
    data_dir: str | Path | None = None,
    verbose: bool = True,
) -> Overview:
    """Run every reproduction there is; a system without one is listed as planned.

    Each writes its own folder ``out/<slug>``, and one whose results already lie there, made by the same version with
    the same settings, is not run again, so that an interrupted run goes on where it stopped. One that breaks is listed
    as failed and does not stop the others.

    Args:
        quick: small versions, about a minute each.
        out: folder for the results and for ``overview.json``.
        seeds: as for :func:`reproduce`.
        data_dir: as for :func:`reproduce`.
        verbose: print progress on standard error and the table on standard output.

    Raises:
        ValueError: no seeds.
        FileNotFoundError: the data folder does not exist.
    """
    if not seeds:
        raise ValueError("at least one seed is needed, got none")
    _data_folder(data_dir)
    ready, outcomes = available(), []
    for system in SYSTEMS:
        if system.slug not in ready:
            outcomes.append(Outcome(system.slug, system.family, "planned"))
            continue
        number = f"{ready.index(system.slug) + 1}/{len(ready)}"
        folder = Path(out) / system.slug
        settings = _settings(quick, seeds, data_dir)
        kept = _kept(folder, settings)
        if verbose:
            print(f"[{number}] {system.slug}{': found in ' + str(folder) if kept else ''}", file=sys.stderr, flush=True)
        found = _outcome(system, **kept) if kept else _run(system, folder, settings, data_dir, verbose)
        outcomes.append(found)
    overview = Overview(tuple(outcomes))
    path = overview.save(out)
    if verbose:
        print_overview(overview)
        print(f"written: {path}")
    return overview


def _settings(quick: bool, seeds: Sequence[int], data_dir: str | Path | None) -> dict[str, Any]:
    from cenote import __version__

    folder = _data_folder(data_dir)
    return {"version": __version__, "quick": quick, "seeds": list(seeds), "data": folder and str(folder.resolve())}


def _kept(folder: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """What an earlier run with these settings left."""
    try:
        run = json.loads((folder / "run.json").read_text())
        results = (folder / "results.json").read_bytes()
        records = json.loads(results)
    except (OSError, ValueError):
        return None
    # The folder is also where `reproduce` writes by default, whatever its settings.
    if (run.get("settings"), run.get("results")) != (settings, _digest(results)) or not records:
        return None
    return {"verdicts": [r["verdict"] for r in records], "seconds": records[0]["seconds"], "skipped": run["skipped"]}


def _run(system: System, folder: Path, settings: dict[str, Any], data_dir: str | Path | None, verbose: bool) -> Outcome:
    start = time.perf_counter()
    (folder / "run.json").unlink(missing_ok=True)
    try:
        result = reproduce(
            system.slug,
            settings["quick"],
            folder,
            settings["seeds"],
            data_dir,
            verbose="progress" if verbose else False,
        )
    except Exception as error:  # one broken experiment must not cost the results of the others
        seconds = time.perf_counter() - start
        return Outcome(system.slug, system.family, "failed", seconds=seconds, note=f"{type(error).__name__}: {error}")
    run = {
        "settings": settings,
        "skipped": list(result.skipped),
        "results": _digest((folder / "results.json").read_bytes()),
    }
    write_whole(folder / "run.json", json.dumps(run) + "\n")
    return _outcome(system, [f.verdict for f in result.findings], result.seconds, result.skipped)


def _digest(results: bytes) -> str:
    return hashlib.sha256(results).hexdigest()


def _outcome(system: System, verdicts: Sequence[str], seconds: float, skipped: Sequence[str]) -> Outcome:
    count = Counter(verdicts)
    note = f"left out for want of data: {', '.join(skipped)}" if skipped else ""
    numbers = (count["holds"], count["does not hold"], count["inconclusive"])
    return Outcome(system.slug, system.family, verdicts[0], *numbers, round(seconds, 3), note)


def print_overview(overview: Overview) -> None:
    """All systems with the verdict of their central claim and how many claims hold, on standard output."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    colour = {"holds": "green", "does not hold": "red", "inconclusive": "yellow", "failed": "bold red"}
    table = Table(title="Reproductions: verdict of the central claim, and of all claims")
    table.add_column("system", no_wrap=True)
    table.add_column("family")
    table.add_column("verdict", no_wrap=True)
    for name in ("hold", "do not", "inconclusive", "seconds"):
        table.add_column(name, justify="right")
    table.add_column("note")
    for each in overview.outcomes:
        counted = each.verdict not in ("planned", "failed")
        numbers = [str(n) if counted else "" for n in (each.holds, each.does_not_hold, each.inconclusive)]
        verdict = f"[{colour.get(each.verdict, 'dim')}]{each.verdict}[/]"
        seconds = f"{each.seconds:.0f}" if each.seconds else ""
        table.add_row(each.slug, each.family, verdict, *numbers, seconds, escape(each.note))
    console = Console()
    console.print(table)
    count = Counter(each.verdict for each in overview.outcomes)
    console.print(", ".join(f"{number} {verdict}" for verdict, number in count.most_common()), highlight=False)
