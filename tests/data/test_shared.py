"""The loaders on larger files, where they are at hand."""

import os
from pathlib import Path

import pytest

from cenote.data import load_data

FOLDER = Path(os.environ.get("CENOTE_DATA", Path(__file__).parents[3] / "shared" / "data"))

FILES = {
    # file: modality, task, classes, sizes of train, validation and test (a tenth is made validation)
    "sst2/sst2.parquet": ("text", "classification", 2, (6920, 872, 1821)),
    "rotten_tomatoes/rotten_tomatoes.parquet": ("text", "classification", 2, (8528, 1066, 1068)),
    "banking77/banking77.parquet": ("text", "classification", 77, (9003, 1000, 3080)),
    "clinc150/clinc150.parquet": ("text", "classification", 151, (15100, 3100, 5500)),
    "cifar10/cifar10_10k_2k.parquet": ("image", "classification", 10, (9000, 1000, 2000)),
    "fashion_mnist/fashion_mnist_12k_4k.npz": ("image", "classification", 10, (10800, 1200, 4000)),
}


@pytest.mark.parametrize("file", FILES)
def test_files(file):
    path = FOLDER / file
    if not path.is_file():
        pytest.skip(f"{path} is not at hand (CENOTE_DATA names the folder)")
    modality, task, classes, sizes = FILES[file]
    data = load_data(path)
    assert (data.modality, data.task, len(data.classes)) == (modality, task, classes)
    assert (len(data.train), len(data.validation), len(data.test)) == sizes
    assert len(data.test.items[0] if modality == "text" else data.test.items[0].size) > 0


def test_readable_class_names():
    path = FOLDER / "banking77" / "banking77.parquet"
    if not path.is_file():
        pytest.skip(f"{path} is not at hand (CENOTE_DATA names the folder)")
    data = load_data(path, limit=100)
    assert len(data.classes) == 77
    assert "activate_my_card" in data.classes
