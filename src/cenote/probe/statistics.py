"""Whether one readout is better than another on the same test items: bootstrap over items and seeds, Holm, tie groups.

Scores are one number an item (1 for a correct answer, say), arrays ``(seeds, items)``; all methods are scored on the
same items, so differences are paired. Items are drawn with replacement, ``items`` of them; seeds too, ``seeds - 1``
of them, which makes the variance of the mean over seeds come out unbiased (drawing all of them understates it by
``1 / seeds``). With three seeds that variance is still a rough guess: where seeds matter more than items, use more of
them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

CHUNK = 1 << 21  # item counts held at a time


class Bootstrap(NamedTuple):
    """Resampled scores of methods that saw the same items.

    Attributes:
        estimate: score of each method, ``(methods,)``.
        draws: the same on every resample, ``(methods, resamples)``; column by column from the same items.
        items: number of test items.
    """

    estimate: np.ndarray
    draws: np.ndarray
    items: int


class Difference(NamedTuple):
    """How much the first of two methods scores above the second.

    Attributes:
        difference: mean difference.
        low, high: percentile interval.
        p: two-sided p-value of no difference.
    """

    difference: float
    low: float
    high: float
    p: float


def bootstrap_means(scores: Sequence[Any] | np.ndarray, *, resamples: int = 4000, seed: int = 0) -> Bootstrap:
    """Resample the mean score of every method.

    Args:
        scores: one ``(seeds, items)`` array a method (``(items,)`` for a single seed); numbers of seeds may differ.
        resamples: number of bootstrap samples.
        seed: of the resampling.

    Raises:
        ValueError: no methods, arrays of another rank, unequal numbers of items, NaN or infinite scores.
    """
    arrays = [_scores(x) for x in scores]
    items = _common_items(arrays)
    draws = np.empty((len(arrays), resamples))
    for part, counts, seed_weights in _resamples(items, {len(a) for a in arrays}, resamples, seed):
        for method, array in enumerate(arrays):
            draws[method, part] = np.einsum("rs,rs->r", counts @ array.T / items, seed_weights[len(array)])
    return Bootstrap(np.array([a.mean() for a in arrays]), draws, items)


def bootstrap_metric(
    metric: Callable[[np.ndarray, np.ndarray], float],
    predictions: Sequence[np.ndarray] | np.ndarray,
    targets: np.ndarray,
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> Bootstrap:
    """Resample a score that is no mean over items (correlation, error rate, V-measure).

    A resample holds items twice, which some scores reward (V-measure by a percent or more), so the draws are moved to
    have the estimate as their mean.

    Args:
        metric: ``metric(predictions (items, ...), targets (items, ...))``.
        predictions: one ``(seeds, items, ...)`` array a method.
        targets: ``(items, ...)``.
        resamples: number of bootstrap samples; the metric is called this often for every method and seed.
        seed: of the resampling.

    Raises:
        ValueError: no methods, or numbers of items that differ.
    """
    arrays = [np.asarray(p) for p in predictions]
    items = _common_items(arrays)
    if len(targets) != items:
        raise ValueError(f"expected {items} targets, one a test item, got {len(targets)}")
    draws = np.empty((len(arrays), resamples))
    for part, counts, seed_weights in _resamples(items, {len(a) for a in arrays}, resamples, seed):
        for column, count, row in zip(range(part.start, part.stop), counts, range(len(counts)), strict=True):
            index = np.repeat(np.arange(items), count.astype(int))
            for method, array in enumerate(arrays):
                weights = seed_weights[len(array)][row]
                draws[method, column] = sum(
                    w * metric(one[index], targets[index]) for w, one in zip(weights, array, strict=True) if w
                )
    estimate = np.array([np.mean([metric(one, targets) for one in a]) for a in arrays])
    return Bootstrap(estimate, draws + (estimate - draws.mean(axis=1))[:, None], items)


def bootstrap_interval(
    scores: Any, level: float = 0.95, *, resamples: int = 4000, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of the mean of ``(seeds, items)`` scores. Raises as :func:`bootstrap_means`."""
    return percentile_interval(bootstrap_means([scores], resamples=resamples, seed=seed).draws[0], level)


def percentile_interval(draws: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """The middle ``level`` of resampled values. ``ValueError`` for a level outside (0, 1)."""
    if not 0 < level < 1:
        raise ValueError(f"level must lie in (0, 1), got {level}")
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired_difference(
    first: Any, second: Any, level: float = 0.95, *, resamples: int = 4000, seed: int = 0
) -> Difference:
    """Test two methods scored on the same items. Raises as :func:`bootstrap_means`."""
    boot = bootstrap_means([first, second], resamples=resamples, seed=seed)
    low, high = percentile_interval(boot.draws[0] - boot.draws[1], level)
    return Difference(float(boot.estimate[0] - boot.estimate[1]), low, high, float(pairwise_p(boot)[0, 1]))


def pairwise_p(boot: Bootstrap) -> np.ndarray:
    """Two-sided bootstrap p-values of no difference between any two methods, ``(methods, methods)``.

    ``P(|d* - d| >= |d|)`` over the resampled differences d*. Beyond the last resample the tail of the normal
    distribution with the same spread goes on, so that p-values stay distinct under a correction for many pairs; none
    is below ``2^(1 - items)``, what all items agreeing is worth.
    """
    methods, resamples = boot.draws.shape
    p = np.ones((methods, methods))
    for i in range(methods):
        for j in range(i + 1, methods):
            difference = boot.estimate[i] - boot.estimate[j]
            off = np.abs(boot.draws[i] - boot.draws[j] - difference)
            # Counts of equal scores differ by rounding only.
            count = int((off >= abs(difference) - 1e-12).sum())
            value = (1 + count) / (1 + resamples)
            if count == 0:
                spread = np.sqrt(np.mean(off**2))
                value = min(value, 2 * stats.norm.sf(abs(difference) / spread) if spread > 0 else 0.0)
            p[i, j] = p[j, i] = max(value, 2.0 ** (1 - boot.items))
    return p


def holm(p_values: Any) -> np.ndarray:
    """Holm's step-down adjustment: rejecting where the result is at most alpha keeps the family-wise error at alpha.

    Raises:
        ValueError: p-values outside [0, 1] or NaN, or not one row of them.
    """
    p = np.asarray(p_values, dtype=float)
    if p.ndim != 1 or not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"expected a row of p-values in [0, 1], got {p_values}")
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * (len(p) - np.arange(len(p)))), 1.0)
    return adjusted


def tie_groups(
    scores: Sequence[Any] | np.ndarray | Bootstrap, alpha: float = 0.05, *, resamples: int = 4000, seed: int = 0
) -> list[int]:
    """Group a ranked table: group 1 is the best method and all that do not differ significantly from it, and so on.

    The best method outside of group 1 leads group 2, joined by the remaining ones that do not differ from *it*;
    higher means better. p-values are Holm-corrected over all pairs, because the best is only known after looking:
    correcting over the comparisons with it alone would call too many differences real. A noisy method can tie with a
    leader that a better, steadier one does not reach.

    Args:
        scores: one ``(seeds, items)`` array a method, or resampled scores already.
        alpha: family-wise error of all "differs" that the groups imply.
        resamples: number of bootstrap samples.
        seed: of the resampling.

    Returns:
        The group of each method, in the order given.
    """
    boot = scores if isinstance(scores, Bootstrap) else bootstrap_means(scores, resamples=resamples, seed=seed)
    methods = len(boot.estimate)
    upper = np.triu_indices(methods, 1)
    p = np.ones((methods, methods))
    p[upper] = p.T[upper] = holm(pairwise_p(boot)[upper])
    groups, left, number = [0] * methods, sorted(range(methods), key=lambda m: -boot.estimate[m]), 0
    while left:
        number += 1
        leader = left[0]
        for method in [m for m in left if p[leader, m] > alpha]:
            groups[method] = number
        left = [m for m in left if not groups[m]]
    return groups


def _scores(scores: Any) -> np.ndarray:
    array = np.atleast_2d(np.asarray(scores, dtype=float))
    if array.ndim != 2:
        raise ValueError(f"expected scores (seeds, items), got shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"scores must be finite, got {int((~np.isfinite(array)).sum())} that are NaN or infinite")
    return array


def _common_items(arrays: Sequence[np.ndarray]) -> int:
    if not arrays:
        raise ValueError("expected at least one method, got none")
    shapes = [a.shape[:2] for a in arrays]
    if len({shape[1] for shape in shapes}) != 1 or 0 in np.array(shapes):
        raise ValueError(f"all methods need scores of the same items, got (seeds, items) of {shapes}")
    return shapes[0][1]


def _resamples(
    items: int, seed_counts: set[int], resamples: int, seed: int
) -> Iterator[tuple[slice, np.ndarray, dict[int, np.ndarray]]]:
    """Chunks of resamples: which, how often each item is drawn, and for each number of seeds the weight of each
    seed."""
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")
    rng = np.random.default_rng(seed)
    step = max(1, CHUNK // items)
    for start in range(0, resamples, step):
        part = slice(start, min(start + step, resamples))
        rows = part.stop - start
        # One bincount for the whole chunk: row r counts in bins r * items to (r + 1) * items.
        drawn = rng.integers(items, size=(rows, items)) + items * np.arange(rows)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=rows * items).reshape(rows, items).astype(float)
        weights = {}
        for count in sorted(seed_counts):
            draws = max(count - 1, 1)
            weights[count] = rng.multinomial(draws, np.full(count, 1 / count), size=rows) / draws
        yield part, counts, weights
