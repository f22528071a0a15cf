"""Corruptions, the errors they cause, patch-wise augmentation, and training with the diversification loss."""

import itertools
import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cenote.inspection.robustness import Robustness, measure_robustness
from cenote.ops.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from cenote.ops.patch_augment import augment_patches


def pictures(count=4, channels=3, side=32):
    """Smooth shapes with edges, as pictures have."""
    g = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, channels, 6, 6, generator=g)
    x = F.interpolate(coarse, (side, side), mode="bilinear")
    x[:, :, side // 4 : side // 2, side // 3 : -side // 5] = 0.9
    return x


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize(("channels", "side"), [(3, 32), (1, 8), (1, 28)])
def test_corruptions_grow_with_severity_and_follow_the_seed(name, channels, side):
    x = pictures(16, channels, side)
    changed = [corrupt(x, name, severity, seed=3) for severity in SEVERITIES]
    assert all(each.shape == x.shape and each.min() >= 0 and each.max() <= 1 for each in changed)
    away = [(each - x).abs().mean().item() for each in changed]
    assert away[0] > 1e-3
    assert away[4] > 1.1 * away[0]
    if name != "pixelate":  # whose cells fit some sizes better than others
        assert all(b > 0.95 * a for a, b in itertools.pairwise(away))
    assert torch.equal(corrupt(x, name, 3, seed=3), changed[2])
    if name in ("gaussian_noise", "shot_noise", "impulse_noise", "motion_blur", "fog"):
        assert not torch.equal(corrupt(x, name, 3, seed=4), changed[2])


def test_what_corruptions_do():
    flat = torch.full((2, 1, 64, 64), 0.5)
    assert (corrupt(flat, "gaussian_noise", 2) - 0.5).std().item() == pytest.approx(0.12, rel=0.03)
    assert corrupt(flat, "shot_noise", 1).var().item() == pytest.approx(0.5 / 60, rel=0.05)
    hit = corrupt(flat, "impulse_noise", 5)
    assert (hit != 0.5).float().mean().item() == pytest.approx(0.27, abs=0.01)
    assert (hit == 0).float().mean().item() == pytest.approx(0.135, abs=0.01)
    for name in ("gaussian_blur", "defocus_blur", "motion_blur", "contrast", "pixelate"):
        torch.testing.assert_close(corrupt(flat, name, 5), flat)
    torch.testing.assert_close(corrupt(flat, "brightness", 3), flat + 0.3)
    point = torch.zeros(1, 1, 33, 33)
    point[..., 16, 16] = 1
    for name in ("gaussian_blur", "defocus_blur", "motion_blur"):
        spread = corrupt(point, name, 3)
        assert spread.sum().item() == pytest.approx(1, abs=1e-4)
        torch.testing.assert_close(spread, spread.flip(2, 3))


def test_corruption_refuses_what_it_cannot_do():
    x = pictures()
    with pytest.raises(ValueError, match="unknown corruption 'snow'; there are gaussian_noise"):
        corrupt(x, "snow", 1)
    with pytest.raises(ValueError, match="severity must be 1 to 5, got 0"):
        corrupt(x, "fog", 0)
    with pytest.raises(ValueError, match="before they are normalised"):
        corrupt(x - 0.5, "fog", 1)
    with pytest.raises(ValueError, match="1 or 3 channels, got 2"):
        corrupt(x[:, :2], "jpeg", 1)


def table(clean, **errors):
    return Robustness(clean, {name: tuple(values) for name, values in errors.items()}, (1, 2))


def test_mean_corruption_error_is_a_mean_of_ratios():
    base, model = table(0.1, fog=(0.2, 0.6), jpeg=(0.1, 0.3)), table(0.2, fog=(0.2, 0.2), jpeg=(0.3, 0.3))
    assert model.corruption_errors(base) == pytest.approx({"fog": 0.5, "jpeg": 1.5})
    assert model.mean_corruption_error(base) == pytest.approx(100)
    assert base.mean_corruption_error(base) == pytest.approx(100)
    assert model.relative_mean_corruption_error(base) == pytest.approx(100 * (0 + 0.2 / 0.2) / 2)
    assert model.mean_error == pytest.approx(0.25)
    assert model.mean_accuracy == pytest.approx(0.75)
    with pytest.raises(ValueError, match="no ratio"):
        model.mean_corruption_error(table(0, fog=(0, 0), jpeg=(0, 0.1)))
    with pytest.raises(ValueError, match=r"measured under \['fog'\]"):
        model.mean_corruption_error(table(0, fog=(0.1, 0.1)))


def test_measuring_a_classifier_whose_errors_are_known(tmp_path):
    """It reads the mean brightness: brightness moves it over its threshold, contrast never does."""

    class Bright(nn.Module):
        def forward(self, x):
            assert not self.training
            mean = x.mean(dim=(1, 2, 3))
            return torch.stack([0.6 - mean, mean - 0.6], dim=1)

    x = torch.cat([torch.full((30, 1, 8, 8), 0.35), torch.full((10, 1, 8, 8), 0.8)])
    labels = (torch.arange(40) >= 30).long()
    model = Bright()
    found = measure_robustness(model, x, labels, corruptions=("brightness", "contrast"), batch_size=7)
    assert model.training
    assert found.clean == 0
    assert found.errors == {"brightness": (0, 0, 0.75, 0.75, 0.75), "contrast": (0, 0, 0, 0, 0)}
    assert found.frame().loc["brightness"].tolist() == pytest.approx([0, 0, 75, 75, 75, 45])
    darker = measure_robustness(model, x, labels, corruptions=("brightness",), prepare=lambda pixels: pixels - 0.5)
    assert darker.clean == 0.25
    found.save(tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text())["errors"]["brightness"][2] == 0.75
    again = measure_robustness(lambda x: Bright().eval()(x), x, labels, corruptions=("gaussian_noise",), severities=[5])
    assert again.severities == (5,)
    with pytest.raises(ValueError, match="40 images have 3 labels"):
        measure_robustness(model, x, labels[:3])
    with pytest.raises(ValueError, match="one corruption"):
        measure_robustness(model, x, labels, corruptions=())


def test_patches_are_changed_one_by_one():
    x = torch.rand(8, 3, 16, 24)
    g = torch.Generator().manual_seed(1)
    changed = augment_patches(x, 4, chance=0.3, noise=0.05, generator=g)
    same = (changed == x).unflatten(3, (6, 4)).unflatten(2, (4, 4)).all(dim=5).all(dim=3).all(dim=1)
    # A patch is left alone with chance 0.7 ** 3; all its channels and pixels are, or none.
    assert same.float().mean().item() == pytest.approx(0.343, abs=0.08)
    assert (changed - x).abs().amax() < 1
    again = augment_patches(x, 4, chance=0.3, noise=0.05, generator=torch.Generator().manual_seed(1))
    assert torch.equal(again, changed)


def test_each_change_of_a_patch():
    x = torch.rand(4, 2, 8, 8)
    assert torch.equal(augment_patches(x, 4, chance=0), x)
    flipped = augment_patches(x, 4, chance=1, noise=0, smallest_crop=1)
    torch.testing.assert_close(flipped[..., :4], x[..., :4].flip(3))
    torch.testing.assert_close(flipped[..., 4:], x[..., 4:].flip(3))
    slope = torch.arange(4.0).expand(64, 1, 4, 4)  # a crop of a slope is a gentler slope
    cropped = augment_patches(slope, 4, chance=1, noise=0, smallest_crop=0.3).flip(3)
    gradient = cropped[..., 2] - cropped[..., 1]
    assert 0.3**0.5 - 1e-4 <= gradient.min() < gradient.max() <= 1 + 1e-4
    noisy = augment_patches(torch.full((4, 1, 32, 32), 0.9), 4, chance=1, noise=0.1, low=0.0, high=1.0)
    assert noisy.max() == 1
    with pytest.raises(ValueError, match="patches of 5 do not divide"):
        augment_patches(x, 5)
    with pytest.raises(ValueError, match="a chance in"):
        augment_patches(x, 4, chance=2)
