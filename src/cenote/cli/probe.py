"""``cenote probe``: compare every readout on a frozen backbone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

# What an option is about: the panels of --help.
TRAINING, BACKBONE, DATA, JUDGED, MACHINE = "Training", "Backbone", "Data", "Judged tasks", "Where it runs"


def command(
    backbone: Annotated[
        str,
        typer.Option(
            help="embedded, hf:<id or folder>, timm:<name>, pyg:<folder>, kwt:<folder>, or a hub id "
            "(bert-base-uncased)."
        ),
    ] = "embedded",
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="digits, a folder of images or sounds, a csv/tsv/parquet/json file, an .npz of images or graphs, "
            "tu:<name>, or a datasets id; repeat it to compare across data sets."
        ),
    ] = None,
    readouts: Annotated[
        str,
        typer.Option(
            help="all, last (one layer), free (no parameters), or names: "
            "'mean,ep(num_queries=8),weighted_layers > mean'."
        ),
    ] = "all",
    layers: Annotated[
        str, typer.Option(help="Hidden states that one-layer readouts are compared at: last, all, or 3,4.")
    ] = "last",
    tokens: Annotated[str, typer.Option(help="auto, or any of class,patches,both.")] = "auto",
    task: Annotated[
        str,
        typer.Option(
            help="auto, classification, multilabel, regression; or verification, similarity, retrieval, clustering, "
            "which compare vectors by cosine."
        ),
    ] = "auto",
    open_set: Annotated[
        str | None,
        typer.Option(help="Judge readouts on unknown items too: classes held out (3,7), or a second data set."),
    ] = None,
    lrs: Annotated[
        str | None,
        typer.Option(help="Learning rates in place of each readout's own grid: 0.001,0.01.", rich_help_panel=TRAINING),
    ] = None,
    query_factors: Annotated[
        str | None, typer.Option(help="Factors on the learned queries' learning rate: 1,10.", rich_help_panel=TRAINING)
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Initialisations a configuration.", rich_help_panel=TRAINING)] = 3,
    epochs: Annotated[
        int | None,
        typer.Option(min=1, help="Passes over the training part (default: about 500 steps).", rich_help_panel=TRAINING),
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=2, help="Items a step.", rich_help_panel=TRAINING)] = None,
    optimizer: Annotated[str, typer.Option(help="adamw, sgd or lars.", rich_help_panel=TRAINING)] = "adamw",
    weight_decay: Annotated[
        float, typer.Option(min=0, help="Decay of weight matrices.", rich_help_panel=TRAINING)
    ] = 0.0,
    patience: Annotated[
        int | None,
        typer.Option(min=1, help="Stop a readout after so many epochs without improvement.", rich_help_panel=TRAINING),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(min=0, help="Minutes after which training stops; the best states so far make the table."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for results.json, results.parquet, report.html and best/.")] = Path(
        "cenote-probe"
    ),
    resume: Annotated[
        Path | None, typer.Option(help="Go on with the interrupted run in this folder (give the same options).")
    ] = None,
    onnx: Annotated[
        bool, typer.Option("--onnx", help="Also write best/model.onnx (backbone and readout), checked against torch.")
    ] = False,
    cache_dir: Annotated[
        str | None,
        typer.Option(
            help="Where features are kept (default: CENOTE_CACHE or ~/.cache/cenote).", rich_help_panel=MACHINE
        ),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Of stored features: float32, float16 or bfloat16.", rich_help_panel=MACHINE)
    ] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda, ...", rich_help_panel=MACHINE)] = "cpu",
    engine: Annotated[
        str,
        typer.Option(
            help="local, or ray: extraction and training on a Ray cluster (extra: distributed).",
            rich_help_panel=MACHINE,
        ),
    ] = "local",
    ray_address: Annotated[
        str | None,
        typer.Option(
            help="Of the Ray cluster: host:6379 or auto (default: start one on this machine).", rich_help_panel=MACHINE
        ),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of a hub backbone.", rich_help_panel=BACKBONE)
    ] = None,
    bidirectional: Annotated[
        bool, typer.Option("--bidirectional", help="Drop a decoder's causal mask.", rich_help_panel=BACKBONE)
    ] = False,
    max_seconds: Annotated[
        float | None,
        typer.Option(
            min=0, help="Read at most so many seconds of a sound (default: all of it).", rich_help_panel=BACKBONE
        ),
    ] = None,
    trust_remote_code: Annotated[
        bool,
        typer.Option("--trust-remote-code", help="Run code that a hub repository brings.", rich_help_panel=BACKBONE),
    ] = False,
    image_column: Annotated[str | None, typer.Option(help="Column of images in a table.", rich_help_panel=DATA)] = None,
    audio_column: Annotated[str | None, typer.Option(help="Column of sounds in a table.", rich_help_panel=DATA)] = None,
    text_column: Annotated[str | None, typer.Option(help="Column of texts in a table.", rich_help_panel=DATA)] = None,
    label_column: Annotated[str | None, typer.Option(help="Column of labels in a table.", rich_help_panel=DATA)] = None,
    first_column: Annotated[
        str | None, typer.Option(help="Similarity: column of first texts.", rich_help_panel=JUDGED)
    ] = None,
    second_column: Annotated[
        str | None, typer.Option(help="Similarity: column of second texts.", rich_help_panel=JUDGED)
    ] = None,
    score_column: Annotated[
        str | None, typer.Option(help="Similarity: column of degrees.", rich_help_panel=JUDGED)
    ] = None,
    train_on: Annotated[
        str | None,
        typer.Option(
            help="Judged tasks: train on this data set instead of DATA's own training part.", rich_help_panel=JUDGED
        ),
    ] = None,
    trials: Annotated[
        str | None,
        typer.Option(help="Verification: file of trials, a line 'first,second,0 or 1' each.", rich_help_panel=JUDGED),
    ] = None,
    p_target: Annotated[
        float | None,
        typer.Option(
            help="Verification: prior of a same-source trial in minDCF (default: 0.01).", rich_help_panel=JUDGED
        ),
    ] = None,
    query_prompt: Annotated[
        str | None,
        typer.Option(
            help="Judged texts: put in front of queries, and of all texts that are no documents.",
            rich_help_panel=JUDGED,
        ),
    ] = None,
    document_prompt: Annotated[
        str | None, typer.Option(help="Retrieval: put in front of documents.", rich_help_panel=JUDGED)
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="At most so many items of each part.", rich_help_panel=DATA)
    ] = None,
    fold: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=9,
            help="Graphs: of ten folds the one that is the test part; the next is the validation part.",
            rich_help_panel=DATA,
        ),
    ] = None,
    on_error: Annotated[
        str, typer.Option(help="raise or skip items that cannot be read.", rich_help_panel=DATA)
    ] = "raise",
) -> None:
    """Compare every readout on a frozen backbone and keep the best.

    The backbone runs once; its tokens are stored; all readouts, learning rates and seeds are trained together from the
    store. The table is ranked by test score; readouts that do not differ significantly share a tie group.

    Examples:

      cenote probe

      cenote probe --backbone hf:facebook/dinov2-small --data photos/ --layers 10,11,12 --budget 30

      cenote probe --backbone hf:microsoft/wavlm-base-plus --data recordings/ --max-seconds 10

      cenote probe --backbone bert-base-uncased --data reviews.csv --readouts "mean,cls,ep,weighted_layers > mean"

      cenote probe --backbone hf:my/encoder --task retrieval --data scifact/ --query-prompt "query: "
    """
    import os

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # Threads that spin while they wait for each other cost more than they bring where another process wants the core.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from cenote.allocator import keep_freed_memory

    keep_freed_memory()  # a training step allocates and frees large tensors thousands of times
    import torch

    from cenote.probe.across import compare_across
    from cenote.probe.display import Terminal
    from cenote.probe.open_set_table import print_open_set
    from cenote.probe.run import probe
    from cenote.probe.table import print_table
    from cenote.types import JUDGED_TASKS

    dtypes = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if dtype not in dtypes:
        raise ValueError(f"--dtype must be one of {', '.join(dtypes)}, got {dtype!r}")
    folder = resume or out
    sets = data or ["digits"]
    columns = {
        "image_column": image_column,
        "audio_column": audio_column,
        "text_column": text_column,
        "label_column": label_column,
        "limit": limit,
        "fold": fold,
    }
    data_options = {"on_error": on_error, **{key: value for key, value in columns.items() if value is not None}}
    judged = {
        "first_column": first_column,
        "second_column": second_column,
        "score_column": score_column,
        "train_on": train_on,
        "trials": trials,
        "query_prompt": query_prompt,
        "document_prompt": document_prompt,
        "p_target": p_target,
    }
    judged_options = _judged(judged, task, onnx)
    if fold is not None and task in JUDGED_TASKS:
        raise ValueError(f"--fold divides sets of graphs with labels, and --task {task} has parts of its own")
    if task in JUDGED_TASKS:
        data_options |= {key: judged_options.pop(key) for key in list(judged_options) if key != "p_target"}
    backbone_options = {
        key: value
        for key, value in {
            "revision": revision,
            "bidirectional": bidirectional,
            "max_seconds": max_seconds,
            "trust_remote_code": trust_remote_code,
        }.items()
        if value
    }
    results = []
    with Terminal() as display:
        for number, name in enumerate(sets):
            target = folder if len(sets) == 1 else folder / f"{number}-{Path(name).stem}"
            results.append(
                probe(
                    backbone,
                    name,
                    readouts,
                    layers=layers,
                    tokens=tokens if tokens == "auto" else [t.strip() for t in tokens.split(",")],
                    task=None if task == "auto" else task,
                    open_set=open_set,
                    lrs=_numbers(lrs, "--lrs"),
                    query_factors=_numbers(query_factors, "--query-factors"),
                    seeds=seeds,
                    epochs=epochs,
                    batch_size=batch_size,
                    optimizer=optimizer,
                    weight_decay=weight_decay,
                    patience=patience,
                    budget=budget,
                    out=target,
                    resume=resume is not None,
                    cache_dir=cache_dir,
                    dtype=dtypes[dtype],
                    device=device,
                    engine=engine,
                    ray_address=ray_address,
                    display=display,
                    backbone_options=backbone_options,
                    data_options=data_options,
                    judged_options=judged_options,
                )
            )
            if results[-1].interrupted:
                break
    for result in results:
        print_table(result)
        if result.open_set is not None:
            print_open_set(result.open_set)
        if onnx and result.folder is not None:
            _export(result.folder / "best", backbone, backbone_options)
    if len(results) > 1:
        print(compare_across(results, folder))
    if results[-1].interrupted:
        raise KeyboardInterrupt


def _export(best: Path, backbone: str, backbone_options: dict[str, Any]) -> None:
    from cenote.backbones import load_backbone
    from cenote.probe.export_onnx import export_onnx
    from cenote.probe.readout import Readout

    export = export_onnx(
        Readout.from_pretrained(best), load_backbone(backbone, **backbone_options), best / "model.onnx"
    )
    typer.echo(f"{export.path}: differs from torch by at most {export.max_abs_difference:.2g}")


def _judged(options: dict[str, Any], task: str, onnx: bool) -> dict[str, Any]:
    """The options given of those that only judged tasks have."""
    from cenote.types import JUDGED_TASKS

    given = {key: value for key, value in options.items() if value is not None}
    if task in JUDGED_TASKS:
        if onnx:
            raise ValueError(f"--onnx exports a readout with a head, which {task} has not")
    elif given:
        name = next(iter(given)).replace("_", "-")
        raise ValueError(f"--{name} belongs to --task {', '.join(JUDGED_TASKS)}, not to --task {task}")
    return given


def _numbers(text: str | None, option: str) -> list[float] | None:
    if text is None:
        return None
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} takes numbers separated by commas, got {text!r}") from None
    if not all(n > 0 for n in numbers):
        raise ValueError(f"{option} takes positive numbers, got {text!r}")
    return numbers
