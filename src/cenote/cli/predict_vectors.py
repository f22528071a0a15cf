"""``cenote predict --vectors``: unit vectors of new inputs by the readout that a judged task kept."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from cenote.data.base import Skipped


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
    options: dict[str, Any], *, documents: bool = False, skip: bool = False, allow_other_backbone: bool = False,
) -> tuple[tuple[Skipped, ...], int]:  # fmt: skip
    """Read inputs, encode them, and write a table of item and vector as .parquet, or ``(inputs, width)`` as .npy and
    the names of its rows as a list in a .json file beside it.

    Returns:
        What could not be read and was left out, and how many inputs there were.
    """
    import numpy as np
    import pandas as pd

    from cenote.backbones import load_backbone
    from cenote.files import write_all
    from cenote.probe.embedding_readout import EmbeddingReadout
    from cenote.probe.inputs import read_inputs

    loaded = EmbeddingReadout.from_pretrained(readout, revision=revision).to(options["device"])
    config = loaded.config
    if documents and config.task != "retrieval":
        raise ValueError(
            f"--documents is for readouts that retrieval judged, and {readout} was judged by {config.task}"
        )
    network = load_backbone(
        options["backbone"] or config.backbone, trust_remote_code=options["trust_remote_code"],
        **{"revision": config.revision, **config.backbone_options, "device": options["device"]},
    )  # fmt: skip
    items, ids = read_inputs(inputs, network.modality, column)
    if not allow_other_backbone:
        try:
            loaded.check_backbone(network)
        except ValueError as error:
            raise ValueError(str(error).replace("allow_other_backbone=True", "--allow-other-backbone")) from None
    found = loaded.encode_named(
        network, items, batch_size, prompt=config.document_prompt if documents else None, ids=ids,
        on_error="skip" if skip else "raise", allow_other_backbone=True,
    )  # fmt: skip
    vectors, buffer = found.vectors.numpy(), io.BytesIO()
    if target.suffix == ".npy":
        np.save(buffer, vectors)
        names = json.dumps(found.ids, ensure_ascii=False, indent=0) + "\n"
        write_all(target.parent, {target.with_suffix(".json").name: names, target.name: buffer.getvalue()})
    else:
        pd.DataFrame({"item": found.ids, "vector": list(vectors)}).to_parquet(buffer)
        write_all(target.parent, {target.name: buffer.getvalue()})
    typer.echo(f"{target}: {len(vectors)} vectors of width {vectors.shape[1]}")
    return found.skipped, len(ids)
