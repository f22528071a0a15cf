"""Critical-difference diagram: readouts by their mean rank over data sets, bars joining those that do not differ.

After Demsar, "Statistical Comparisons of Classifiers over Multiple Data Sets" (JMLR 7, 2006). Differences are judged by
the exact Wilcoxon signed-rank test on every pair with Holm's correction over all pairs, not by Nemenyi's test on the
ranks, whose outcome for two readouts depends on which others are in the table (Benavoli, Corani, Mangili, JMLR 17,
2016).
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from markupsafe import escape

from cenote.probe.signed_rank import comparison_table
from cenote.report.svg import clip_text

WIDTH, MARGIN, LABEL, LINE, NAME = 900.0, 250.0, 22.0, 9.0, 36
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#1f2933}line,polyline{stroke:#1f2933;fill:none}"
    ".bar{stroke:#0b7285;stroke-width:4;stroke-linecap:round}.small{font-size:11px;fill:#52606d}"
    "@media(prefers-color-scheme:dark){text{fill:#e4e7eb}line,polyline{stroke:#e4e7eb}.bar{stroke:#3bc9db}"
    ".small{fill:#9aa5b1}}"
)


def mean_ranks(scores: pd.DataFrame) -> pd.Series:
    """Mean rank of each readout (columns) over data sets (rows), best first; 1 = highest score, ties share a mean."""
    return scores.rank(axis="columns", ascending=False, method="average").mean().sort_values(kind="stable")


def cliques(ranks: pd.Series, pairs: pd.DataFrame, alpha: float = 0.05) -> list[tuple[str, ...]]:
    """Largest runs of neighbouring ranks within which no pair differs significantly; single readouts are left out.

    Args:
        ranks: from :func:`mean_ranks`.
        pairs: from :func:`cenote.probe.signed_rank.comparison_table`.
        alpha: level of Holm's corrected p-values.
    """
    differ = {frozenset((row.first, row.second)) for row in pairs.itertuples(index=False) if float(row.p_holm) <= alpha}
    names = list(ranks.index)
    found: list[tuple[int, int]] = []
    for start in range(len(names)):
        stop = start + 1
        while stop < len(names) and all(frozenset((names[i], names[stop])) not in differ for i in range(start, stop)):
            stop += 1
        if stop - start > 1 and not any(stop <= other for _, other in found):
            found.append((start, stop))
    return [tuple(names[start:stop]) for start, stop in found]


def critical_difference(scores: pd.DataFrame, alpha: float = 0.05) -> str:
    """The diagram as an SVG document.

    Args:
        scores: data sets as rows, readouts as columns, higher is better.
        alpha: level of "differs".

    Raises:
        ValueError: as :func:`cenote.probe.signed_rank.comparison_table`.
    """
    pairs = comparison_table(scores, alpha)
    ranks = mean_ranks(scores)
    bars = cliques(ranks, pairs, alpha)
    reachable = bool((pairs["least_p"] * len(pairs) <= alpha).any())
    note = f"{len(scores)} data sets; bars join readouts that do not differ (Wilcoxon signed rank, Holm, {alpha:g})"
    if not reachable:
        note += "; so few data sets cannot show a difference between so many"
    return _draw(ranks, bars, note)


def _draw(ranks: pd.Series, bars: Sequence[tuple[str, ...]], note: str) -> str:
    count, half = len(ranks), (len(ranks) + 1) // 2
    axis = 44.0
    height = axis + 16 + LINE * len(bars) + LABEL * half + 34

    def x(rank: float) -> float:
        return MARGIN + (rank - 1) / max(1, count - 1) * (WIDTH - 2 * MARGIN)

    parts = [_line(x(1), axis, x(count), axis)]
    for tick in range(1, count + 1, max(1, count // 12)):
        parts.append(_line(x(tick), axis - 6, x(tick), axis))
        parts.append(_text(x(tick), axis - 11, str(tick), "middle"))
    parts.append(_text(WIDTH / 2, 14, "mean rank", "middle"))
    for number, bar in enumerate(bars):
        y = axis + 14 + LINE * number
        parts.append(_line(x(ranks[bar[0]]) - 4, y, x(ranks[bar[-1]]) + 4, y, "bar"))
    top = axis + 16 + LINE * len(bars)
    for place, (name, rank) in enumerate(ranks.items()):
        left = place < half
        y = top + LABEL * ((place if left else count - 1 - place) + 0.6)
        end = MARGIN - 12 if left else WIDTH - MARGIN + 12
        parts.append(f'<polyline points="{x(rank):.1f},{axis:.1f} {x(rank):.1f},{y:.1f} {end:.1f},{y:.1f}"/>')
        label = clip_text(str(name), NAME)
        parts.append(_text(end + (-6 if left else 6), y + 4, f"{label}  {rank:.2f}", "end" if left else "start"))
    parts.append(_text(WIDTH / 2, height - 8, note, "middle", "small"))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH:.0f} {height:.0f}" role="img" '
        f'aria-label="critical-difference diagram"><style>{STYLE}</style>{"".join(parts)}</svg>\n'
    )


def _line(x1: float, y1: float, x2: float, y2: float, css: str = "axis") -> str:
    return f'<line class="{css}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, text: str, anchor: str, css: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{css}">{escape(text)}</text>'
