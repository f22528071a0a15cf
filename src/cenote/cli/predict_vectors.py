"""``cenote predict --vectors``: unit vectors of new inputs by the readout that a judged task kept."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import typer


def check_kind(readout: str, vectors: Path | None) -> None:
    """Refuse a readout in a folder that gives the other kind of answer.

    Raises:
        ValueError: vectors asked of a readout with a head, or labels of one without; another kind of file.
    """
    if vectors is not None and vectors.suffix not in (".npy", ".parquet"):
        raise ValueError(f"--vectors names a .npy or .parquet file, got {vectors}")
    config = Path(readout) / "config.json"
    if not config.is_file():
        return
    try:
        embeds = json.loads(config.read_text()).get("kind") == "embedding"
    except (ValueError, AttributeError):
        return  # the loader says what is wrong with it
    if embeds and vectors is None:
        raise ValueError(f"{readout} gives vectors and no labels: say where to write them with --vectors FILE.npy")
    if not embeds and vectors is not None:
        raise ValueError(f"{readout} has a head that gives labels or values: leave out --vectors")


def write_vectors(
    readout: str, inputs: list[str], target: Path, batch_size: int, column: str | None, revision: str | None,
    options: dict[str, Any],
) -> None:  # fmt: skip
    """Read inputs, encode them, and write ``(inputs, width)`` as .npy, or a table of item and vector as .parquet."""
    import numpy as np
    import pandas as pd

    from cenote.backbones import load_backbone
    from cenote.files import write_whole
    from cenote.probe.embedding_readout import EmbeddingReadout
    from cenote.probe.inputs import read_inputs

    loaded = EmbeddingReadout.from_pretrained(readout, revision=revision).to(options["device"])
    config = loaded.config
    network = load_backbone(
        options["backbone"] or config.backbone, trust_remote_code=options["trust_remote_code"],
        **{"revision": config.revision, **config.backbone_options, "device": options["device"]},
    )  # fmt: skip
    items, ids = read_inputs(inputs, network.modality, column)
    found = loaded.encode(network, items, batch_size).numpy()
    buffer = io.BytesIO()
    if target.suffix == ".npy":
        np.save(buffer, found)
    else:
        pd.DataFrame({"item": ids, "vector": list(found)}).to_parquet(buffer)
    write_whole(target, buffer.getvalue())
    typer.echo(f"{target}: {len(found)} vectors of width {found.shape[1]}")
