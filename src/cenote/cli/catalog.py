"""``cenote list`` and ``cenote show``: the catalogue of systems."""

from __future__ import annotations

import difflib
import json
from dataclasses import asdict
from typing import Annotated

import typer

from cenote.catalog import FAMILIES, SYSTEMS, System, find


def list_command(
    family: Annotated[str | None, typer.Option(help=f"Only this family: {', '.join(FAMILIES)}.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON list with every field of every system.")] = False,
) -> None:
    """List the systems: what there is, for what, from which paper.

    Examples:

      cenote list

      cenote list --family pooling

      cenote list --json > systems.json
    """
    if family is not None and family not in FAMILIES:
        near = difflib.get_close_matches(family, FAMILIES, n=1)
        raise ValueError(
            f"unknown family {family!r}; "
            + (f"did you mean {near[0]}?" if near else f"known are {', '.join(FAMILIES)}")
        )
    systems = [system for system in SYSTEMS if family in (None, system.family)]
    if as_json:
        typer.echo(json.dumps([asdict(system) for system in systems], indent=2, ensure_ascii=False))
        return
    _print_table(systems)


def show_command(
    slug: Annotated[str, typer.Argument(metavar="SLUG", help="Name of the system, as `cenote list` prints it.")],
    as_json: Annotated[bool, typer.Option("--json", help="A JSON object with every field.")] = False,
) -> None:
    """Show one system: paper, purpose, hosts, entry point.

    Examples:

      cenote show efficient-probing

      cenote show ggem --json
    """
    system = find(slug)
    if as_json:
        typer.echo(json.dumps(asdict(system), indent=2, ensure_ascii=False))
        return
    lines = {
        "paper": f"{system.title} ({system.year})",
        "link": system.url,
        "purpose": system.purpose,
        "family": system.family,
        "hosts": "; ".join(system.hosts),
        "entry point": system.entry_point,
    }
    if not system.planned:
        module, _, name = system.entry_point.partition(":")
        lines["import"] = f"from {module} import {name}"
        lines["check it"] = f"cenote reproduce {system.slug}"
    typer.echo(system.slug)
    for label, text in lines.items():
        typer.echo(f"  {label:<12} {text}")


def _print_table(systems: list[System]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("system", "family", "year", "state"):
        table.add_column(column, no_wrap=True)
    table.add_column("purpose", ratio=1)
    for system in systems:
        table.add_row(
            system.slug, system.family, str(system.year), "planned" if system.planned else "ready", system.purpose
        )
    console = Console()
    console.print(table)
    ready = sum(not system.planned for system in systems)
    console.print(f"\n{len(systems)} systems, {ready} ready. `cenote show SYSTEM` tells more.", highlight=False)
