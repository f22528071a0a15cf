"""Clips made ready for a speech network: checked, resampled to its rate, cut to length."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from cenote.types import Audio

RESAMPLER = "soxr HQ"
"""What :func:`resample` does, for cache keys."""


def resample(samples: Float[np.ndarray, "samples"], rate: int, wanted: int) -> Float[np.ndarray, "resampled"]:
    """Band-limited resampling by the soxr library; the identity where the rates agree.

    Raises:
        ImportError: soxr is missing and the rates differ.
    """
    if rate == wanted:
        return samples
    try:
        import soxr
    except ImportError as error:
        raise ImportError("resampling audio needs soxr: pip install 'cenote[audio]'") from error
    found = soxr.resample(samples, rate, wanted, quality="HQ")
    # Of a handful of samples nothing may be left.
    return found if len(found) else samples[:1]


def waveforms(
    items: Sequence[Any], rate: int, max_seconds: float | None, spec: str
) -> list[Float[np.ndarray, "samples"]]:
    """Samples of each clip at ``rate``, at most the first ``max_seconds`` of them.

    Args:
        items: clips.
        rate: the network's samples a second.
        max_seconds: longer clips lose their end; ``None`` for no limit.
        spec: of the backbone, for messages.

    Raises:
        TypeError: an item that is no :class:`~cenote.types.Audio`.
        ValueError: a clip without samples, with several channels, with NaN or infinite samples, or without a rate.
    """
    found = []
    for item in items:
        if not isinstance(item, Audio):
            raise TypeError(f"{spec} reads cenote.types.Audio(samples, rate), got {type(item).__name__}")
        samples = np.asarray(item.samples, dtype=np.float32)
        if samples.ndim != 1 or not samples.size:
            raise ValueError(f"{spec} reads clips of one channel (samples,), got shape {samples.shape}")
        if item.rate <= 0:
            raise ValueError(f"a clip needs a positive number of samples a second, got {item.rate}")
        if not np.isfinite(samples).all():
            raise ValueError(f"a clip of {len(samples)} samples holds NaN or infinite ones")
        if max_seconds is not None:
            # Before resampling, which costs by the second; and after, for the rounding.
            samples = samples[: math.ceil(max_seconds * item.rate)]
        samples = resample(samples, item.rate, rate)
        found.append(samples if max_seconds is None else samples[: round(max_seconds * rate)])
    return found


def check_max_seconds(max_seconds: float | None, rate: int) -> float | None:
    """``max_seconds`` itself.

    Raises:
        ValueError: less than one sample.
    """
    if max_seconds is not None and not max_seconds * rate >= 1:
        raise ValueError(f"max_seconds must be at least one sample (1/{rate} s), got {max_seconds}")
    return max_seconds


def times(count: int, hop: int, rate: int) -> list[str]:
    """Where each of ``count`` frames starts: ``"0.00 s"``, ``"0.02 s"``, ..."""
    return [f"{number * hop / rate:.2f} s" for number in range(count)]
