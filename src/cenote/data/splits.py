"""Dividing items into parts: stratified, seeded, the same on every machine."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def holdout(groups: Sequence[object] | np.ndarray, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Choose ``count`` items so that every group gives its share.

    Each group gives ``count * size / total`` items, rounded by largest remainder, and its last one only when no other
    group has any to spare. Items that have no natural group all go under one value.

    Returns:
        Indices kept and indices held out, both ascending.

    Raises:
        ValueError: ``count`` outside ``0..len(groups)``.
    """
    _, codes = np.unique(np.asarray(groups), return_inverse=True)
    total = len(codes)
    if not 0 <= count <= total:
        raise ValueError(f"cannot hold out {count} of {total} items")
    sizes = np.bincount(codes) if total else np.zeros(0, dtype=int)
    exact = sizes * count / max(total, 1)
    shares = np.floor(exact).astype(int)
    spare = np.minimum(sizes - 1, sizes)
    by_remainder = np.argsort(shares - exact, kind="stable")
    for allowed in (spare, sizes):  # a group's last item only when nothing else is left
        for code in by_remainder:
            if shares.sum() < count and shares[code] < allowed[code] and shares[code] < np.ceil(exact[code]):
                shares[code] += 1
        for code in by_remainder:
            while shares.sum() < count and shares[code] < allowed[code]:
                shares[code] += 1
    generator = np.random.default_rng(seed)
    held = [generator.permutation(np.flatnonzero(codes == code))[: shares[code]] for code in range(len(sizes))]
    chosen = np.zeros(total, dtype=bool)
    chosen[np.concatenate(held).astype(int) if held else []] = True
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)
