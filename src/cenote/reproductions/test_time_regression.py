"""Test-time regression: sequence layers as regressors fitted to the past."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from cenote.reproductions.base import Finding, Reproduction, Settings, finding
from cenote.reproductions.test_time_regression_exact import exact_findings
from cenote.reproductions.test_time_regression_recall import CURVE, convolution_findings, curve_findings
from cenote.reproductions.test_time_regression_scaling import scaling_findings
from cenote.reproductions.test_time_regression_worlds import recall_errors, smooth_map_errors, uneven_key_errors

CLAIM = (
    "Linear attention forgets that keys are correlated, layers that solve the least squares do not; local linear "
    "attention is ahead of softmax attention; one layer with a short convolution solves associative recall."
)
TRIAL = {
    "linear": {0.0: 0.11, 0.9: 0.46, 0.99: 0.87},
    "delta": {0.0: 0.0003, 0.9: 0.17, 0.99: 0.77},
    "ridge": {0.0: 0.0, 0.9: 0.0, 0.99: 0.0},
}
"""Relative error of recall that the specification's own check found, by rule and correlation of the keys."""
CORRELATION = "Relative error of recall with keys of correlation"


def run(settings: Settings) -> list[Finding]:
    settings.progress("correlated keys, smooth maps, uneven keys")
    found = [*correlation_findings(settings.seeds), *local_findings(settings.seeds)]
    found += convolution_findings(settings)
    found += curve_findings(settings)
    settings.progress("exact properties and costs")
    return [*found, *exact_findings(), *scaling_findings()]


def correlation_findings(seeds: Sequence[int]) -> list[Finding]:
    """Linear attention, the delta rule and ridge regression on keys along an AR(1) process."""
    found = []
    for rho in TRIAL["linear"]:
        runs = [recall_errors(rho, seed) for seed in seeds]
        for rule, trial in TRIAL.items():
            wanted = trial[rho]
            # A tenth of the range of errors, or for those that are small a factor.
            least, most = (0.0, 1e-3) if wanted < 0.01 else (wanted - 0.1, wanted + 0.1)
            found.append(
                finding(
                    f"{CORRELATION} {rho:g}, {rule}.",
                    f"at most {most:g}" if wanted < 0.01 else f"within 0.1 of {wanted:g}",
                    [run[rule] for run in runs],
                    _between(least, most),
                    paper=f"specification's trial {'below 0.001' if wanted == 0 else f'{wanted:g}'}",
                    unit="squared error / squared value",
                    note="128 unit keys of width 16, linear attention at its best scale." if rule == "linear" else "",
                )
            )
    return found


def _between(least: float, most: float) -> Callable[[float], bool]:
    return lambda v: least <= v <= most


def local_findings(seeds: Sequence[int]) -> list[Finding]:
    """Local linear against local constant, and what keys of uneven length do to the raw kernel."""
    found = []
    for points, trial in ((64, 0.087 / 0.24), (1024, 0.024 / 0.14)):
        runs = [smooth_map_errors(points, seed) for seed in seeds]
        found.append(
            finding(
                f"The error of local linear regression over that of local constant, {points} points in the plane.",
                "at most 0.5",
                [run["local linear"] / run["local constant"] for run in runs],
                lambda v: v <= 0.5,
                paper=f"specification's trial {trial:.2f}",
                unit="ratio of errors",
                note="Each at its best scale; the specification does not name the smooth map of its trial.",
            )
        )
    runs = [uneven_key_errors(seed) for seed in seeds]
    found.append(
        finding(
            "The error with normalised keys over that with keys of uneven length (log-normal, 0.6).",
            "below 1",
            [run["normalised keys"] / run["raw keys"] for run in runs],
            lambda v: v < 1,
            paper=f"specification's trial {0.039 / 0.136:.2f}",
            unit="ratio of errors",
            note="The kernel exp(s q.k) at its best scale s for each.",
        )
    )
    return found


def draw(findings: list[Finding], path: Path) -> None:
    """Recall by number of pairs for each rule, and the error of recall by the correlation of the keys.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("drawing needs matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    curves = {}
    for each in findings:
        if CURVE in each.note:
            named = re.search(r"width \d+, (\w+(?: attention)?) recalls", each.claim)
            points = re.findall(r"(\d+) (\d\.\d+)", each.note.partition(CURVE)[2].partition(". ")[0])
            curves[named[1] if named else each.claim] = [(int(n), float(share)) for n, share in points]
    for number, (rule, points) in enumerate(curves.items()):
        style = {"marker": "osD^vP"[number % 6], "linestyle": ("-", "--", ":")[number // 10 % 3], "alpha": 0.8}
        left.plot(*zip(*points, strict=True), label=rule.replace("_", " "), color=f"C{number % 10}", **style)
    left.set(xlabel="key-value pairs (keys 16 wide)", ylabel="share of the answers", ylim=(0, 1.03), xscale="log")
    sizes = sorted({n for points in curves.values() for n, _ in points})
    left.set_xticks(sizes, [str(n) for n in sizes], minor=False)
    left.minorticks_off()
    left.legend(fontsize="x-small", ncols=2)
    for rule in TRIAL:
        own = [f for f in findings if f.claim.startswith(CORRELATION) and f.claim.endswith(f", {rule}.")]
        right.plot(range(len(own)), [max(f.measured, 1e-9) for f in own], marker="o", label=rule)
    right.set_xticks(range(len(TRIAL["linear"])), [f"{rho:g}" for rho in TRIAL["linear"]])
    right.set(xlabel="correlation of successive keys", ylabel="relative squared error of recall", yscale="log")
    right.legend(fontsize="small")
    figure.savefig(path, dpi=150)


REPRODUCTION = Reproduction("test-time-regression", CLAIM, run, draw)
