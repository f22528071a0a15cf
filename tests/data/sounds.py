"""Tiny sound files for the tests of the loaders."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import soundfile

RATE = 8000


def tone(value: int, samples: int = 400) -> np.ndarray:
    """A clip whose level says which it is."""
    return np.full(samples, value / 1000, dtype=np.float32)


def encoded(value: int, kind: str = "WAV", samples: int = 400) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, tone(value, samples), RATE, format=kind)
    return buffer.getvalue()


def sound_folder(root: Path, classes: dict[str, int], ending: str = "wav") -> Path:
    """``root/class/i.wav``; returns the root."""
    for name, count in classes.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            soundfile.write(root / name / f"{i}.{ending}", tone(i), RATE)
    return root


def value_of(clip) -> int:
    return round(1000 * float(clip.samples.mean()))
