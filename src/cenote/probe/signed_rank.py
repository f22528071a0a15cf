"""Whether one method is better than another across data sets: the exact Wilcoxon signed-rank test, and a table of all
pairs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from cenote.probe.statistics import bootstrap_means, holm, percentile_interval


@dataclass(frozen=True)
class SignedRank:
    """Outcome of the test between two methods.

    Attributes:
        wins, losses, ties: data sets on which the first method scores higher, lower, the same.
        statistic: the smaller of the two rank sums (ties left out).
        p: exact two-sided p-value.
        least_p: the smallest p-value that so many data sets can give, ``2^(1 - n)``.
        rank_biserial: effect size in [-1, 1], the difference of the rank sums over their total; 1 = always higher.
        note: says so where no outcome could have been significant.
    """

    wins: int
    losses: int
    ties: int
    statistic: float
    p: float
    least_p: float
    rank_biserial: float
    note: str


def signed_rank(first: Any, second: Any, alpha: float = 0.05) -> SignedRank:
    """Paired Wilcoxon signed-rank test over data sets, two-sided, with the exact null distribution.

    Differences of zero are dropped; equal ones share their mean rank, and the null distribution is that of the shared
    ranks. Without ties it is ``scipy.stats.wilcoxon(method="exact")``. Fewer than 6 data sets cannot reach 0.05, and
    the note says so. The test of "Pooling And Attention: What Are Effective Designs For LLM-Based Embedding Models?"
    (arXiv 2409.02727).

    Args:
        first: the first method's score on each data set.
        second: the second method's, on the same data sets in the same order.
        alpha: level that the note is about.

    Raises:
        ValueError: unequal numbers of data sets, none at all, NaN or infinite scores.
    """
    a, b = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    if a.ndim != 1 or a.shape != b.shape or a.size == 0:
        raise ValueError(f"expected one score a data set from both methods, got shapes {a.shape} and {b.shape}")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("scores must be finite, got NaN or infinite ones")
    difference = a - b
    kept = difference[difference != 0]
    ranks = rankdata(np.abs(kept))
    above, below = float(ranks[kept > 0].sum()), float(ranks[kept < 0].sum())
    least = min(1.0, 2.0 ** (1 - len(kept)))
    note = f"{len(kept)} unequal pairs cannot reach p <= {alpha:g}" if least > alpha else ""
    return SignedRank(
        wins=int((kept > 0).sum()),
        losses=int((kept < 0).sum()),
        ties=len(difference) - len(kept),
        statistic=min(above, below),
        p=_exact_p(ranks, min(above, below)),
        least_p=least,
        rank_biserial=(above - below) / (above + below) if len(kept) else 0.0,
        note=note,
    )


def comparison_table(
    scores: pd.DataFrame | Mapping[str, Mapping[str, float]], alpha: float = 0.05, *, seed: int = 0
) -> pd.DataFrame:
    """All pairs of methods over several data sets, one line a pair.

    Args:
        scores: data sets as rows and methods as columns, or ``{method: {data set: score}}``.
        alpha: level of the notes.
        seed: of the bootstrap.

    Returns:
        Columns ``first, second, mean_first, mean_second, difference, ci_low, ci_high`` (bootstrap over data sets, 95
        %), those of :class:`SignedRank`, and ``p_holm``, corrected over all pairs of the table.

    Raises:
        ValueError: fewer than two methods, or methods with scores on different data sets (which are named) or NaN.
    """
    frame = scores if isinstance(scores, pd.DataFrame) else pd.DataFrame({m: pd.Series(s) for m, s in scores.items()})
    if frame.shape[1] < 2:
        raise ValueError(f"expected at least two methods to compare, got {list(frame.columns)}")
    for method in frame.columns:
        missing = list(frame.index[frame[method].isna()])
        if missing:
            raise ValueError(f"every method needs a score on every data set, {method!r} has none on {missing}")
    rows = []
    for first, second in combinations(frame.columns, 2):
        a, b = frame[first].to_numpy(float), frame[second].to_numpy(float)
        low, high = percentile_interval(bootstrap_means([a - b], seed=seed).draws[0])
        means = {"mean_first": a.mean(), "mean_second": b.mean(), "difference": a.mean() - b.mean()}
        interval = {"ci_low": low, "ci_high": high}
        rows.append({"first": first, "second": second, **means, **interval, **asdict(signed_rank(a, b, alpha))})
    table = pd.DataFrame(rows)
    table.insert(table.columns.get_loc("p") + 1, "p_holm", holm(table["p"]))
    return table


def _exact_p(ranks: np.ndarray, statistic: float) -> float:
    """Chance that either rank sum is at most ``statistic`` when every sign is a fair coin."""
    # Mean ranks are multiples of one half: count the subsets of ranks by twice their sum.
    doubled = np.rint(2 * ranks).astype(int)
    ways = np.zeros(doubled.sum() + 1)
    ways[0] = 1.0
    for rank in doubled:
        # Halved at each rank, so that these are probabilities and cannot overflow.
        ways[rank:] = (ways[rank:] + ways[: len(ways) - rank]) / 2
        ways[:rank] /= 2
    return float(min(1.0, 2 * ways[: round(2 * statistic) + 1].sum()))
