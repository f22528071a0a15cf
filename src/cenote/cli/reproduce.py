"""``cenote reproduce``: a paper's central claim, run here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    slug: Annotated[str, typer.Argument(metavar="SLUG", help="Name of the system, as `cenote list` prints it.")],
    quick: Annotated[
        bool, typer.Option("--quick/--full", help="About a minute, or everything that the evidence pages show.")
    ] = True,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for results.json, evidence.md and figure.png. [default: runs/SLUG]", show_default=False
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
    """
    from cenote.reproductions import reproduce

    reproduce(slug, quick=quick, out=out or Path("runs") / slug, seeds=tuple(range(seeds)), data_dir=data)
