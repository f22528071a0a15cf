"""``cenote cache``: the features that probes have stored."""

from __future__ import annotations

import json
from typing import Annotated

import typer

app = typer.Typer(
    add_completion=False,
    rich_markup_mode="rich",
    no_args_is_help=True,
    help="List and clear the stored features. A probe extracts them once and reads them from there ever after.",
)

CacheDir = Annotated[
    str | None,
    typer.Option("--cache-dir", help="Folder or URL of the cache (default: CENOTE_CACHE or ~/.cache/cenote)."),
]


@app.command()
def where(cache_dir: CacheDir = None) -> None:
    """Print the folder that holds the feature stores."""
    from cenote.probe.cache import stores_dir

    typer.echo(stores_dir(cache_dir))


@app.command("list")
def list_command(
    cache_dir: CacheDir = None,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON list with one object a store.")] = False,
) -> None:
    """List the feature stores: backbone, layers, items, size on disk, state."""
    from cenote.probe.cache import list_stores, stores_dir

    stores = list_stores(cache_dir)
    if as_json:
        typer.echo(json.dumps([info.summary() for info in stores], indent=2))
    elif not stores:
        typer.echo(f"no stored features in {stores_dir(cache_dir)}")
    else:
        _print_table(stores)


@app.command()
def clear(
    match: Annotated[
        str | None,
        typer.Argument(help="Only stores whose digest begins with this or whose backbone contains it (default: all)."),
    ] = None,
    cache_dir: CacheDir = None,
    incomplete: Annotated[bool, typer.Option("--incomplete", help="Only unfinished or broken stores.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove feature stores.

    Examples:

      cenote cache clear --incomplete

      cenote cache clear dinov2 --yes
    """
    from cenote.probe.cache import list_stores, remove, select

    chosen = select(list_stores(cache_dir), match, incomplete)
    if not chosen:
        typer.echo("nothing to remove")
        return
    size = _size(sum(info.bytes for info in chosen))
    if not yes:
        typer.confirm(f"Remove {len(chosen)} stores ({size})?", abort=True)
    for info in chosen:
        remove(info)
    typer.echo(f"removed {len(chosen)} stores ({size})")


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _print_table(stores: list) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("store", "backbone", "layers", "view", "dtype", "items", "size", "state"):
        table.add_column(column, justify="right" if column in ("items", "size", "view") else "left")
    for info in stores:
        if info.manifest is None:
            table.add_row(info.digest[:8], "", "", "", "", "", _size(info.bytes), info.problem)
            continue
        key, items = info.manifest.key, info.manifest.items
        state = "complete" if info.complete else f"{info.manifest.stored} items so far"
        layers = ",".join(map(str, key["layers"]))
        table.add_row(
            info.digest[:8],
            key["backbone"],
            layers,
            str(key["view"]),
            key["dtype"],
            str(items),
            _size(info.bytes),
            state,
        )
    Console().print(table)
