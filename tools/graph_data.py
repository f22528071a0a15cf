"""Ten-fold tables on TU graph sets: python tools/graph_data.py [NAME...]

writes benchmarks/results/real_data/tu_graphs/. GCN and GIN with six readouts, all trained alike; finished folds are
kept under runs/tu_graphs, so that the same call goes on after an interruption. The archives are looked for below
tu_graphs in CENOTE_DATA.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from cenote.files import write_all
from cenote.reproductions.histograph_peers import GraphMultiset, JumpingKnowledgeCat, SetTransformer
from cenote.tuning.gnn import GNNSettings
from cenote.tuning.gnn_folds import CrossValidation, cross_validate

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("CENOTE_DATA", ROOT.parent / "shared" / "data"))
KINDS = ("gcn", "gin")


@dataclass(frozen=True)
class GraphSet:
    """One column of the table.

    Attributes:
        folds: how many of the ten folds are run.
        settings: of network and training.
        majority, forest: share of the larger class; a random forest on node classes, size and degrees (ten folds).
        paper: what the paper reports for HistoGraph, where known.
    """

    folds: int
    settings: GNNSettings
    majority: str
    forest: str
    paper: str = "not known"


def _settings(epochs: int, batch_size: int) -> GNNSettings:
    return GNNSettings(hidden=32, layers=4, epochs=epochs, batch_size=batch_size, lr=3e-3)


SETS = {
    "MUTAG": GraphSet(10, _settings(50, 32), "66.5", "87.2 ± 7.2"),
    "PROTEINS": GraphSet(10, _settings(12, 64), "59.6", "75.7 ± 3.9", "about 97 (implausible: others at most 80)"),
    "NCI1": GraphSet(2, _settings(12, 128), "50.0", "74.6 ± 2.5"),
}
READOUTS: dict[str, tuple[str | Callable[[int, int], Any], bool]] = {  # name: readout, on a frozen network
    "mean": ("mean", False),
    "JumpingKnowledge-cat + mean": (JumpingKnowledgeCat, False),
    "HistoGraph": ("histograph", False),
    "HistoGraph, frozen network": ("histograph", True),
    "GraphMultisetTransformer": (GraphMultiset, False),
    "SetTransformer": (SetTransformer, False),
}


def run(name: str, chosen: GraphSet, folder: Path) -> dict[tuple[str, str], CrossValidation]:
    """All networks and readouts on one set."""
    results = {}
    for kind in KINDS:
        for label, (readout, frozen) in READOUTS.items():
            file = folder / f"{name}-{kind}-{label.lower().replace(' ', '_').replace(',', '')}.json"
            results[kind, label] = cross_validate(
                kind, str(DATA / "tu_graphs" / f"{name}.npz"), readout, chosen.settings,
                folds=range(chosen.folds), frozen=frozen, path=file, progress=lambda line: print(line, flush=True),
            )  # fmt: skip
    return results


def page(tables: dict[str, dict[tuple[str, str], CrossValidation]]) -> str:
    """All sets in Markdown."""
    names = list(tables)
    lines = [
        "# TU graph sets", "",
        "Test accuracy in per cent, mean ± standard deviation over folds. Fold k is the test part, fold k + 1 chooses "
        "the epoch, the rest trains. Networks and readouts are trained end to end unless frozen; a frozen network was "
        "trained with the mean readout first, so that row had twice the epochs. "
        "Width 32, 4 layers, batch norm, Adam at 0.003, gradients clipped to "
        "norm 1: the same for every readout, none of it tuned. "
        + " ".join(f"{n}: {SETS[n].settings.epochs} epochs, {SETS[n].folds} of 10 folds." for n in names)
        + " So few epochs keep the whole table to minutes.", "",
        "| network | readout | " + " | ".join(names) + " |", "| --- | --- |" + " --- |" * len(names),
    ]  # fmt: skip
    for kind in KINDS:
        for label in READOUTS:
            cells = [tables[name][kind, label] for name in names]
            shown = " | ".join(f"{100 * c.mean:.1f} ± {100 * c.std:.1f}" for c in cells)
            lines.append(f"| {kind.upper()} | {label} | {shown} |")
    for label, field in (("largest class", "majority"), ("random forest on counts", "forest"), ("paper", "paper")):
        lines.append(f"| - | {label} | " + " | ".join(getattr(SETS[name], field) for name in names) + " |")
    lines += ["", *_words(tables), "", "Made by `python tools/graph_data.py " + " ".join(names) + "`.", ""]
    return "\n".join(lines)


def _words(tables: dict[str, dict[tuple[str, str], CrossValidation]]) -> list[str]:
    """HistoGraph against each other readout, fold by fold; and what its weights did."""
    lines = []
    for name, results in tables.items():
        for kind in KINDS:
            ours = results[kind, "HistoGraph"]
            gaps = []
            for label in READOUTS:
                if label == "HistoGraph":
                    continue
                theirs = results[kind, label].accuracies
                gap = pd.Series([100 * (a - b) for a, b in zip(ours.accuracies, theirs, strict=True)])
                error = gap.std() / len(gap) ** 0.5 if len(gap) > 1 else float("nan")
                gaps.append(f"{gap.mean():+.1f} ± {error:.1f} against {label}")
            frame = ours.frame()
            lines.append(
                f"- {name}, {kind.upper()}: HistoGraph " + ", ".join(gaps) + " (points, mean over folds ± its standard "
                f"error). Largest layer weight of a test graph {frame['largest_weight'].max():.3g}; the floor acted on "
                f"{100 * frame['floored'].mean():.2g} % of them."
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(SETS)} (default: all)")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "tu_graphs", help="where finished folds are kept")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "real_data" / "tu_graphs")
    options = parser.parse_args()
    unknown = sorted(set(options.names) - set(SETS))
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; known are {', '.join(SETS)}")
    tables = {}
    for name in options.names or SETS:
        if not (DATA / "tu_graphs" / f"{name}.npz").exists():
            print(f"{name}: skipped, it is not in {DATA / 'tu_graphs'} (CENOTE_DATA names the folder)")
            continue
        tables[name] = run(name, SETS[name], options.runs)
    if not tables:
        return
    rows = [
        {"set": name, "network": kind, "readout": label, **row}
        for name, results in tables.items()
        for (kind, label), result in results.items()
        for row in result.frame().to_dict("records")
    ]
    text = page(tables)
    write_all(options.results, {"folds.csv": pd.DataFrame(rows).to_csv(index=False), "README.md": text})
    print(text)


if __name__ == "__main__":
    main()
