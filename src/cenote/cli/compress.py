"""``cenote compress``: methods that make a language model do less, measured against the dense model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

# What an option is about: the panels of --help.
INPUTS, CHOICE, MACHINE = "Inputs", "What is kept", "Where it runs"


def command(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A transformers name or folder; nothing for the embedded model.")
    ] = "embedded",
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="A recipe or weight method, with options if you like: quest, 'window(sinks=8)', rsq. Repeat it.",
        ),
    ] = None,
    methods: Annotated[
        str | None, typer.Option(help="all (the default): everything that fits the model; or names: window,quest,rtn.")
    ] = None,
    budget: Annotated[
        str, typer.Option(help="Shares kept, of keys, tokens or 16 bits: 0.1 or 0.1,0.25.")
    ] = "0.125,0.25",
    text: Annotated[
        Path | None,
        typer.Option(
            help="UTF-8 text file; its first two fifths calibrate, the rest measures.", rich_help_panel=INPUTS
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Texts instead of a file: a csv/tsv/parquet/json file or datasets id.", rich_help_panel=INPUTS
        ),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(help="Tokens of the longest input (default: 1024, or the model's).", rich_help_panel=INPUTS),
    ] = None,
    steps: Annotated[
        int, typer.Option(min=1, help="Tokens of each text that are decoded one by one.", rich_help_panel=INPUTS)
    ] = 64,
    documents: Annotated[
        int,
        typer.Option(min=1, help="Documents with planted facts a length and depth.", rich_help_panel=INPUTS),
    ] = 4,
    seed: Annotated[int, typer.Option(help="Of documents and random parts.", rich_help_panel=INPUTS)] = 0,
    loss: Annotated[
        float, typer.Option(help="Share of the dense quality that what is kept may lose.", rich_help_panel=CHOICE)
    ] = 0.05,
    keep: Annotated[
        str | None,
        typer.Option(help="Keep this row instead, such as 'quest 0.25'.", rich_help_panel=CHOICE),
    ] = None,
    request_tokens: Annotated[
        int,
        typer.Option(min=1, help="New tokens of the request whose time is compared.", rich_help_panel=CHOICE),
    ] = 128,
    out: Annotated[
        Path, typer.Option(help="Folder for results.json, results.parquet, report.html and recipe/.")
    ] = Path("cenote-compress"),
    resume: Annotated[
        bool,
        typer.Option("--resume/--fresh", help="Take finished rows of the same inputs from the folder, or none."),
    ] = True,
    batch_size: Annotated[int, typer.Option(min=1, help="Documents that run together.", rich_help_panel=MACHINE)] = 20,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...", rich_help_panel=MACHINE)] = "cpu",
    dtype: Annotated[
        str | None, typer.Option(help="float32, float16 or bfloat16 (default: the model's).", rich_help_panel=MACHINE)
    ] = None,
) -> None:
    """Measure methods that make a language model do less, each against the model as it is.

    One run, the same inputs for all: perplexity, agreement and KL of next tokens, facts planted in documents of several
    lengths and found again, time of a prompt and of a token, memory, cache, the share of keys attended to. The fastest
    recipe within the accepted loss is kept, ready for Recipe.from_pretrained.

    Examples:

      cenote compress

      cenote compress --method tidal_decode --method "window(sinks=8)" --budget 0.05,0.1,0.2

      cenote compress Qwen/Qwen3-0.6B --methods all --text book.txt --context 4096 --out qwen

      cenote compress my/llama --method rsq --method gptq --method rtn --budget 0.1875,0.25 --keep "rsq 0.25"
    """
    import os

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from cenote.compress import compress
    from cenote.compress.table import print_table
    from cenote.probe.display import Terminal

    if method and methods:
        raise ValueError("give --method NAME (once or more) or --methods, not both")
    with Terminal() as display:
        result = compress(
            model,
            method or (_names(methods) if methods else "all"),
            text=text,
            data=data,
            budget=_shares(budget),
            context=context,
            steps=steps,
            documents=documents,
            request_tokens=request_tokens,
            loss=loss,
            keep=keep,
            out=out,
            fresh=not resume,
            seed=seed,
            batch_size=batch_size,
            device=device,
            dtype=dtype,
            display=display,
        )
    print_table(result)


def _names(text: str) -> str | list[str]:
    """Names at commas outside brackets."""
    parts, depth = [""], 0
    for c in text:
        depth += (c in "([") - (c in ")]")
        if c == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += c
    names = [part.strip() for part in parts if part.strip()]
    return "all" if names == ["all"] else names


def _shares(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--budget takes shares separated by commas, got {text!r}") from None
