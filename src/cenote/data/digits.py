"""scikit-learn's bundled digits: 1797 grey images of 8 x 8 pixels, ten classes."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from PIL import Image

from cenote.data.base import Data, Split
from cenote.data.splits import holdout

TEST_ITEMS = 597


class ArrayImages:
    """Grey images held as one ``uint8`` array ``(items, height, width)``, given out as PIL images."""

    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> Image.Image:
        return Image.fromarray(self.pixels[index])


def digits_split(targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The one division of the digits into 1200 training and 597 test items.

    It depends on nothing, not even on a seed: the embedded backbone was pretrained on exactly these training images, so a
    test item must never become a training item.
    """
    return holdout(targets, TEST_ITEMS, seed=0)


def load_digits(validation_fraction: float = 0.1, seed: int = 0) -> Data:
    """The digits with their fixed test part; ``seed`` draws only the validation part out of the 1200 training items."""
    from sklearn.datasets import load_digits as bundled

    bunch = bundled()
    pixels = (bunch.images * (255 / 16)).round().astype(np.uint8)
    targets = bunch.target.astype(np.int64)
    pool, test = digits_split(targets)
    kept, held = holdout(targets[pool], round(len(pool) * validation_fraction), seed)

    def part(index: np.ndarray) -> Split:
        digest = hashlib.sha256(pixels[index].tobytes() + targets[index].tobytes()).hexdigest()
        ids = [f"digit {number}" for number in index]
        return Split(ArrayImages(pixels[index]), torch.from_numpy(targets[index]), ids, digest)

    classes = tuple(str(name) for name in bunch.target_names)
    return Data("digits", "image", "classification", classes, part(pool[kept]), part(pool[held]), part(test))
