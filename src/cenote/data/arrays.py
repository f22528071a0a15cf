"""Images in numpy archives."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from cenote.data.items import ArrayImages
from cenote.data.source import PARTS, PartName, Source

LAYOUTS = (("{part}_x", "{part}_y"), ("{part}_images", "{part}_labels"), ("x_{part}", "y_{part}"))


def archive_source(path: Path) -> Source:
    """An ``.npz`` file with ``train_x``, ``train_y``, ``test_x``, ``test_y`` (or ``train_images``, ``x_train``, ...).

    Images are ``uint8`` ``(items, height, width)`` or ``(items, height, width, 3)``; ``class_names`` names the labels.
    The arrays are held in memory, as numpy archives cannot be mapped.

    Raises:
        ValueError: other arrays than these, or images and labels of different number.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    images, labels, parts = [], [], list[PartName]()
    for part in PARTS:
        for layout in LAYOUTS:
            x, y = (arrays.get(name.format(part=part)) for name in layout)
            if x is None or y is None:
                continue
            if x.dtype != np.uint8 or x.ndim not in (3, 4) or len(x) != len(y):
                raise ValueError(
                    f"{path} should hold uint8 images (items, height, width[, 3]) and as many labels, "
                    f"got {x.dtype} {x.shape} and {y.shape} for {part}"
                )
            images.append(x)
            labels.append(y)
            parts += [part] * len(x)
            break
    if not images:
        raise ValueError(
            f"{path} holds no images: expected train_x and train_y (and test_x, test_y), got {', '.join(arrays)}"
        )
    pixels, targets = np.concatenate(images), np.concatenate(labels)
    names = arrays.get("class_names")
    return Source(
        name=str(path),
        modality="image",
        items=ArrayImages(pixels),
        labels=targets.tolist(),
        ids=[f"image {row}" for row in range(len(targets))],
        digest=hashlib.sha256(np.ascontiguousarray(pixels).tobytes() + targets.tobytes()).hexdigest(),
        parts=parts,
        classes=None if names is None else tuple(str(name) for name in names),
    )
