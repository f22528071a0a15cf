import json

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from cenote.backbones import load_backbone
from cenote.backbones.embedded import SHIPPED, save_tiny_vit
from cenote.backbones.masked_autoencoder import MaskedAutoencoder, PretrainSettings, pretrain
from cenote.backbones.tiny_vit import TinyViT, TinyViTConfig, to_patches
from cenote.data import load_data
from cenote.types import Grid


@pytest.fixture(scope="module")
def backbone():
    return load_backbone("embedded")


def features_of(backbone, split):
    features = backbone(backbone.collate([split.items[i] for i in range(len(split))]))
    return features.tokens("patches")[0].numpy(), split.targets.numpy()


def test_shape_and_size(backbone):
    assert SHIPPED.stat().st_size < 2_000_000
    images = [load_data("digits").test.items[i] for i in range(3)]
    features = backbone(backbone.collate(images), (0, 2, 4))
    assert features.hidden.shape == (3, 3, 17, 64)
    assert features.grid == backbone.grid == Grid(4, 4)
    assert features.prefix == backbone.prefix == 1
    assert backbone.num_layers == 4
    assert features.pooled is None
    with torch.inference_mode():
        pixels = backbone.collate(images)["pixel_values"]
        torch.testing.assert_close(features.hidden[:, 2], backbone.module(pixels))
        torch.testing.assert_close(features.hidden[:, 0, 1:], backbone.module.embed(pixels))


def test_mean_of_the_tokens_is_clearly_worse_than_all_of_them(backbone):
    # What masked-image features are known for, and what attentive pooling is there to mend.
    data = load_data("digits")
    (train, y), (more, y2), (test, z) = (features_of(backbone, s) for s in (data.train, data.validation, data.test))
    train, y = np.concatenate([train, more]), np.concatenate([y, y2])

    def score(reduce):
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=1.0, max_iter=2000))
        return probe.fit(reduce(train), y).score(reduce(test), z)

    mean, flat = score(lambda x: x.mean(1)), score(lambda x: x.reshape(len(x), -1))
    assert 0.82 < mean < 0.92
    assert flat > 0.96
    assert flat - mean > 0.06


def test_streaming_gives_the_same(backbone):
    batch = backbone.collate([load_data("digits").test.items[0]])
    streamed = backbone(batch, "all", reduce=lambda hidden, mask: hidden.amax(1, keepdim=True))
    torch.testing.assert_close(streamed.hidden, backbone(batch, "all").hidden.amax(2, keepdim=True))


def test_any_image_is_brought_to_size_and_colour(backbone):
    photograph = Image.new("RGB", (50, 30), (255, 0, 0))
    assert backbone.input_image(photograph).size == (8, 8)
    assert backbone.input_image(photograph).mode == "L"
    assert backbone.collate([photograph])["pixel_values"].shape == (1, 1, 8, 8)


def test_patches_are_cut_row_by_row():
    images = torch.arange(16.0).view(1, 1, 4, 4)
    assert to_patches(images, 2)[0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


def test_round_trip(tmp_path):
    config = TinyViTConfig(12, 4, 3, dim=16, depth=2, heads=2, mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0))
    module = TinyViT(config)
    save_tiny_vit(module, tmp_path / "embedded.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["embedded.json", "embedded.safetensors"]
    image = Image.new("RGB", (12, 12), (255, 51, 0))
    for spec in (f"embedded:{tmp_path}", f"embedded:{tmp_path}/embedded.safetensors"):
        loaded = load_backbone(spec, dtype=torch.float64)
        batch = loaded.collate([image])
        torch.testing.assert_close(batch["pixel_values"][0, :, 0, 0], torch.tensor([0.9, 0.0, -0.1]))
        with torch.inference_mode():
            expected = module.double()(batch["pixel_values"].double())
        torch.testing.assert_close(loaded(batch).hidden[:, 0], expected)
    assert loaded.fingerprint() != load_backbone("embedded").fingerprint()
    assert loaded.transform_id() != load_backbone("embedded").transform_id()


def test_files_that_do_not_fit(tmp_path):
    save_tiny_vit(TinyViT(TinyViTConfig(depth=1)), tmp_path / "embedded.safetensors")
    settings = tmp_path / "embedded.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "depth": 2}))
    with pytest.raises(ValueError, match="do not hold a tiny vision transformer"):
        load_backbone(f"embedded:{tmp_path}")
    settings.write_text("{}")
    (tmp_path / "embedded.safetensors").write_bytes(b"rubbish")
    with pytest.raises(ValueError, match="do not hold a tiny vision transformer"):
        load_backbone(f"embedded:{tmp_path}")
    settings.unlink()
    with pytest.raises(ValueError, match="there is no"):
        load_backbone(f"embedded:{tmp_path}")


def test_only_hidden_patches_count_and_only_visible_ones_are_seen():
    torch.manual_seed(0)
    model = MaskedAutoencoder(TinyViT(TinyViTConfig(dim=16, depth=1, heads=2)), PretrainSettings(decoder_dim=16)).eval()
    images, noise = torch.randn(2, 1, 8, 8), torch.arange(16.0).expand(2, -1)  # the first six patches stay visible
    seen = []
    model.encoder.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    loss = model(images, noise)
    assert seen == [1 + 6]
    targets = to_patches(images, 2)[:, 6:]
    torch.nn.init.zeros_(model.predict.weight)
    torch.nn.init.zeros_(model.predict.bias)
    torch.testing.assert_close(model(images, noise), targets.square().mean())
    assert loss != targets.square().mean()


def test_pretraining_is_seeded_and_learns():
    images = torch.linspace(-1, 1, 64).view(1, 1, 8, 8) * torch.linspace(-1, 1, 32).view(-1, 1, 1, 1)
    config = TinyViTConfig(dim=16, depth=1, heads=2)
    losses: list[float] = []
    first = pretrain(images, config, PretrainSettings(epochs=15, batch_size=8), lambda e, loss: losses.append(loss))
    torch.rand(3)
    again = pretrain(images, config, PretrainSettings(epochs=15, batch_size=8))
    other = pretrain(images, config, PretrainSettings(epochs=15, batch_size=8, seed=1))
    assert losses[-1] < 0.5 * losses[0]
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    assert not torch.equal(first.patch.weight, other.patch.weight)
    assert not first.training
