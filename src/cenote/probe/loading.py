"""Raw items in order, loaded and augmented ahead of the backbone by threads."""

from __future__ import annotations

import hashlib
import random
import threading
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cenote.data.base import Split
from cenote.data.judged import JudgedData
from cenote.probe.identity import identify

Augment = Callable[[Any, int], Any]
"""``augment(item, seed) -> item``; all its randomness must come from the seed, or :class:`Seeded` wrap it."""


@dataclass(frozen=True)
class Seeded:
    """Turns ``item -> item`` with randomness from the global generators into an :data:`Augment`.

    Python's, NumPy's and torch's generators are seeded for every item and afterwards put back as they were. Items take
    turns, also among threads.
    """

    transform: Callable[[Any], Any]

    @property
    def cache_id(self) -> str:
        return f"seeded {identify(self.transform)}"

    def __call__(self, item: Any, seed: int) -> Any:
        with _GLOBAL_GENERATORS:
            python, numpy, pytorch = random.getstate(), np.random.get_state(), torch.get_rng_state()
            try:
                random.seed(seed)
                np.random.seed(seed)
                torch.random.default_generator.manual_seed(seed)
                return self.transform(item)
            finally:
                random.setstate(python)
                np.random.set_state(numpy)
                torch.set_rng_state(pytorch)


_GLOBAL_GENERATORS = threading.Lock()


def item_seed(view: int, index: int) -> int:
    """A 32-bit seed for one view of one item."""
    return int.from_bytes(hashlib.sha256(f"{view}:{index}".encode()).digest()[:4], "little")


def load_items(
    split: Split | JudgedData,
    first: int,
    stop: int,
    *,
    view: int = 0,
    augment: Augment | None = None,
    workers: int = 0,
    ahead: int = 64,
) -> Generator[Any, None, None]:
    """Items ``first`` to ``stop - 1`` of a split, in order.

    Args:
        view, augment: each item becomes ``augment(item, item_seed(view, number))``.
        workers: threads; 0 loads each item when it is asked for.
        ahead: most items that wait loaded.
    """

    def load(index: int) -> Any:
        item = split.items[index]
        return item if augment is None else augment(item, item_seed(view, index))

    if not workers:
        yield from map(load, range(first, stop))
        return
    pool = ThreadPoolExecutor(workers)
    waiting: deque[Future[Any]] = deque()
    try:
        for index in range(first, stop):
            waiting.append(pool.submit(load, index))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
