"""PoolFormer checkpoints from files and the hub, and mixers inside timm's MetaFormer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cenote.mixing.poolformer import StagedMetaFormer
from cenote.mixing.poolformer_keys import convert, key_format, settings_from_state
from cenote.mixing.registry import create_mixer

WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def load_poolformer(source: str | Path, **changes: Any) -> StagedMetaFormer:
    """A network from a published checkpoint, its settings read from the weights.

    Files of the official release (``poolformer_s12.pth.tar``, ``metaformer_ppaa_s12_224.pth.tar``), of timm and of
    transformers are told apart by their key names. timm's networks are trained with the official head (norm, then
    mean), which is what this gives, while timm itself runs them with another order.

    Args:
        source: a file, a folder with ``model.safetensors`` or ``pytorch_model.bin``, or the id of a repository of the
            Hugging Face hub (``sail/poolformer_s12``, ``timm/poolformer_s12.sail_in1k``).
        **changes: settings of :class:`cenote.mixing.poolformer.StagedMetaFormer` in place of those found. With
            ``fork_feat=True`` the norms of the maps are fresh and head and norm are left out; with another
            ``num_classes`` the head is fresh. Say ``mixers="identity"`` for ``metaformer_id_s12``, whose mixers
            leave no trace in the weights.

    Raises:
        ValueError: no such file and no id of a repository, keys that are not PoolFormer's or do not fit the settings.
    """
    settings, state = read_poolformer(source)
    model = StagedMetaFormer(**{**settings, **changes})
    fresh: tuple[str, ...] = ("head.",) if model.num_classes != settings["num_classes"] else ()
    if model.fork_feat != settings["fork_feat"]:
        fresh = ("norm", "head.")
    result = model.load_state_dict({key: v for key, v in state.items() if not key.startswith(fresh)}, strict=False)
    missing = [key for key in result.missing_keys if not key.startswith(fresh)]
    if missing or result.unexpected_keys:
        raise ValueError(
            f"{source} does not fit: missing {missing[:4] or 'none'}, unexpected {result.unexpected_keys[:4] or 'none'}"
        )
    return model.eval()


def read_poolformer(source: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings of :class:`cenote.mixing.poolformer.StagedMetaFormer` and weights in official names of a checkpoint.

    Args and errors as :func:`load_poolformer`.
    """
    weights, config = _find(source)
    state = _read(weights)
    official = convert(state, key_format(state), "official") if key_format(state) != "official" else state
    settings = settings_from_state(official)
    if isinstance(config.get("pool_size"), int):
        settings["options"] = {"pool_size": config["pool_size"]}
    return settings, official


def timm_token_mixer(spec: str) -> type[nn.Module]:
    """A mixer as a class that timm's ``MetaFormer(token_mixers=...)`` takes.

    Args:
        spec: as :func:`cenote.mixing.create_mixer` reads it, of a mixer that needs no more than the grid.
    """

    class MapTokenMixer(nn.Module):
        """The mixer on ``(batch, dim, height, width)``."""

        def __init__(self, dim: int, proj_drop: float = 0.0, device: Any = None, dtype: Any = None) -> None:
            super().__init__()
            self.mixer = create_mixer(spec, dim=dim).to(device=device, dtype=dtype)
            self.drop = nn.Dropout(proj_drop)

        def forward(self, x: Tensor) -> Tensor:
            return self.drop(self.mixer.mix_map(x))

    return MapTokenMixer


def _find(source: str | Path) -> tuple[Path, dict[str, Any]]:
    path = Path(source)
    if path.is_file():
        return path, {}
    if path.is_dir():
        for name in WEIGHTS:
            if (path / name).is_file():
                return path / name, _config(path / "config.json")
        raise ValueError(f"{path} holds none of {', '.join(WEIGHTS)}")
    if str(source).count("/") != 1 or path.suffix in (".tar", ".pth", ".bin", ".safetensors"):
        raise ValueError(f"{str(source)!r} is no file, no folder and no id such as 'sail/poolformer_s12'")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    for name in WEIGHTS:
        try:
            weights = Path(hf_hub_download(str(source), name))
        except EntryNotFoundError:
            continue
        return weights, _config(Path(hf_hub_download(str(source), "config.json")))
    raise ValueError(f"the repository {source} holds none of {', '.join(WEIGHTS)}")


def _config(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    state = torch.load(path, map_location="cpu", weights_only=True)
    for nested in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(nested), dict):
            state = state[nested]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds no state dict")
    return state
