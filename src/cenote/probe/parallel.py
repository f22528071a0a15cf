"""Small jobs side by side, a core each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def side_by_side(jobs: int) -> Iterator[Callable[[Callable[[Any], Any], Sequence[Any]], Iterator[Any]]]:
    """A function that applies another to every item given, several at a time, torch's threads divided among them.

    It yields the results in order, like ``map``, and must be exhausted. The tensors of a small readout are too small to
    be cut up between cores, and waiting for each other after every operation costs more than it brings, very much more
    on a busy machine: a core a job it is, as long as there are enough jobs. Jobs share nothing that they write to, so
    the numbers do not depend on who comes first.
    """
    threads = torch.get_num_threads()
    workers = max(1, min(threads, jobs))
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(threads // workers,))
    try:
        yield pool.map
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
