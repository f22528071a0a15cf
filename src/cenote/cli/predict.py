"""``cenote predict``: the readout that a probe kept, applied to new inputs."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd

    from cenote.data.base import Skipped

SHOWN_ROWS = 200


class OnError(StrEnum):
    """What an input that cannot be read does."""

    fail = "fail"
    skip = "skip"


def command(
    readout: Annotated[
        str,
        typer.Argument(
            metavar="READOUT", help="A folder that a probe wrote (its best/), or the id of a hub repository."
        ),
    ],
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT...",
            help="Images, sounds or folders of them; or texts, .txt files (a text a line), .csv or .tsv files.",
        ),
    ],
    top: Annotated[
        int | None, typer.Option(min=1, help="Classes listed for each input. [default: 3]", show_default=False)
    ] = None,
    json_out: Annotated[
        Path | None,
        typer.Option(
            "--json",
            help="Also write the predictions as JSON to this file ('-': to standard output, instead of the table).",
        ),
    ] = None,
    csv_out: Annotated[Path | None, typer.Option("--csv", help="Also write them as CSV; '-' as above.")] = None,
    vectors: Annotated[
        Path | None,
        typer.Option(
            help="Where READOUT comes from a judged task: write its vectors to this .parquet file, or to this .npy "
            "file, with their names in a .json beside it."
        ),
    ] = None,
    documents: Annotated[
        bool, typer.Option("--documents", help="With --vectors: the inputs are documents, and not queries.")
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Inputs in one pass through the backbone.")] = 32,
    device: Annotated[str, typer.Option(help="Where to run: cpu, cuda, cuda:1, ...")] = "cpu",
    on_error: Annotated[
        OnError, typer.Option(help="What an unreadable input does: fail, or be left out and listed.")
    ] = OnError.fail,
    column: Annotated[
        str | None,
        typer.Option(help="Column of .csv and .tsv files. [default: text, or the only one]", show_default=False),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit, where READOUT is a hub repository.")
    ] = None,
    backbone: Annotated[str | None, typer.Option(help="Load the backbone from here, if it has moved.")] = None,
    allow_other_backbone: Annotated[
        bool,
        typer.Option(
            "--allow-other-backbone",
            help="Go on although the backbone's weights differ from those the readout was trained on.",
        ),
    ] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that the backbone's hub repository brings along.")
    ] = False,
) -> None:
    """Apply a trained readout to new inputs.

    Examples:

      cenote predict cenote-probe/best photos/ --top 5

      cenote predict best "a text" "another one"

      cenote predict best clip.wav recordings/

      cenote predict best reviews.csv --column review --csv out.csv

      cenote predict best corpus.csv --documents --vectors corpus.npy
    """
    to_stdout = [target for target in (json_out, csv_out) if str(target) == "-"]
    if len(to_stdout) > 1:
        raise ValueError("only one of --json and --csv can go to standard output")

    from cenote.cli.predict_vectors import check_kind, write_vectors

    check_kind(readout, vectors)
    if vectors is not None:
        for option, given in (("--top", top), ("--json", json_out), ("--csv", csv_out)):
            if given is not None:
                raise ValueError(f"{option} is for labels and values, and --vectors writes vectors")
        _check_device(device)
        loading = {"backbone": backbone, "device": device, "trust_remote_code": trust_remote_code}
        skipped, count = write_vectors(
            readout, inputs, vectors, batch_size, column, revision, loading, documents=documents,
            skip=on_error is OnError.skip, allow_other_backbone=allow_other_backbone,
        )  # fmt: skip
        _list_skipped(skipped, count)
        return
    if documents:
        raise ValueError("--documents goes with --vectors: a readout with a head knows no documents")

    from cenote.backbones import load_backbone
    from cenote.probe.inputs import read_inputs
    from cenote.probe.predict import predict
    from cenote.probe.readout import Readout

    _check_device(device)
    loaded = Readout.from_pretrained(readout, revision=revision).to(device)
    config = loaded.config
    options = {"revision": config.revision, **config.backbone_options, "device": device}
    network = load_backbone(backbone or config.backbone, trust_remote_code=trust_remote_code, **options)
    if not allow_other_backbone:
        try:
            loaded.check_backbone(network)
        except ValueError as error:
            raise ValueError(str(error).replace("allow_other_backbone=True", "--allow-other-backbone")) from None
    items, ids = read_inputs(inputs, network.modality, column)
    frame = predict(
        loaded,
        network,
        items,
        batch_size,
        top=3 if top is None else top,
        ids=ids,
        on_error="skip" if on_error is OnError.skip else "raise",
        allow_other_backbone=True,
    )
    skipped = frame.attrs["skipped"]
    if csv_out is not None:
        _write(csv_out, frame.to_csv(index=False))
    if json_out is not None:
        _write(json_out, frame.to_json(orient="records", force_ascii=False, indent=2) + "\n")
    if not to_stdout:
        _print(frame)
    _list_skipped(skipped, len(ids))


def _list_skipped(skipped: Sequence[Skipped], count: int) -> None:
    if skipped:
        typer.echo(f"left out {len(skipped)} of {count} inputs that could not be read:", err=True)
        for item in skipped:
            typer.echo(f"  {item.id}: {item.reason}", err=True)


def _check_device(device: str) -> None:
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"cannot use device {device!r}: {str(error).splitlines()[0]}") from None


def _write(target: Path, text: str) -> None:
    if str(target) == "-":
        typer.echo(text, nl=False)
        return
    from cenote.files import write_whole

    write_whole(target, text)


def _print(frame: pd.DataFrame) -> None:
    """A table with label and probability in one cell; long runs are cut, files are not."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="bold", pad_edge=False)
    columns = [name for name in frame.columns if not name.startswith("probability_")]
    for name in columns:
        table.add_column(name.replace("label_", "#"), overflow="ellipsis", max_width=60 if name == "item" else None)
    for row in frame.head(SHOWN_ROWS).to_dict("records"):
        table.add_row(*(Text(_cell(row, name)) for name in columns))
    console = Console()
    console.print(table)
    if len(frame) > SHOWN_ROWS:
        console.print(f"and {len(frame) - SHOWN_ROWS} more (--csv FILE keeps all)")


def _cell(row: dict[str, Any], name: str) -> str:
    if name.startswith("label_"):
        return f"{row[name]}  {row[name.replace('label_', 'probability_')]:.1%}"
    value = row[name]
    return f"{value:.6g}" if isinstance(value, float) else " ".join(str(value).split())
