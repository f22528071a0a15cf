"""PoolFormer and hybrids in the official code's settings and key names."""

import re

import torch
from torch import Tensor

from cenote.mixing.poolformer import StagedMetaFormer
from golden.cases import Case

TARGETS = {
    "models.poolformer.PoolFormer(**config)(x)",
    "models.metaformer.MetaFormer(**config)(x)",
}
SETTINGS = {
    "layers": "layers",
    "embed_dims": "dims",
    "mlp_ratios": "mlp_ratio",
    "downsamples": "downsamples",
    "pool_size": "options",
    "num_classes": "num_classes",
    "norm": "norm",
    "use_layer_scale": "layer_scale",
    "fork_feat": "fork_feat",
    "token_mixers": "mixers",
    "pos": "positions",
}


def mixer_spec(name: str) -> str:
    """The official mixer's short name as a spec: ``attn16``, ``fc4x4``, ``pool``, ``identity``."""
    if name in ("pool", "identity"):
        return name
    if heads := re.fullmatch(r"attn(\d+)", name):
        return f"softmax_attention(head_dim={heads[1]})"
    if cells := re.fullmatch(r"fc(\d+)x(\d+)", name):
        return f"spatial_fc(grid=({cells[1]}, {cells[2]}))"
    raise ValueError(f"unknown mixer {name!r}")


@torch.no_grad()
def run(case: Case) -> dict[str, Tensor]:
    if case.target not in TARGETS:
        raise ValueError(f"unknown target {case.target!r}")
    unknown = set(case.config) - set(SETTINGS)
    if unknown:
        raise ValueError(f"unknown settings {sorted(unknown)}")
    translate = {
        "pool_size": lambda size: {"pool_size": size},
        "use_layer_scale": lambda used: 1e-5 if used else None,
        "token_mixers": lambda names: [mixer_spec(name) for name in names],
        "pos": lambda grids: [grid and tuple(grid) for grid in grids],
    }
    settings = {SETTINGS[key]: translate.get(key, lambda v: v)(value) for key, value in case.config.items()}
    model = StagedMetaFormer(**settings).eval()
    model.load_state_dict(case.state)
    x = case.inputs["x"]
    if model.fork_feat:
        return {f"feat{stage}": each for stage, each in enumerate(model(x))}
    return {"tokens": model.forward_features(x), "logits": model(x)}
