"""Numbers and findings in words."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from cenote.probe.result import Row


def is_share(metric: str) -> bool:
    """Whether a metric is a share that reads best in percent (accuracy, precision), unlike R^2 or an error."""
    return any(word in metric.lower() for word in ("accuracy", "precision", "recall", "f1"))


def number(value: float | None, digits: int = 3) -> str:
    """A number to ``digits`` significant digits; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    if abs(value) >= 10**digits:
        return f"{value:,.0f}"
    if abs(value) < 1e-3:
        return f"{value:.{digits - 1}g}"
    return f"{value:.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


def quantity(value: float | None) -> str:
    """A count with a thousands suffix: 950, 12.3k, 4.56M, 1.2G."""
    if value is None or not math.isfinite(value):
        return "–"
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{suffix}"
    return f"{value:.3g}"


def score(value: float | None, share: bool) -> str:
    """A score: ``96.3 %`` for shares, three decimals otherwise."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{100 * value:.1f} %" if share else f"{value:.3f}"


def gap(value: float, share: bool) -> str:
    """A difference of scores: points for shares."""
    return f"{100 * value:.1f} points" if share else f"{value:.3f}"


def duration(seconds: float | None) -> str:
    """``0.4 s``, ``12 s``, ``3 min 20 s``, ``2 h 5 min``."""
    if seconds is None or not math.isfinite(seconds):
        return "–"
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds // 60:.0f} min {seconds % 60:.0f} s"
    return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:.0f} min"


def short_names(rows: Sequence[Row]) -> list[str]:
    """A name for each row: the readout, with options, layers and tokens only where its rows differ in them."""
    bare = {row.readout: re.sub(r"\(.*?\)", "", row.readout) for row in rows}
    names = []
    for row in rows:
        same = [other for other in rows if other.readout == row.readout]
        alone = list(bare.values()).count(bare[row.readout]) == 1
        name = bare[row.readout] if alone else row.readout
        if len({other.layers for other in same}) > 1:
            name += f" @ {row.layers}"
        if len({other.tokens for other in same}) > 1:
            name += f" ({row.tokens})"
        names.append(name)
    return names


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


class Headline(NamedTuple):
    """What the comparison found: the winner, and sentences on how clear it is."""

    title: str
    sentences: tuple[str, ...]


def headline(rows: Sequence[Row]) -> Headline:
    """Winner, its lead over the best readout outside its tie group, the ties, and the cheapest of them."""
    best, names, share = rows[0], short_names(rows), is_share(rows[0].metric)
    title = f"{names[0]} reads this backbone best: {score(best.score, share)} {best.metric}"
    if len(rows) == 1:
        return Headline(
            f"{names[0]}: {score(best.score, share)} {best.metric}", ("It is the only readout of this run.",)
        )
    sentences = [f"95 % interval {score(best.ci_low, share)} to {score(best.ci_high, share)}."]
    tied = [i for i, row in enumerate(rows) if i and row.tie_group == best.tie_group]
    outside = [i for i, row in enumerate(rows) if row.tie_group != best.tie_group]
    if outside:
        rival = outside[0]
        lead = gap(best.score - rows[rival].score, share)
        kind = "the best readout outside its tie group" if tied else "the runner-up"
        sentences.append(f"It leads {kind}, {names[rival]} ({score(rows[rival].score, share)}), by {lead}.")
    if not tied:
        sentences.append("No other readout ties with it.")
        return Headline(title, tuple(sentences))
    listed = _listed([names[i] for i in tied[:4]] + ([f"{len(tied) - 4} more"] if len(tied) > 4 else []))
    verb = "does" if len(tied) == 1 else "do"
    sentences.append(
        f"{listed} {verb} not differ significantly from it."
        if outside
        else "No readout of this run differs significantly from it."
    )
    cheap = min([0, *tied], key=lambda i: rows[i].params)
    if cheap and rows[cheap].params < best.params:
        sentences.append(
            f"The cheapest of the tie is {names[cheap]}: {quantity(rows[cheap].params)} parameters against "
            f"{quantity(best.params)}."
        )
    return Headline(title, tuple(sentences))
