"""HaloNet: the family's sizes, and timm's networks in its key names."""

import pytest
import timm
import torch
from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg

from cenote.mixing.halo_attention import HaloAttention
from cenote.mixing.halo_timm import halonet_from_timm, replace_halo
from cenote.mixing.halonet import HALONETS, HaloBlock, HaloNet, create_halonet

COMPUTED = {"h0": 5.45, "h1": 8.04, "h2": 9.34, "h3": 11.8, "h4": 19.0, "h5": 30.6, "h6": 43.3, "h7": 67.2}
REPORTED = {"h0": 5.5, "h1": 8.1, "h2": 9.4, "h4": 19.1, "h5": 30.7, "h6": 43.4, "h7": 67.4}


def small_timm(**changes):
    """A network of both kinds of block, its norms away from their start."""
    attention = {"block_size": 4, "halo_size": 1, "num_heads": 2}
    blocks = (
        ByoBlockCfg("bottle", d=1, c=16, s=1, gs=4, br=0.5),
        (ByoBlockCfg("bottle", d=1, c=24, s=2, gs=0, br=1.0), ByoBlockCfg("self_attn", d=1, c=24, s=2, gs=0, br=1.0)),
        ByoBlockCfg("self_attn", d=2, c=32, s=2, gs=0, br=0.5),
    )
    config = {
        "blocks": blocks, "stem_chs": 16, "stem_type": "tiered", "stem_pool": "maxpool", "act_layer": "silu",
        "self_attn_layer": "halo", "self_attn_kwargs": attention, "num_features": 40,
    }  # fmt: skip
    model = ByobNet(ByoModelCfg(**{**config, **changes}), num_classes=5)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean, std=0.2)
            for tensor in (module.running_var, module.weight):
                torch.nn.init.uniform_(tensor, 0.5, 1.5)
    return model.eval()


@pytest.mark.parametrize("size", HALONETS)
def test_parameters_of_the_family(size):
    with torch.device("meta"):
        named = dict(create_halonet(size).named_parameters())
    weights = sum(p.numel() for n, p in named.items() if not any(w in n for w in ("bn", "post_attn", "pos_embed")))
    assert weights / 1e6 == pytest.approx(COMPUTED[size], rel=0.005)
    if size in REPORTED:
        assert sum(p.numel() for p in named.values()) / 1e6 == pytest.approx(REPORTED[size], rel=0.002)


def test_h1_has_timms_keys_and_shapes():
    with torch.device("meta"):
        theirs, ours = timm.create_model("halonet_h1").state_dict(), create_halonet("h1").state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"stem_type": "7x7", "act_layer": "relu", "num_features": 0},
        {"stem_type": "deep", "act_layer": "gelu"},
        {"stem_type": "3x3"},
    ],
)
def test_a_network_of_timm_is_read_with_its_structure(changes):
    theirs = small_timm(**changes)
    ours = halonet_from_timm(theirs)
    x = torch.randn(2, 3, 128, 128)
    with torch.no_grad():
        torch.testing.assert_close(ours.forward_features(x), theirs.forward_features(x), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)
    assert set(ours.state_dict()) == set(theirs.state_dict())


@pytest.mark.parametrize("name", ["halonet26t", "halonet50ts"])
def test_published_networks_at_their_sizes(name):
    with torch.device("meta"):
        theirs = timm.create_model(name)
    ours = halonet_from_timm(theirs)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}


def test_training_goes_on_where_timms_layers_were_replaced():
    model = small_timm()
    x = torch.randn(2, 3, 128, 128)
    before, keys = model(x), list(model.state_dict())
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    assert replace_halo(model, auto_pad=True) is model
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-4)
    assert list(model.state_dict()) == keys
    assert sum(isinstance(module, HaloAttention) for module in model.modules()) == 3
    model(torch.randn(2, 3, 100, 90)).square().sum().backward()
    moved = model.stages[2][1].self_attn.pos_embed.height_rel
    old = moved.detach().clone()
    optimiser.step()
    assert not torch.equal(moved, old)


def test_what_halonet_lacks_is_named():
    with torch.device("meta"):
        model = timm.create_model("sehalonet33ts")
        with pytest.raises(ValueError, match=r"SEModule.*replace_halo"):
            halonet_from_timm(model)
        with pytest.raises(ValueError, match="ResNet"):
            halonet_from_timm(timm.create_model("resnet18"))
        with pytest.raises(ValueError, match="ResNet contains no HaloAttn"):
            replace_halo(timm.create_model("resnet18"))


def test_any_image_size_and_maps_of_every_stage():
    torch.manual_seed(0)
    model = create_halonet("h0", num_classes=0, num_heads=(4, 8, 8, 8)).eval()
    with torch.no_grad():
        maps = model.stage_maps(torch.randn(1, 3, 75, 150))
        assert [tuple(m.shape) for m in maps] == [(1, 32, 19, 38), (1, 64, 10, 19), (1, 128, 5, 10), (1, 256, 3, 5)]
        assert model(torch.randn(1, 3, 64, 64)).shape == (1, 256)


def test_a_fresh_block_passes_its_shortcut_on():
    """The last norm of each block starts at 0; with drop_path = 1/2 some items of a trained one skip its inside."""
    block = HaloBlock("attention", 8, 16, attention={"num_heads": 2, "block_size": 4, "halo_size": 1})
    net = HaloNet([[block] * 3], stem_width=16, num_classes=0, drop_path=0.5)
    x = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(net.stage_maps(x)[0], net.stem(x))
    for module in net.stages[0]:
        torch.nn.init.ones_(module.conv3_1x1.bn.weight)
    last = net.stages[0][2].train()
    inside = torch.randn(64, 16, 8, 8).relu()
    unchanged = (last(inside) == inside).flatten(1).all(dim=1)
    assert 16 <= int(unchanged.sum()) <= 48


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match=r"size must be one of h0, .*'h9'"):
        create_halonet("h9")
    with pytest.raises(ValueError, match="four stages"):
        create_halonet("h0", num_heads=(4, 8))
    with pytest.raises(ValueError, match="stem must be one of"):
        HaloNet([[HaloBlock("attention", 8, 8)]], stem="9x9")
    with pytest.raises(ValueError, match="at least one block"):
        HaloNet([[]])
