"""Poolings in timm's own places."""

import pytest
import torch
from torch import nn

timm = pytest.importorskip("timm")

from cenote.integrations.timm import MapPool, set_global_pool  # noqa: E402
from cenote.pooling import create_pooling  # noqa: E402

MODELS = ["test_vit", "test_vit3", "test_resnet", "test_convnext", "test_efficientnet", "test_byobnet"]


def build(name, **options):
    torch.manual_seed(0)
    return timm.create_model(name, pretrained=False, **{"num_classes": 5, **options}).eval()


@pytest.mark.parametrize("name", [*MODELS, "swin_tiny_patch4_window7_224"])
def test_the_mean_is_timms_own_average(name):
    small = {"embed_dim": 24, "depths": (1, 1), "num_heads": (1, 2), "img_size": 64} if "swin" in name else {}
    model = build(name, **small, **({"global_pool": "avg"} if "vit" in name and "3" not in name else {}))
    image = torch.randn(2, 3, 64 if small else 160, 64 if small else 160)
    with torch.no_grad():
        maps = model.forward_features(image)
        if "vit" in name:
            expected = model.fc_norm(maps[:, model.num_prefix_tokens :].mean(dim=1))
        else:
            expected = model.forward_head(maps, pre_logits=True)
        logits = model.get_classifier()(expected)
        set_global_pool(model, "mean")
        torch.testing.assert_close(model.forward_head(maps, pre_logits=True), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model(image), logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "ghostnet_050"])
def test_a_layer_between_pooling_and_classifier_stays(name):
    model, image = build(name), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        logits, classifier = model(image), model.get_classifier()
        assert classifier.in_features != model.num_features
        set_global_pool(model, "mean")
        assert model.get_classifier() is classifier
        torch.testing.assert_close(model(image), logits, rtol=1e-5, atol=1e-5)
        assert set_global_pool(model, "simpool", num_classes=3)(image).shape == (2, 3)
    with pytest.raises(ValueError, match="keep"):
        set_global_pool(model, "attentive_statistics")


def test_the_grid_of_a_hierarchical_network_is_that_of_its_last_map():
    small = {"embed_dim": 24, "depths": (1, 1), "num_heads": (1, 2), "img_size": 64}
    swin = set_global_pool(build("swin_tiny_patch4_window7_224", **small), "cbam")
    assert swin(torch.randn(2, 3, 64, 64)).shape == (2, 5)
    resnet = set_global_pool(build("test_resnet"), "spp", grid=(3, 5))
    assert resnet(torch.randn(2, 3, 96, 160)).shape == (2, 5)
    vit = build("test_vit", img_size=(96, 160))
    assert set_global_pool(vit, "spp", grid=vit.patch_embed.grid_size)(torch.randn(2, 3, 96, 160)).shape == (2, 5)


@pytest.mark.parametrize("name", MODELS)
def test_readout_and_classifier_train_in_place(name):
    model = set_global_pool(build(name), "efficient_probing(num_queries=4)", num_classes=7).train()
    out = model(torch.randn(2, 3, 160, 160))
    out.sum().backward()
    assert out.shape == (2, 7)
    pooling = next(m for m in model.modules() if type(m).__name__ == "EfficientProbing")
    assert all(p.grad is not None for p in pooling.parameters())


def test_vector_is_the_poolings_own():
    model = set_global_pool(build("test_vit"), "gem", prefix=True)
    tokens = model.forward_features(torch.randn(2, 3, 160, 160))
    torch.testing.assert_close(model.pool(tokens), model.attn_pool(tokens))
    assert not torch.allclose(model.pool(tokens), model.attn_pool(tokens[:, 1:]))


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_wider_vectors_get_a_classifier_of_their_width(name):
    model = set_global_pool(build(name), "attentive_statistics")
    assert isinstance(model.get_classifier(), nn.Linear)
    assert model.get_classifier().in_features == 2 * model.num_features
    assert model(torch.randn(2, 3, 160, 160)).shape == (2, 5)
    assert set_global_pool(build(name), "mean", num_classes=0)(torch.randn(1, 3, 160, 160)).shape[1] == 64 + 32 * (
        name == "test_resnet"
    )


def test_saved_weights_come_back():
    image = torch.randn(1, 3, 160, 160)
    one, two = (set_global_pool(build("test_vit"), "simpool").eval() for _ in range(2))
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        two.load_state_dict(one.state_dict())
        torch.testing.assert_close(two(image), one(image))


def test_formats_of_a_map():
    pooling, x = create_pooling("gem", dim=6), torch.rand(2, 6, 3, 4)
    flat = MapPool(pooling)(x)
    torch.testing.assert_close(MapPool(pooling, input_fmt="NHWC")(x.permute(0, 2, 3, 1)), flat)
    assert MapPool(pooling, flatten=False)(x).shape == (2, 6, 1, 1)
    torch.testing.assert_close(flat, pooling(x.flatten(2).mT))


@pytest.mark.parametrize(
    ("name", "readout", "options", "message"),
    [
        ("test_vit", "weighted_layers > mean", {"num_layers": 3}, "several layers"),
        ("test_resnet", "mean", {"prefix": True}, "no prefix"),
        ("test_convnext", "attentive_statistics", {}, "old width"),
        ("test_vit", create_pooling("mean", dim=3), {}, "width 64"),
        ("vgg11", "mean", {}, "head of VGG makes 4096 features of 512"),
        ("efficientvit_b0", "mean", {}, "widens its last map"),
        ("inception_next_atto", "mean", {}, "makes 960 features of 320"),
        ("caformer_s18", "mean", {}, "makes 2048 features of 512"),
        ("dla34", "mean", {}, "Conv2d for a classifier"),
        ("convit_tiny", "mean", {}, "pools in a place that is not known"),
    ],
)
def test_what_does_not_fit_is_refused(name, readout, options, message):
    with torch.device("cpu" if "test" in name else "meta"):  # large ones without their weights
        model = build(name)
    before = str(model)
    with pytest.raises(ValueError, match=message):
        set_global_pool(model, readout, **options)
    assert "test" in name or str(model) == before


def test_other_networks_are_refused():
    with pytest.raises(ValueError, match="timm"):
        set_global_pool(nn.Linear(2, 2), "mean")
