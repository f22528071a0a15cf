"""HaloNet's layer, and a network of timm's key names."""

import torch
from torch import Tensor

from cenote.mixing.halo_attention import HaloAttention, multiple_of_8
from cenote.mixing.halonet import HaloBlock, HaloNet
from golden.cases import Case

KINDS = {"self_attn": "attention", "bottle": "convolution"}
ATTENTION = ("block_size", "halo_size", "num_heads")
NETWORK = {"blocks", "br", "stem_chs", "stem_type", "act", "num_features", "num_classes", *ATTENTION}


@torch.no_grad()
def run(case: Case) -> dict[str, Tensor]:
    if "HaloAttn" in case.target:
        return {"x": HaloAttention.from_reference(case.state, **case.config).eval()(case.inputs["x"])}
    if "ByobNet" not in case.target:
        raise ValueError(f"unknown target {case.target!r}")
    config = dict(case.config)
    unknown = set(config) - NETWORK
    if unknown:
        raise ValueError(f"unknown settings {sorted(unknown)}")
    attention = {name: config[name] for name in ATTENTION}
    stages = [
        [
            HaloBlock(
                KINDS[kind],
                multiple_of_8(multiple_of_8(out) * config["br"]),
                multiple_of_8(out),
                stride if number == 0 else 1,
                attention=attention,
            )
            for number in range(depth)
        ]
        for kind, depth, out, stride in config["blocks"]
    ]
    model = HaloNet(
        stages,
        stem=config["stem_type"] or "3x3",
        stem_width=config["stem_chs"],
        act=config["act"],
        num_features=config["num_features"] or None,
        num_classes=config["num_classes"],
    )
    missing, unexpected = model.load_state_dict(case.state, strict=False)
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]
    if missing or unexpected:
        raise ValueError(f"the state lacks {missing} and has no place for {unexpected}")
    x = case.inputs["x"]
    model.eval()
    return {"features": model.forward_features(x), "logits": model(x)}
