"""HaloNet's adapter where the files have no case: networks of both kinds of block, other stems and widths."""

from pathlib import Path

import pytest
import torch
from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg

from golden.adapters.halonet import run
from golden.cases import Case

CONFIG = {
    "blocks": [["bottle", 2, 20, 1], ["self_attn", 2, 28, 2]], "br": 0.25, "stem_chs": 20, "stem_type": "tiered",
    "act": "silu", "block_size": 4, "halo_size": 2, "num_heads": 4, "num_features": 40, "num_classes": 5,
}  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"stem_type": "", "br": 2.0, "num_features": 0, "act": "gelu"},
        {"stem_type": "deep", "block_size": 1, "halo_size": 1, "num_classes": 0, "num_heads": 2},
    ],
)
def test_networks_of_timm(changes):
    config = CONFIG | changes
    blocks = tuple(ByoBlockCfg(type=kind, d=depth, c=out, s=stride, gs=0, br=config["br"])
                   for kind, depth, out, stride in config["blocks"])  # fmt: skip
    attention = {name: config[name] for name in ("block_size", "halo_size", "num_heads")}
    settings = ByoModelCfg(
        blocks=blocks, stem_chs=config["stem_chs"], stem_type=config["stem_type"], act_layer=config["act"],
        self_attn_layer="halo", self_attn_kwargs=attention, num_features=config["num_features"],
    )  # fmt: skip
    theirs = ByobNet(settings, num_classes=config["num_classes"])
    for module in theirs.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean, std=0.2)
            for tensor in (module.running_var, module.weight):
                torch.nn.init.uniform_(tensor, 0.5, 1.5)
    theirs.eval()
    x = torch.randn(2, 3, 64, 96)
    target = "timm ByobNet(ByoModelCfg from config)(x)"
    state = {key: value for key, value in theirs.state_dict().items() if "num_batches" not in key}
    got = run(Case(Path("drawn"), "halonet", "drawn", target, config, 1e-4, 1e-5, {"x": x}, state, {}))
    with torch.no_grad():
        torch.testing.assert_close(got["features"], theirs.forward_features(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got["logits"], theirs(x), rtol=1e-4, atol=1e-5)
