"""What holds of PoolFormer whatever the data."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cenote.mixing import MetaFormerBlock, create_mixer
from cenote.mixing.poolformer import StagedMetaFormer, poolformer
from cenote.mixing.poolformer_keys import convert, official_to_timm, official_to_transformers
from cenote.reproductions.base import Finding, at_most
from cenote.reproductions.golden import golden_findings

PARAMETERS = {"s12": 11_915_176, "s24": 21_388_968, "s36": 30_862_760, "m36": 56_172_520, "m48": 73_473_448}


@torch.no_grad()
def exact_findings() -> list[Finding]:
    """Reference files, sizes, names, the mixer's symmetries, LayerScale, dense outputs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return [*golden_findings("poolformer"), *_names(), *_mixer(), *_block(), *_dense(), *_peers()]


def _names() -> list[Finding]:
    off, changed = 0, 0
    for name, count in PARAMETERS.items():
        with torch.device("meta"):
            model = poolformer(name)
        off += abs(sum(parameter.numel() for parameter in model.parameters()) - count)
        state = model.state_dict()
        there = convert(convert(state, "official", "timm"), "timm", "transformers")
        back = convert(there, "transformers", "official")
        changed += len(back.keys() ^ state.keys()) + sum(back[key] is not value for key, value in state.items())
    return [
        at_most("S12 to M48 have the published numbers of parameters.", off, 0, "parameters away"),
        at_most("Official names become timm's, transformers' and official ones again.", changed, 0, "names changed"),
    ]


def _mixer() -> list[Finding]:
    pool, x = create_mixer("pool", dim=8), torch.randn(2, 8, 12, 9)
    constant = torch.randn(2, 8, 1, 1).expand(2, 8, 12, 9)
    kernel = torch.full((8, 1, 3, 3), 1 / 9)
    kernel[:, :, 1, 1] -= 1
    inner = pool.mix_map(x)[..., 1:-1, 1:-1] - F.conv2d(x, kernel, groups=8)
    turns: list[Callable[[Tensor], Tensor]] = [
        lambda t: t.flip(2),
        lambda t: t.flip(3),
        *(lambda t, k=k: t.rot90(k, (2, 3)) for k in (1, 2, 3)),
    ]
    turned = max(_size(pool.mix_map(turn(x)) - turn(pool.mix_map(x))) for turn in turns)
    return [
        at_most("The pooling mixer of a constant map is 0 everywhere.", _size(pool.mix_map(constant)), 1e-6),
        at_most("Away from borders it is a fixed depthwise convolution minus the identity.", _size(inner), 1e-6),
        at_most("It commutes with flips and quarter turns.", turned, 1e-6),
        at_most("A window of one cell gives 0.", _size(create_mixer("pool(pool_size=1)", dim=8).mix_map(x)), 0),
    ]


def _block() -> list[Finding]:
    x = torch.randn(2, 8, 6, 5)
    mixers = ("pool", "identity", "softmax_attention")
    still = [
        _size(MetaFormerBlock(create_mixer(name, dim=8), layout="map", norm="group", layer_scale=0.0)(x) - x)
        for name in mixers
    ]
    ones, none = (
        MetaFormerBlock(create_mixer("pool", dim=8), layout="map", norm="group", layer_scale=scale)
        for scale in (1.0, None)
    )
    ones.load_state_dict(none.state_dict(), strict=False)
    return [
        at_most("With LayerScale 0 every block is the identity.", max(still), 0),
        at_most("Without LayerScale its factor is 1.", _size(ones(x) - none(x)), 1e-6),
    ]


def _dense() -> list[Finding]:
    model = StagedMetaFormer((1, 1, 1, 1), (8, 8, 16, 16), fork_feat=True).eval()
    wanted = {(70, 90): [(17, 22), (9, 11), (5, 6), (3, 3)], (64, 96): [(16, 24), (8, 12), (4, 6), (2, 3)]}
    wrong = sum(
        tuple(each.shape[2:]) != size
        for image, sizes in wanted.items()
        for each, size in zip(model(torch.randn(1, 3, *image)), sizes, strict=True)
    )
    return [at_most("Dense outputs have strides 4, 8, 16 and 32, at odd sizes too.", wrong, 0, "maps of another size")]


def _peers() -> list[Finding]:
    """The same weights in timm and transformers, where they are installed."""
    model, x = poolformer("s12", num_classes=7).eval(), torch.randn(1, 3, 96, 70)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.05)
    found = []
    if find_spec("timm"):
        import timm

        theirs: Any = timm.create_model("poolformer_s12", num_classes=7).eval()
        theirs.load_state_dict(official_to_timm(model.state_dict()))
        want = theirs.forward_features(x)
        away = _size(model.forward_features(x) - want) / _size(want)
        found.append(at_most("Converted weights give timm's features.", away, 1e-5, "of the largest feature"))
    if find_spec("transformers"):
        from transformers import PoolFormerConfig, PoolFormerForImageClassification

        config: Any = PoolFormerConfig
        hugging = PoolFormerForImageClassification(config(num_labels=7)).eval()
        hugging.load_state_dict(official_to_transformers(model.state_dict()))
        logits = hugging(x).logits
        away = _size(model(x) - logits) / _size(logits)
        found.append(at_most("Converted weights give transformers' logits.", away, 1e-5, "of the largest logit"))
    return found


def _size(x: Tensor) -> float:
    return float(x.abs().max())
