"""Ratios of times, taken in turn so that a drifting machine hits both sides alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any


def time_ratio(slow: Callable[[], Any], fast: Callable[[], Any], rounds: int = 9, warmup: int = 2) -> float:
    """Median over rounds of the time of ``slow()`` over the time of ``fast()``."""
    ratios = []
    for number in range(warmup + rounds):
        times = []
        for call in (slow, fast):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        if number >= warmup:
            ratios.append(times[0] / times[1])
    return statistics.median(ratios)
