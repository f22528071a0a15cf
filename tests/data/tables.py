"""Tiny files for the tests of the loaders."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image


def picture(value: int, size: tuple[int, int] = (6, 4)) -> Image.Image:
    """A flat image whose colour says which it is."""
    return Image.new("RGB", size, (value % 256, 10, 20))


def encoded(value: int) -> bytes:
    buffer = io.BytesIO()
    picture(value).save(buffer, "PNG")
    return buffer.getvalue()


def image_folder(root: Path, classes: dict[str, int], value: int = 0) -> Path:
    """``root/class/i.png``; returns the root."""
    for name, count in classes.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            picture(value + i).save(root / name / f"{i}.png")
    return root


def rows(count: int, classes: int = 2) -> tuple[list[str], list[int]]:
    """Texts that carry their own number, and labels in turn."""
    return [f"text number {i}" for i in range(count)], [i % classes for i in range(count)]


def texts_of(split) -> list[str]:
    return [split.items[i] for i in range(len(split))]


def truncate(path: Path) -> None:
    """Cut a file in half, so that its head is right and its pixels are not."""
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
