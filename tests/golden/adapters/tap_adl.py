"""TAP in the blocks of RVT and FAN and in the RVT model, and the attention diversification loss with its gradient."""

import warnings

import torch
from torch import Tensor

from cenote.mixing.fan import FANBlock
from cenote.mixing.rvt import RVT, RVTBlock
from cenote.ops.attention_diversity import attention_diversification_loss
from golden.cases import Case

BLOCK = ("dim", "num_heads", "mlp_ratio", "qkv_bias", "num_scales")
MODEL = ("base_dims", "depth", "heads", "mlp_ratio", "num_classes", "num_scales", "patch_size")
# Said once more by the images and the weights.
SAID = ("image_size", "stride", "use_mask", "masked_block")


def run(case: Case) -> dict[str, Tensor]:
    for start, runner, allowed in (
        ("AttentionDiversificationLoss", _loss, ()),
        ("PoolingTransformer", _model, (*MODEL, *SAID, "in_chans")),
        ("TAPFANBlock", _fan, (*BLOCK, "eta", "c_head_num")),
        ("Block", _rvt, (*BLOCK, "use_mask")),
    ):
        if case.target.startswith(start):
            unknown = set(case.config) - {*allowed, "threshold"}
            if unknown:
                raise ValueError(f"unknown settings {sorted(unknown)}")
            return runner(case)
    raise ValueError(f"unknown target {case.target!r}")


def _chosen(case: Case, names: tuple[str, ...]) -> dict:
    return {name: case.config[name] for name in names if name in case.config}


def _adl(case: Case, maps: list[Tensor]) -> Tensor:
    return attention_diversification_loss(maps, case.config.get("threshold", 2), check_rows=False).reshape(1)


def _loss(case: Case) -> dict[str, Tensor]:
    names = sorted(case.inputs, key=lambda name: int(name.removeprefix("attn")))
    maps = [case.inputs[name].clone().requires_grad_() for name in names]
    loss = _adl(case, maps)
    gradients = torch.autograd.grad(loss.sum(), maps)
    return {"adl": loss, **{f"grad_{name}": grad for name, grad in zip(names, gradients, strict=True)}}


@torch.no_grad()
def _rvt(case: Case) -> dict[str, Tensor]:
    block = RVTBlock.from_reference(case.state, **_chosen(case, BLOCK)).eval()
    x = case.inputs["x"]
    mixed, weights = block(x, return_weights=True)
    side = round(x.shape[1] ** 0.5)
    cells = x.transpose(1, 2).unflatten(2, (side, side))
    tap = block.dilation_predictor
    return {
        "x": mixed,
        "attn": weights,
        "scale_probs": tap.scale_probs(cells),
        "pooled": tap.pool_map(cells),
        "adl": _adl(case, [weights]),
    }


@torch.no_grad()
def _fan(case: Case) -> dict[str, Tensor]:
    block = FANBlock.from_reference(case.state, **_chosen(case, (*BLOCK, "eta"))).eval()
    mixed, weights = block(case.inputs["x"], return_weights=True)
    side = round(mixed.shape[1] ** 0.5)
    return {"x": mixed.transpose(1, 2).unflatten(2, (side, side)), "attn": weights, "adl": _adl(case, [weights])}


@torch.no_grad()
def _model(case: Case) -> dict[str, Tensor]:
    channels = {"in_channels": case.config["in_chans"]} if "in_chans" in case.config else {}
    model = RVT.from_reference(case.state, **_chosen(case, MODEL), **channels).eval()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*at dilation")  # small images make small grids
        logits, maps = model(case.inputs["x"], return_weights=True)
    named = {f"attn{number}": each for number, each in enumerate(maps)}
    return {"logits": logits, **named, "adl": _adl(case, maps)}
