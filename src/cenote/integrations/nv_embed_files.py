"""NV-Embed's files: safetensors in shards with an index, one nested ``config.json``."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cenote.files import write_all

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"


def local_folder(source: str | Path, revision: str | None = None) -> Path:
    """``source`` if it is a folder, else the files of that hub repository, downloaded; never code or pickles."""
    if Path(source).is_dir():
        return Path(source)
    if str(source).count("/") != 1 or str(source).startswith((".", "~", "/")):
        raise ValueError(f"no folder {source}, and not a hub id such as nvidia/NV-Embed-v2")
    from huggingface_hub import snapshot_download

    kept = ["*.json", "*.safetensors", "*.model", "tokenizer*", "*.txt"]
    return Path(snapshot_download(str(source), revision=revision, allow_patterns=kept, ignore_patterns=["*.py"]))


def read_config(folder: Path) -> dict[str, Any]:
    """The nested configuration; ``ValueError`` where there is none."""
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(f"{folder} holds no NV-Embed model: {CONFIG} is missing")
    return json.loads(path.read_text())


def read_weights(
    folder: Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors, one at a time, shard by shard, so that never more than one is there beside those in use.

    Raises:
        ValueError: no weights, a shard that is missing or damaged.
    """
    if (folder / INDEX).is_file():
        shards = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
    else:
        shards = [WEIGHTS]
    missing = [name for name in shards if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder} lacks {', '.join(missing)}")
    for name in shards:
        try:
            with safe_open(folder / name, framework="pt", device=str(device)) as shard:
                for key in shard.keys():  # noqa: SIM118 (not a mapping)
                    yield key, shard.get_tensor(key).to(dtype)
        except SafetensorError as error:
            raise ValueError(f"{folder / name} is damaged: {error}") from None


def write_model(
    folder: str | Path, state: Mapping[str, Tensor], config: Mapping[str, Any], max_shard_size: int | str = "5GB"
) -> None:
    """Write weights in shards and the configuration; files appear under their names when all are complete, the
    configuration last."""
    from huggingface_hub import split_torch_state_dict_into_shards

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    plan = split_torch_state_dict_into_shards(dict(state), max_shard_size=max_shard_size)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".shards-") as staged:
        for name, keys in plan.filename_to_tensors.items():
            save_file(
                {key: state[key].detach().cpu().contiguous() for key in keys}, Path(staged) / name, {"format": "pt"}
            )
            with open(Path(staged) / name, "rb") as file:
                os.fsync(file.fileno())
        for old in [folder / CONFIG, folder / INDEX, *folder.glob("model*.safetensors")]:
            old.unlink(missing_ok=True)
        for name in plan.filename_to_tensors:
            os.replace(Path(staged) / name, folder / name)
    index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
    texts = {INDEX: json.dumps(index, indent=2) + "\n"} if plan.is_sharded else {}
    write_all(folder, {**texts, CONFIG: json.dumps(config, indent=2) + "\n"})
