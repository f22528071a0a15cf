"""Checkpoints of the official code, of timm and of transformers."""

import pytest
import torch
from safetensors.torch import save_file

from cenote.integrations.poolformer import load_poolformer, timm_token_mixer
from cenote.mixing.poolformer import SIZES, StagedMetaFormer, poolformer
from cenote.mixing.poolformer_keys import (
    convert,
    key_format,
    official_to_timm,
    official_to_transformers,
    settings_from_state,
    timm_to_official,
    transformers_to_official,
)

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")


def randomised(model):
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.1 if parameter.ndim == 1 else 0.05)
    return model.eval()


@pytest.fixture(scope="module")
def ours():
    return randomised(poolformer("s12", num_classes=7))


@pytest.fixture(scope="module")
def images():
    return torch.randn(2, 3, 70, 96)


@torch.no_grad()
def test_features_are_timms(ours, images):
    theirs = timm.create_model("poolformer_s12", num_classes=7).eval()
    theirs.load_state_dict(official_to_timm(ours.state_dict()))
    want = theirs.forward_features(images)
    torch.testing.assert_close(ours.forward_features(images), want, rtol=1e-4, atol=1e-5 * want.abs().max().item())
    # With the same head they would have been equal too: timm's norm stands behind the mean.
    assert (ours(images) - theirs(images)).abs().max() > 1e-2
    back = timm_to_official(theirs.state_dict())
    assert back.keys() == ours.state_dict().keys()
    assert all(torch.equal(back[key], value) for key, value in ours.state_dict().items())


@torch.no_grad()
def test_logits_are_transformers(ours, images):
    theirs = transformers.PoolFormerForImageClassification(transformers.PoolFormerConfig(num_labels=7)).eval()
    theirs.load_state_dict(official_to_transformers(ours.state_dict()))
    torch.testing.assert_close(ours(images), theirs(images).logits, rtol=1e-4, atol=1e-4)
    hidden = theirs(images, output_hidden_states=True).hidden_states
    for mine, other in zip(ours.forward_stages(images), hidden, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5 * other.abs().max().item())
    back = transformers_to_official(theirs.state_dict())
    assert all(torch.equal(back[key], value) for key, value in ours.state_dict().items())
    bare = transformers_to_official(theirs.poolformer.state_dict())
    assert bare.keys() == {key for key in ours.state_dict() if key.partition(".")[0] not in ("norm", "head")}


@pytest.mark.parametrize("name", ["s24", "s36", "m36", "m48"])
def test_names_and_shapes_at_published_sizes(name):
    with torch.device("meta"):
        mine, theirs = poolformer(name), timm.create_model(f"poolformer_{name}")
        size = SIZES[name]
        config = transformers.PoolFormerConfig(depths=size.layers, hidden_sizes=size.dims, num_labels=1000)
        hugging = transformers.PoolFormerForImageClassification(config)
    shapes = {key: tuple(value.shape) for key, value in mine.state_dict().items()}
    for target, other in (("timm", theirs), ("transformers", hugging)):
        converted = convert(mine.state_dict(), "official", target)
        assert {k: tuple(v.shape) for k, v in converted.items()} == {
            k: tuple(v.shape) for k, v in other.state_dict().items()
        }
        back = convert(converted, target, "official")
        assert {k: tuple(v.shape) for k, v in back.items()} == shapes
    assert convert(convert(mine.state_dict(), "official", "timm"), "timm", "transformers").keys() == (
        hugging.state_dict().keys()
    )
    found = settings_from_state(mine.state_dict())
    assert (found["layers"], found["dims"], found["num_classes"]) == (size.layers, size.dims, 1000)


@pytest.mark.parametrize("name", sorted(set(SIZES) - {"id_s12"}))
def test_settings_are_read_from_the_weights(name):
    with torch.device("meta"):
        model = poolformer(name)
        again = StagedMetaFormer(**settings_from_state(model.state_dict()))
    assert again.mixers == model.mixers
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    kinds = {type(module) for module in model.modules() if "Norm" in type(module).__name__}
    assert kinds == {type(module) for module in again.modules() if "Norm" in type(module).__name__}


def test_official_names_of_a_hybrid_with_a_position_map():
    with torch.device("meta"):
        keys = set(poolformer("pppa_s12_224").state_dict())
    assert {"network.6.pos_embed", "network.7.1.token_mixer.qkv.weight", "network.7.0.token_mixer.proj.bias"} <= keys
    assert "network.7.0.token_mixer.qkv.bias" not in keys


@pytest.mark.parametrize(
    "state",
    [
        {"network.6.pos_embed": torch.zeros(1)},
        {"network.4.0.token_mixer.fc.weight": torch.zeros(1)},
        {"norm4.weight": torch.zeros(1)},
        {"network.2.proj.weight": torch.zeros(1)},
        {"network.1.0.norm1.weight": torch.zeros(1)},
        {"visual.proj": torch.zeros(1)},
    ],
)
def test_keys_without_a_counterpart_are_refused(state):
    with pytest.raises(ValueError, match="a PoolFormer has no"):
        official_to_timm(state)


def test_formats_are_told_apart(ours):
    official = ours.state_dict()
    for target in ("official", "timm", "transformers"):
        assert key_format(convert(official, "official", target)) == target
    with pytest.raises(ValueError, match="no keys of a PoolFormer"):
        key_format({"features.0.weight": torch.zeros(1)})
    with pytest.raises((ValueError, TypeError), match=r"formats are official|Literal"):
        convert({}, "official", "keras")


@torch.no_grad()
def test_files_of_all_three_are_loaded(tmp_path, images):
    model = randomised(StagedMetaFormer((1, 1, 2, 1), (8, 16, 24, 32), num_classes=5, mlp_ratio=2.0))
    state = model.state_dict()
    want = model(images)
    torch.save(state, tmp_path / "poolformer_tiny.pth.tar")
    torch.save({"state_dict": state}, tmp_path / "wrapped.pth")
    save_file({k: v.clone() for k, v in official_to_timm(state).items()}, tmp_path / "timm.safetensors")
    for name in ("poolformer_tiny.pth.tar", "wrapped.pth", "timm.safetensors"):
        torch.testing.assert_close(load_poolformer(tmp_path / name)(images), want)
    config = transformers.PoolFormerConfig(
        depths=(1, 1, 2, 1), hidden_sizes=(8, 16, 24, 32), mlp_ratio=2.0, num_labels=5, pool_size=5
    )
    theirs = randomised(transformers.PoolFormerForImageClassification(config))
    theirs.save_pretrained(tmp_path / "hub")
    torch.testing.assert_close(load_poolformer(tmp_path / "hub")(images), theirs(images).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_classifier_becomes_a_dense_backbone(tmp_path, images):
    model = randomised(StagedMetaFormer((1, 1), (8, 16), num_classes=5))
    torch.save(model.state_dict(), tmp_path / "a.pth")
    dense = load_poolformer(tmp_path / "a.pth", fork_feat=True)
    for raw, mine in zip(model.forward_stages(images), dense.forward_stages(images), strict=True):
        torch.testing.assert_close(mine, raw)
    assert [each.shape[1] for each in dense(images)] == [8, 16]
    other = load_poolformer(tmp_path / "a.pth", num_classes=3)
    assert other(images).shape == (2, 3)
    torch.testing.assert_close(other.forward_features(images), model.forward_features(images))
    with pytest.raises(ValueError, match=r"does not fit: missing \['network.2.0.token_mixer"):
        load_poolformer(tmp_path / "a.pth", mixers=["pool", "softmax_attention"])


def test_sources_that_do_not_exist(tmp_path):
    with pytest.raises(ValueError, match="is no file, no folder and no id"):
        load_poolformer(tmp_path / "nothing.pth.tar")
    with pytest.raises(ValueError, match="holds none of"):
        load_poolformer(tmp_path)
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="holds no state dict"):
        load_poolformer(tmp_path / "list.pth")


@torch.no_grad()
def test_mixers_run_inside_timms_metaformer(images):
    from timm.models.metaformer import MetaFormer, Pooling

    settings = {"depths": (1, 1), "dims": (8, 16), "num_classes": 3, "use_mlp_head": False}
    theirs = randomised(MetaFormer(**settings, token_mixers=Pooling))
    mine = MetaFormer(**settings, token_mixers=timm_token_mixer("pool")).eval()
    mine.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(mine(images), theirs(images), rtol=1e-4, atol=1e-5)
    hybrid = MetaFormer(**settings, token_mixers=[Pooling, timm_token_mixer("softmax_attention(num_heads=2)")])
    assert hybrid(images).shape == (2, 3)


@torch.no_grad()
def test_backbone_of_transformers(tmp_path, images):
    from cenote.integrations.poolformer_backbone import StagedMetaFormerBackbone

    model = randomised(StagedMetaFormer((1, 1, 2, 1), (8, 16, 24, 32), num_classes=5, mlp_ratio=2.0))
    torch.save(model.state_dict(), tmp_path / "a.pth")
    backbone = StagedMetaFormerBackbone.from_checkpoint(tmp_path / "a.pth", out_features=["stage2", "stage4"])
    assert backbone.channels == [16, 32]
    maps = backbone(images).feature_maps
    norms = (backbone.network.norm2, backbone.network.norm6)
    for each, raw, norm in zip(maps, model.forward_stages(images)[1::2], norms, strict=True):
        torch.testing.assert_close(each, norm(raw))
    backbone.save_pretrained(tmp_path / "backbone")
    again = StagedMetaFormerBackbone.from_pretrained(tmp_path / "backbone").eval()
    config = transformers.AutoConfig.from_pretrained(tmp_path / "backbone")
    assert transformers.AutoBackbone.from_config(config).channels == [16, 32]
    for each, other in zip(again(images).feature_maps, maps, strict=True):
        torch.testing.assert_close(each, other)


def test_backbone_in_upernet(images):
    from cenote.integrations.poolformer_backbone import StagedMetaFormerConfig

    settings = {
        "layers": [1, 1, 1, 1],
        "dims": [8, 16, 24, 32],
        "mixers": ["pool", "pool", "pool", "softmax_attention"],
    }
    config = StagedMetaFormerConfig(settings, out_features=["stage1", "stage2", "stage3", "stage4"])
    upernet = transformers.UperNetConfig(
        backbone_config=config, hidden_size=16, num_labels=3, use_auxiliary_head=False, pool_scales=[1, 2]
    )
    model = transformers.UperNetForSemanticSegmentation(upernet)
    logits = model(images).logits
    assert logits.shape == (2, 3, 70, 96)
    logits.square().mean().backward()
    assert model.backbone.network.patch_embed.proj.weight.grad.abs().sum() > 0
