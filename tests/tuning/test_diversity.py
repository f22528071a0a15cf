"""Training with the diversification loss: what it minimises, and that it leaves the model as it should."""

import pytest
import torch
from torch import nn

from cenote.backbones.tiny_vit import TinyViT, TinyViTConfig
from cenote.integrations.tap import InsertedPooling
from cenote.tuning.diversity import DiversitySettings, measure_diversity, train_diverse


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = TinyViT(TinyViTConfig(8, 2, 1, 16, 2, 2))
        self.head = nn.Linear(16, 2)

    def forward(self, x):
        return self.head(self.encoder(x)[:, 0])


def data(count=96):
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 2
    images = 0.5 * torch.randn(count, 1, 8, 8, generator=g)
    images[labels == 1, :, :4] += 1
    return images, labels


def test_the_loss_lowers_what_it_measures():
    images, labels = data()
    found = []
    for weight in (0.0, 3.0):
        torch.manual_seed(0)
        model = Classifier()
        with torch.no_grad():
            for block in model.encoder.blocks:
                block.qkv.weight.mul_(6)  # sinks from the start
        start = measure_diversity(model, images, threshold=1.2)
        settings = DiversitySettings(weight=weight, threshold=1.2, epochs=12, batch_size=32, lr=3e-3)
        run = train_diverse(model, images, labels, settings)
        accuracy = (model(images).argmax(dim=1) == labels).float().mean().item()
        found.append((measure_diversity(model, images, threshold=1.2), accuracy))
        assert len(run.epochs) == 12
        assert run.epochs[-1].task < run.epochs[0].task
        assert (run.epochs[0].adl == run.epochs[0].adl) == (weight > 0)  # NaN without the loss
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        assert not model.training
    (without, accuracy), (with_loss, other) = found
    assert start.adl > 0.02
    assert with_loss.adl < 0.8 * without.adl
    assert min(accuracy, other) > 0.9
    assert 0 < with_loss.similarity <= 1


def test_training_is_seeded_takes_tap_and_augments(tmp_path):
    images, labels = data(32)
    weights = []
    for patch_size in (2, 2, None):
        torch.manual_seed(0)
        model = Classifier()
        inserted = InsertedPooling(model, 2, grid=(4, 4))
        assert (inserted.prefix, len(inserted.poolings)) == (1, 2)
        before = inserted.poolings[0].proj[0].weight.clone()
        settings = DiversitySettings(epochs=2, batch_size=16, patch_size=patch_size, pixel_range=(-3, 3))
        run = train_diverse(model, images, labels, settings)
        assert not torch.equal(inserted.poolings[0].proj[0].weight, before)
        weights.append(model.head.weight.detach().clone())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    run.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epochs.csv", "model.safetensors", "settings.json"]
    assert run.frame()["epoch"].tolist() == [1, 2]


def test_the_augmented_view_comes_beside_the_images_as_they_are():
    images, labels = data(32)
    model, shown = Classifier(), []
    model.register_forward_pre_hook(lambda _, args: shown.append(args[0]))
    settings = DiversitySettings(weight=0, epochs=1, batch_size=16, lr=0, weight_decay=0, patch_size=2)
    run = train_diverse(model, images, labels, settings)
    assert len(shown) == 4
    assert not torch.equal(shown[0], shown[1])
    plain = torch.cat(shown[1::2])
    assert torch.equal(plain.flatten(1).sum(dim=1).sort().values, images.flatten(1).sum(dim=1).sort().values)
    with torch.no_grad():
        assert run.epochs[0].task == pytest.approx(nn.functional.cross_entropy(model(images), labels).item(), rel=1e-5)


def test_bad_input():
    images, labels = data(4)
    with pytest.raises(ValueError, match="as many images as labels"):
        train_diverse(Classifier(), images, labels[:2])
    with pytest.raises(ValueError, match="weight of at least 0"):
        DiversitySettings(weight=-1)
    with pytest.raises(ValueError, match="positive threshold"):
        DiversitySettings(threshold=0)
    with pytest.raises(ValueError, match="number of tokens, 17"):
        train_diverse(Classifier(), images, labels, DiversitySettings(threshold=17))
    with pytest.raises(ValueError, match="no attention that is known"):
        train_diverse(nn.Sequential(nn.Flatten(), nn.Linear(64, 2)), images, labels)
    with pytest.raises(RuntimeError, match="the loss is nan"):
        train_diverse(Classifier(), images * float("nan"), labels)
    with pytest.raises(ValueError, match="got none"):
        measure_diversity(Classifier(), images[:0])
