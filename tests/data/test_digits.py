import torch
from sklearn.datasets import load_digits

from cenote.data import load_data


def test_parts_and_content():
    data = load_data("digits")
    assert (len(data.train), len(data.validation), len(data.test)) == (1080, 120, 597)
    assert data.task == "classification"
    assert data.modality == "image"
    assert data.classes == tuple("0123456789")
    counts = torch.bincount(data.test.targets)
    assert counts.max() - counts.min() <= 4, "stratified"
    bunch = load_digits()
    for split in (data.train, data.validation, data.test):
        for i in (0, len(split) - 1):
            row = int(split.ids[i].removeprefix("digit "))
            image = split.items[i]
            assert image.size == (8, 8)
            assert image.getpixel((3, 2)) == round(bunch.images[row, 2, 3] * 255 / 16)
            assert split.targets[i] == bunch.target[row]


def test_the_test_part_is_the_same_whatever_the_seed():
    one, other = load_data("digits"), load_data("digits", seed=7, test_fraction=0.5)
    assert one.test.ids == other.test.ids
    assert one.test.fingerprint == other.test.fingerprint
    assert set(one.validation.ids) != set(other.validation.ids)
    assert set(one.train.ids) | set(one.validation.ids) == set(other.train.ids) | set(other.validation.ids)
    parts = [set(one.train.ids), set(one.validation.ids), set(one.test.ids)]
    assert len(set.union(*parts)) == sum(map(len, parts)) == 1797


def test_limit_is_a_stratified_part():
    data = load_data("digits", limit=100)
    assert (len(data.train), len(data.validation), len(data.test)) == (100, 100, 100)
    assert torch.bincount(data.train.targets).tolist() == [10] * 10
