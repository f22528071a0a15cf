"""What every saved readout shares: its files, its pooling rebuilt, and the features that it reads."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from cenote.files import write_all
from cenote.pooling import create_pooling
from cenote.pooling.base import Pooling
from cenote.types import Features, Grid, TokenChoice

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
ENCODER_POOLER = "encoder_pooler"


@runtime_checkable
class Reads(Protocol):
    """What a configuration says of the pooling and of what it reads."""

    @property
    def pooling(self) -> str: ...
    @property
    def dim(self) -> int: ...
    @property
    def layers(self) -> tuple[int, ...]: ...
    @property
    def tokens(self) -> TokenChoice: ...
    @property
    def options(self) -> dict: ...
    @property
    def grid(self) -> Grid | None: ...


def build_pooling(config: Reads) -> Pooling | None:
    """A fresh pooling, or ``None`` for the encoder's own."""
    if config.pooling == ENCODER_POOLER:
        return None
    offered = {"num_layers": len(config.layers), "grid": config.grid}
    options = {key: tuple(v) if isinstance(v, list) else v for key, v in config.options.items()}
    return create_pooling(
        config.pooling, dim=config.dim, **{k: v for k, v in offered.items() if v is not None} | options
    )


def select_tokens_of(features: Features, config: Reads, pooling: Pooling) -> tuple[Tensor, Tensor]:
    """Tokens (or the stack of layers) that a pooling reads, and their mask; ``ValueError`` naming missing layers."""
    missing = [n for n in config.layers if n not in features.layers]
    if missing:
        raise ValueError(f"this readout reads hidden state(s) {missing}, but the features hold {list(features.layers)}")
    hidden, mask = features.select(config.tokens)
    index = [features.layers.index(n) for n in config.layers]
    if pooling.layers == "last":
        return hidden[:, index[-1]], mask
    return torch.stack([hidden[:, i] for i in index], dim=1), mask


def pooled_vector(features: Features, config: Reads, pooling: Pooling | None) -> Tensor:
    """The pooled vector, or the encoder's own pooled output where there is no pooling."""
    if pooling is not None:
        return pooling(*select_tokens_of(features, config, pooling))
    if features.pooled is None:
        raise ValueError("this readout uses the encoder's own pooled output, and these features have none")
    return features.pooled


def save_module(module: nn.Module, folder: str | Path, card: str, config: str) -> Path:
    """Weights, card and configuration into ``folder``, all or none."""
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in module.state_dict().items()}
    write_all(folder, {WEIGHTS: save_tensors(state, metadata={"format": "pt"}), CARD: card, CONFIG: config})
    return Path(folder)


def load_weights(module: nn.Module, path: Path) -> None:
    """Take over the weights of a file; ``ValueError`` if it is damaged or another module's."""
    try:
        module.load_state_dict(load_tensors(path.read_bytes()))
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{path} does not hold the weights that its config.json describes: {error}") from None
