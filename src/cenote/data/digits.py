"""scikit-learn's bundled digits: 1797 grey images of 8 x 8 pixels, ten classes."""

from __future__ import annotations

import hashlib

import numpy as np

from cenote.data.items import ArrayImages
from cenote.data.source import PartName, Source
from cenote.data.splits import holdout

TEST_ITEMS = 597


def digits_source() -> Source:
    """The digits, of which 1200 are for training and 597 for the test.

    The test part depends on nothing, not even on a seed: the embedded backbone was pretrained on exactly these training
    images, so a test item must never become a training item. A validation part is taken out of the 1200 as ever.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = (bunch.images * (255 / 16)).round().astype(np.uint8)
    targets = bunch.target.astype(np.int64)
    parts: list[PartName] = ["train"] * len(targets)
    for index in holdout(targets, TEST_ITEMS, seed=0)[1]:
        parts[index] = "test"
    return Source(
        name="digits",
        modality="image",
        items=ArrayImages(pixels),
        labels=targets.tolist(),
        ids=[f"digit {number}" for number in range(len(targets))],
        digest=hashlib.sha256(pixels.tobytes() + targets.tobytes()).hexdigest(),
        parts=parts,
        classes=tuple(str(name) for name in bunch.target_names),
    )
