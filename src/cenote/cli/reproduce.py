"""``cenote reproduce``: a paper's central claim, run here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    slug: Annotated[
        str | None, typer.Argument(metavar="SLUG", help="Name of the system, as `cenote list` prints it.")
    ] = None,
    every: Annotated[
        bool,
        typer.Option("--all", help="Every system in turn, and one table of all; goes on where it was interrupted."),
    ] = False,
    quick: Annotated[
        bool, typer.Option("--quick/--full", help="About a minute, or everything that the evidence pages show.")
    ] = True,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for results.json, evidence.md and figure.png. [default: runs/SLUG, or runs with --all]",
            show_default=False,
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds for statistical claims.")] = 3,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Folder with the larger data sets (also CENOTE_DATA); without it what needs them is left out."
        ),
    ] = None,
) -> None:
    """Run a paper's central claim and give a verdict: holds, does not hold, or inconclusive.

    The exit status says whether the run worked, not whether the claim holds.

    Examples:

      cenote reproduce ggem

      cenote reproduce efficient-probing --full --seeds 5 --out ep-evidence

      cenote reproduce spp --data ~/data

      cenote reproduce --all --quick
    """
    from cenote.reproductions import reproduce, reproduce_all

    if every == (slug is not None):
        raise ValueError("name one system (`cenote list` prints them), or give --all")
    if every:
        overview = reproduce_all(quick=quick, out=out or Path("runs"), seeds=tuple(range(seeds)), data_dir=data)
        raise typer.Exit(1 if overview.failed else 0)
    assert slug is not None
    reproduce(slug, quick=quick, out=out or Path("runs") / slug, seeds=tuple(range(seeds)), data_dir=data)
