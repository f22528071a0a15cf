"""The main job on judged tasks: which readout's vectors are compared best (verification, similarity, retrieval,
clustering)."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from cenote.backbones import load_backbone
from cenote.backbones.base import Backbone
from cenote.data.base import Data
from cenote.data.judged import JudgedData, Labels
from cenote.data.judged_load import load_judged
from cenote.probe.display import Display, Quiet, display_totals
from cenote.probe.extract import extract
from cenote.probe.feed import Feed
from cenote.probe.judged_files import Finished, write_judged
from cenote.probe.judged_rows import assemble_judged
from cenote.probe.judged_run import JudgedRun
from cenote.probe.judged_scores import judge_of
from cenote.probe.judged_training import CONTRASTIVE_LRS, Loss
from cenote.probe.plan import GROUPS, Candidate, Host, plan, split_specs
from cenote.probe.result import ProbeResult
from cenote.probe.run import stored_layers
from cenote.probe.search import Index
from cenote.probe.settings import backbone_settings, grid_settings, listed
from cenote.probe.train import Schedule
from cenote.probe.write import Folder
from cenote.types import resolve_layers

if TYPE_CHECKING:
    from cenote.tuning.embedding import ContrastiveSettings

Normalise = Literal["auto", "none", "standardise"]


def probe_judged(
    backbone: str | Backbone,
    data: str | JudgedData | Data,
    readouts: str | Sequence[str] = "all",
    *,
    task: str | None = None,
    layers: str | int | Sequence[int] = "last",
    tokens: str | Sequence[str] = "auto",
    lrs: Sequence[float] | None = None,
    query_factors: Sequence[float] | None = None,
    seeds: int = 3,
    epochs: int | None = None,
    batch_size: int | None = None,
    optimizer: str = "adamw",
    weight_decay: float = 0.0,
    patience: int | None = None,
    budget: float | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    cache_dir: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    memory: int = 2**30,
    display: Display | None = None,
    backbone_options: dict[str, Any] | None = None,
    data_options: dict[str, Any] | None = None,
    normalise: Normalise = "auto",
    loss: Loss = "auto",
    contrastive: ContrastiveSettings | None = None,
    p_target: float = 0.01,
    index: Index = "auto",
) -> ProbeResult:
    """Compare readouts of a frozen backbone by the cosines of their vectors.

    One pass over the backbone fills the feature store with every item once. Readouts without parameters are judged as
    they are. The others are trained on the training part: for verification and clustering behind a head that tells
    its labels apart and is then dropped, all together as :func:`cenote.probe.probe` trains; for similarity and
    retrieval contrastively, one by one (:func:`cenote.tuning.embedding.train_embedding`). Without a training part they
    are left out, and a note names them. Settings are chosen on the validation part: by the score below, except where it
    holds labels of the classes trained on; then by the accuracy of the head, and a note says so. The test part is
    looked at once.

    Score (higher is better) and further figures in :attr:`~cenote.probe.result.Row.extra`:

    * verification: 1 - equal error rate; ``eer``, ``min_dcf`` at ``p_target`` with its ``dcf_threshold``.
    * similarity: Spearman's correlation; ``pearson``.
    * retrieval: nDCG@10; ``recall@10``, ``recall@100``, ``mrr@10``.
    * clustering: V-measure of k-means with as many clusters as classes; ``homogeneity``, ``completeness``,
      ``clusters``.

    Intervals and tie groups come from a bootstrap over pairs, queries or items, and seeds.

    Args:
        backbone, readouts, layers, tokens, query_factors, seeds, epochs, batch_size, optimizer, weight_decay, patience,
            budget, out, resume, cache_dir, dtype, device, memory, display, backbone_options: as for
            :func:`cenote.probe.probe`.
        data: a spec for :func:`cenote.data.judged_load.load_judged`, or judged data.
        task: needed with a spec.
        lrs: learning rates; by default each readout's own for labels, 0.001 and 0.01 for contrastive training.
        data_options: further keywords of ``load_judged``.
        normalise: ``"standardise"`` shifts and scales vectors to mean 0 and variance 1 over the training part before
            cosines are taken (for trained readouts by the batch norm in front of their head); ``"none"`` leaves them;
            ``"auto"`` standardises where there are training labels.
        loss: for labels: ``"margin"`` (additive angular margin 0.2, scale 30: the default for verification) or
            ``"cross_entropy"`` (for clustering).
        contrastive: settings of the contrastive training; its ``lr`` and ``seed`` are set by the grid.
        p_target: prior of a same-source trial in the minimum detection cost.
        index: how documents are searched, see :mod:`cenote.probe.search`.

    Raises:
        ValueError: as for :func:`cenote.probe.probe`; options that do not fit the task.
    """
    begin = time.monotonic()
    display = display or Quiet()
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {seeds}")
    if normalise not in ("auto", "none", "standardise"):
        raise ValueError(f"normalise must be 'auto', 'none' or 'standardise', got {normalise!r}")
    if loss not in ("auto", "margin", "cross_entropy"):
        raise ValueError(f"loss must be 'auto', 'margin' or 'cross_entropy', got {loss!r}")
    if isinstance(backbone, str):
        backbone = load_backbone(backbone, **{"device": device, **(backbone_options or {})})
    if isinstance(data, str):
        if task is None:
            raise ValueError("judged data is named by a task and a place: give task= as well")
        data = load_judged(data, task, **(data_options or {}))
    if not isinstance(data, JudgedData):
        raise TypeError(f"task {task!r} needs judged data, from load_judged, and {data.name} is labelled data")
    if task is not None and data.task != task:
        raise ValueError(f"{data.name} was loaded for {data.task}, not for {task}")
    if backbone.modality != data.modality:
        raise ValueError(f"backbone {backbone.spec} takes {backbone.modality}s, but {data.name} holds {data.modality}s")
    labels = data.train if isinstance(data.train, Labels) else None
    if normalise == "standardise" and labels is None:
        raise ValueError("normalise='standardise' takes its statistics from training labels, and there are none")
    standardise = labels is not None and normalise != "none"
    loss = ("margin" if data.task == "verification" else "cross_entropy") if loss == "auto" else loss
    judge = judge_of(data.task, data.test, p_target=p_target, index=index)

    wanted = resolve_layers(layers, backbone.num_layers)
    stored = stored_layers(readouts, wanted, backbone)
    schedule = None if labels is None else Schedule.sized(
        len(labels.items), epochs, batch_size, patience=patience, optimizer=optimizer, weight_decay=weight_decay
    )  # fmt: skip
    options = data_options or {}
    settings: dict[str, Any] = {
        **backbone_settings(backbone, backbone_options),
        "data": data.name,
        "data_fingerprint": {"items": data.fingerprint, "judgements": _digest(data)},
        "items": {"all": len(data), **{name: _size(part) for name, part in _parts(data)}},
        "task": data.task,
        "train_on": None if options.get("train_on") is None else str(options["train_on"]),
        "query_prompt": options.get("query_prompt", ""),
        "document_prompt": options.get("document_prompt", ""),
        **grid_settings(readouts, wanted, stored, tokens, lrs, query_factors, seeds, dtype),
        "normalise": "standardise" if standardise else "none",
    }
    if schedule is not None:
        settings |= {
            "loss": loss, "epochs": schedule.epochs, "batch_size": schedule.batch_size, "optimizer": optimizer,
            "weight_decay": weight_decay, "patience": patience,
            "chosen_by": "accuracy" if data.chosen_by_labels else judge.metric,
        }  # fmt: skip
    if data.task == "verification":
        settings["p_target"] = p_target
    if data.task == "retrieval":
        settings["index"] = index
    if data.train is not None and labels is None:
        contrastive = _contrastive(contrastive, batch_size)
        chosen = dataclasses.asdict(contrastive)
        settings["contrastive"] = {key: listed(v) if isinstance(v, tuple) else v for key, v in chosen.items()}
    names = split_specs(readouts)
    if "knn" in names:
        raise ValueError(f"knn names classes, so {data.task} cannot judge it")
    grid = (readouts, backbone.num_layers, wanted, tokens, seeds, lrs, query_factors)
    if data.train is None and "encoder_pooler" not in names:
        _refuse_untrained(data, Host(backbone.dim, stored, backbone.grid, backbone.prefix, data.modality, True), *grid)
    folder = Folder(Path(out), settings, resume) if out is not None else None

    display.stage("extract", len(data))
    store = extract(backbone, data, layers=stored, cache_dir=cache_dir, dtype=dtype, on_batch=display_totals(display))
    host = Host(store.dim, tuple(store.layers), store.grid, store.prefix, data.modality, store.uniform)
    everything = len(names) == 1 and names[0] in GROUPS
    candidates = plan(readouts, host, *grid[1:])
    feed = Feed(store, torch.zeros(len(store), dtype=torch.int64), tuple(store.layers), memory, device)
    learned = [c for c in candidates if c.members]
    jobs: list[Candidate | None] = [c for c in candidates if not c.members]
    if store.pooled_dim and (everything or "encoder_pooler" in names):
        jobs.append(None)
    elif "encoder_pooler" in names:
        raise ValueError(f"{backbone.spec} has no pooled output of its own: leave out encoder_pooler")
    if learned and not jobs and data.train is None:
        raise ValueError(_untrained(data))
    notes = _notes(data, learned, judge.metric)
    interrupted = False
    deadline = math.inf if budget is None else begin + 60 * budget

    def stop() -> bool:
        return time.monotonic() > deadline

    run = JudgedRun(
        data, feed, host, judge, display, stop, Finished(folder.checkpoint if folder else None, resume), standardise
    )
    outcomes = run.outcomes
    try:
        run.judge_free(jobs)
        if labels is not None and learned:
            assert schedule is not None
            run.train_labelled(learned, schedule, loss, folder)
        elif contrastive is not None and learned:
            run.train_contrastive(learned, contrastive, CONTRASTIVE_LRS if lrs is None else lrs, seeds)
    except KeyboardInterrupt:
        interrupted = True
        notes.append("interrupted: the table holds what there was, --resume goes on from here")
        display.say("interrupted: writing what there is")
    if run.left_out:
        notes.append(f"the run ended before {', '.join(run.left_out)} (time budget): not in the table")
    if any(outcome.status == "partial" for outcome in outcomes):
        notes.append("the run ended training early; unfinished readouts are marked partial")
    if not outcomes:
        raise KeyboardInterrupt
    result = assemble_judged(outcomes, data, feed, judge, host, settings, notes, backbone)
    result = dataclasses.replace(result, interrupted=interrupted)
    return result if folder is None else write_judged(folder, result, outcomes, backbone, host)


def _refuse_untrained(data: JudgedData, host: Host, readouts: str | Sequence[str], *grid: Any) -> None:
    """Raise ``ValueError`` where every readout has to be trained, as far as the backbone tells before extraction."""
    try:
        candidates = plan(readouts, host, *grid)
    except ValueError:
        return  # what does not fit the features is said by them
    if candidates and all(candidate.members for candidate in candidates):
        raise ValueError(_untrained(data))


def _untrained(data: JudgedData) -> str:
    return "; ".join((f"{data.name} has no training part, and every readout asked for has to be trained", *data.notes))


def _notes(data: JudgedData, learned: Sequence[Candidate], metric: str) -> list[str]:
    """What a reader must know of how the data was used."""
    notes = list(data.notes)
    if data.skipped:
        first = data.skipped[0]
        notes.append(f"{len(data.skipped)} items were left out; the first: {first.id}: {first.reason}")
    names = ", ".join(candidate.readout for candidate in learned)
    if learned and data.train is None:
        notes.append(f"there is no training part, so readouts with parameters are not in the table: {names}")
    elif learned and data.chosen_by_labels:
        notes.append(
            f"learning rates and epochs were chosen by the accuracy on validation items of the classes trained on, "
            f"not by {metric}"
        )
    elif learned and isinstance(data.train, Labels):
        notes.append(f"learning rates and epochs were chosen by {metric} on validation items of other classes")
    elif learned:
        notes.append(
            "trained readouts start from random weights on a frozen encoder; one that was itself trained contrastively "
            "behind a pooling (sentence encoders usually behind the mean) favours that pooling"
        )
    if isinstance(data.train, Labels) and isinstance(data.test, Labels):
        shared = set(data.train.names) & set(data.test.names)
        if shared:
            notes.append(f"{len(shared)} of {len(data.test.names)} test classes also occur in the training part")
    return notes


def _contrastive(settings: ContrastiveSettings | None, batch_size: int | None) -> ContrastiveSettings:
    from cenote.tuning.embedding import ContrastiveSettings

    settings = settings or ContrastiveSettings()
    return settings if batch_size is None else dataclasses.replace(settings, batch_size=batch_size)


def _parts(data: JudgedData) -> list[tuple[str, Any]]:
    return [("train", data.train), ("validation", data.validation), ("test", data.test)]


def _size(part: Any) -> int:
    """Pairs, queries or labelled items."""
    return 0 if part is None else len(getattr(part, "queries", getattr(part, "label", getattr(part, "first", ()))))


def _digest(data: JudgedData) -> str:
    """Of all judgements: another split or another list of trials is another configuration."""
    digest = hashlib.sha256()
    for name, part in _parts(data):
        digest.update(name.encode())
        for value in () if part is None else vars(part).values():
            content = np.ascontiguousarray(value).tobytes() if isinstance(value, np.ndarray) else repr(value).encode()
            digest.update(content)
    return digest.hexdigest()
