import pytest
import torch

from backbones.hosts import pictures
from cenote.backbones import load_backbone
from cenote.types import Grid

timm = pytest.importorskip("timm", reason="timm is not installed")

TINY = {"pretrained": False, "embed_dim": 24, "depth": 3, "num_heads": 2}


def vit(**options):
    torch.manual_seed(0)
    return load_backbone("timm:vit_tiny_patch16_224", image_size=32, **{**TINY, **options})


def test_transformer_tokens_are_those_of_timm():
    backbone = vit()
    batch = backbone.collate(pictures(2))
    features = backbone(batch, range(4))
    blocks = backbone.module.forward_intermediates(
        batch["pixel_values"], indices=3, return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True
    )
    for number in (1, 2):
        patches, prefix = blocks[number - 1]
        torch.testing.assert_close(features.hidden[:, number], torch.cat([prefix, patches], dim=1))
    torch.testing.assert_close(features.hidden[:, 3], backbone.module.forward_features(batch["pixel_values"]))
    torch.testing.assert_close(features.pooled, backbone.module(batch["pixel_values"]))
    assert features.grid == backbone.grid == Grid(2, 2)
    assert features.prefix == 1
    assert backbone.num_layers == 3
    assert backbone.dim == backbone.pooled_dim == 24


def test_registers_count_as_prefix_and_input_need_not_be_square():
    backbone = load_backbone("timm:vit_tiny_patch16_224", image_size=(32, 64), **TINY, reg_tokens=4)
    features = backbone(backbone.collate(pictures(1)))
    assert features.prefix == 5
    assert features.grid == Grid(2, 4)
    assert features.hidden.shape == (1, 1, 13, 24)


def test_streaming_gives_the_same():
    backbone = vit()
    batch = backbone.collate(pictures(2))
    streamed = backbone(batch, "all", reduce=lambda hidden, mask: hidden.mean(1, keepdim=True))
    torch.testing.assert_close(streamed.hidden, backbone(batch, "all").hidden.mean(2, keepdim=True))


CONVOLUTIONAL = {
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (4, 8, 12, 16)},
    "resnet18": {"layers": (1, 1, 1, 1), "channels": (4, 8, 12, 16), "stem_width": 4},
}


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_the_last_map_is_a_grid(name):
    backbone = load_backbone(f"timm:{name}", pretrained=False, image_size=(64, 96), **CONVOLUTIONAL[name])
    batch = backbone.collate(pictures(2))
    features = backbone(batch)
    last = backbone.module.forward_features(batch["pixel_values"])
    assert features.grid == backbone.grid == Grid(2, 3)
    assert features.prefix == 0
    torch.testing.assert_close(features.hidden[:, 0].transpose(1, 2).reshape(2, 16, 2, 3), last)
    torch.testing.assert_close(features.pooled, backbone.module(batch["pixel_values"]))
    reduced = backbone(batch, reduce=lambda hidden, mask: hidden.amax(1, keepdim=True))
    torch.testing.assert_close(reduced.hidden[:, 0, 0], last.amax((2, 3)))
    with pytest.raises(ValueError, match="different widths"):
        backbone(batch, "all")


def test_unknown_name_and_random_weights_only_on_request(monkeypatch):
    with pytest.raises(ValueError, match="vit_tiny_patch16_224"):
        load_backbone("timm:vit_tiny_patch16_225")
    asked = []

    def create_model(name, pretrained, **options):
        asked.append(pretrained)
        raise RuntimeError("enough")

    monkeypatch.setattr(timm, "create_model", create_model)
    with pytest.raises(RuntimeError, match="enough"):
        load_backbone("timm:resnet18")
    assert asked == [True]


def test_fingerprint_and_input_image():
    one, other = vit(), vit(init_values=1e-5)
    assert one.fingerprint() == vit().fingerprint() != other.fingerprint()
    assert one.input_image(pictures(1, (40, 40))[0]).size == (32, 32)
    assert one.transform_id() == other.transform_id()
