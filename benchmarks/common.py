"""What every benchmark shares: interleaved timing, a table, and the JSON file."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch


def interleaved(
    calls: dict[str, Callable[[], Any]],
    repeats: int = 15,
    warmup: int = 3,
    before: Callable[[], Any] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of each call, taken in turn so that a drifting machine hits all alike.

    ``before`` runs in front of every call and is not timed: reading the input there leaves the caches alike for all.
    """
    cuda = torch.cuda.is_available()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(warmup + repeats):
        for name, call in calls.items():
            before()
            if cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            if cuda:
                torch.cuda.synchronize()
            if number >= warmup:
                times[name].append(time.perf_counter() - start)
    return times


def ratio(times: dict[str, list[float]], peer: str, ours: str) -> float:
    """Median over rounds of peer time / our time."""
    return statistics.median(p / o for p, o in zip(times[peer], times[ours], strict=True))


def finish(
    name: str, peer: str, goal: float, rows: Sequence[dict[str, Any]], value: float, doc: str | None = None
) -> None:
    """Print the rows and write ``--json FILE`` if asked: ``{"name", "peer", "ratio", "goal", "rows"}``."""
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--json", type=Path, help="write the result here")
    options, _ = parser.parse_known_args()
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, *[[_text(row.get(c)) for c in columns] for row in rows]]
    widths = [max(len(str(line[i])) for line in lines) for i in range(len(columns))]
    for line in lines:
        print("  ".join(str(cell).ljust(width) for cell, width in zip(line, widths, strict=True)))
    print(f"{name}: {value:.1f}x {peer} (goal {goal:g}x): {'met' if value >= goal else 'NOT met'}")
    if options.json:
        result = {"name": name, "peer": peer, "ratio": value, "goal": goal, "rows": list(rows)}
        options.json.write_text(json.dumps(result, indent=2) + "\n")


def _text(value: Any) -> str:
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)
