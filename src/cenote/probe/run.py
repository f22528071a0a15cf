"""The main job: every readout on a frozen backbone, compared on equal terms."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cenote.backbones import load_backbone
from cenote.backbones.base import Backbone
from cenote.data import load_data
from cenote.data.base import Data
from cenote.data.judged import JudgedData
from cenote.probe.display import Display, Quiet, display_totals
from cenote.probe.engine import Engine, connect
from cenote.probe.extract import extract
from cenote.probe.feed import Feed
from cenote.probe.fits import fit_free
from cenote.probe.open_set import Parts, judge
from cenote.probe.open_set_data import OpenSet
from cenote.probe.outcome import Outcome
from cenote.probe.parallel import side_by_side
from cenote.probe.plan import (
    EXTRAS,
    GROUPS,
    Candidate,
    Host,
    group,
    plan,
    reads_embeddings,
    reads_stack,
    split_specs,
)
from cenote.probe.result import ProbeResult
from cenote.probe.rows import assemble
from cenote.probe.settings import backbone_settings, grid_settings
from cenote.probe.tasks import Objective, to_device_targets
from cenote.probe.train import Group, Schedule, train_groups
from cenote.probe.write import Folder
from cenote.types import JUDGED_TASKS, resolve_layers


def probe(
    backbone: str | Backbone = "embedded",
    data: str | Data | JudgedData = "digits",
    readouts: str | Sequence[str] = "all",
    *,
    layers: str | int | Sequence[int] = "last",
    tokens: str | Sequence[str] = "auto",
    task: str | None = None,
    open_set: str | Sequence[Any] | Data | None = None,
    lrs: Sequence[float] | None = None,
    query_factors: Sequence[float] | None = None,
    seeds: int = 3,
    epochs: int | None = None,
    batch_size: int | None = None,
    optimizer: str = "adamw",
    weight_decay: float = 0.0,
    patience: int | None = None,
    budget: float | None = None,
    views: int = 0,
    augment: Callable[[Any, int], Any] | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    cache_dir: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    memory: int = 2**30,
    engine: str = "local",
    ray_address: str | None = None,
    display: Display | None = None,
    backbone_options: dict[str, Any] | None = None,
    data_options: dict[str, Any] | None = None,
    judged_options: dict[str, Any] | None = None,
) -> ProbeResult:
    """Compare readouts of a frozen backbone on a labelled data set.

    One pass over the backbone fills the feature store; all readouts x learning rates x seeds are then trained together
    from it. Readouts without parameters get a converged linear model. Learning rates are chosen on the validation
    part; the test part is looked at once.

    Args:
        backbone: a spec for :func:`cenote.backbones.load_backbone`, or a backbone.
        data: a spec for :func:`cenote.data.load_data`, or data.
        readouts: ``"all"``, ``"last"`` (one layer only), ``"free"`` (no parameters), or names and compositions.
        layers: hidden states compared by one-layer readouts; ``"last"``, ``"all"``, ``"3,4"``. Readouts of several
            layers read these, or all blocks when only one is named.
        tokens: ``"auto"`` (patches for images, all tokens for text) or any of class, patches, both.
        task: overrides the task inferred from the targets; ``"verification"``, ``"similarity"``, ``"retrieval"`` and
            ``"clustering"`` go to :func:`cenote.probe.judged.probe_judged`, as judged data does.
        open_set: classes to hold out (``"3,7"``, ``["cat", "dog"]``) or a second data set, whose items no class fits:
            every readout with a linear head is also judged by how it rejects them, see :mod:`cenote.probe.open_set`.
        lrs, query_factors: learning rates and factors on the learned queries' rate, in place of each readout's own
            grid.
        seeds: initialisations a configuration; the batch order is shared.
        epochs: passes over the training part; by default enough for about 500 steps, between 8 and 60.
        batch_size: items a step; by default 32 to 256 by the size of the training part.
        optimizer: ``adamw``, ``sgd`` or ``lars``.
        patience: stop a readout after so many epochs without a better validation score.
        budget: minutes after which training stops and the table is made from the best states so far.
        views: cached augmented views of the training part, taking turns by epoch (0: none); needs ``augment``.
        augment: ``augment(item, seed)`` gives another view of a raw item.
        out: folder for ``results.json``, ``results.parquet``, ``report.html`` and ``best/``.
        resume: go on with an interrupted run in ``out``.
        cache_dir: where features are kept.
        dtype: of stored features.
        device: where readouts are trained.
        memory: bytes of features held in RAM for each part.
        engine: ``"local"``, or ``"ray"``: extraction, fits and training on a Ray cluster, with the same numbers; see
            :mod:`cenote.integrations.ray`.
        judged_options: further keywords of :func:`cenote.probe.judged.probe_judged`.
        ray_address: of the cluster; by default one is started on this machine where none is known.

    Raises:
        ValueError: unknown names (nearest suggested), a readout that the backbone cannot feed, a results folder that
            belongs to another configuration, features that are not finite (the item is named).
    """
    if task in JUDGED_TASKS or isinstance(data, JudgedData):
        from cenote.probe.judged import probe_judged

        if open_set is not None or views or augment is not None or engine != "local":
            raise ValueError("judged tasks know no open_set, views, augment or other engine than 'local'")
        return probe_judged(
            backbone, data, readouts, task=task, layers=layers, tokens=tokens, lrs=lrs, query_factors=query_factors,
            seeds=seeds, epochs=epochs, batch_size=batch_size, optimizer=optimizer, weight_decay=weight_decay,
            patience=patience, budget=budget, out=out, resume=resume, cache_dir=cache_dir, dtype=dtype, device=device,
            memory=memory, display=display, backbone_options=backbone_options, data_options=data_options,
            **(judged_options or {}),
        )  # fmt: skip
    if judged_options:
        raise ValueError(f"judged_options belong to {', '.join(JUDGED_TASKS)}, not to task {task or 'auto'}")
    begin = time.monotonic()
    display = display or Quiet()
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {seeds}")
    if views and augment is None:
        raise ValueError("views needs augment, a function from (item, seed) to another view of the item")
    loading = {"device": device, **(backbone_options or {})}
    source = (backbone, loading) if isinstance(backbone, str) else None
    if isinstance(backbone, str):
        backbone = load_backbone(backbone, **loading)
    if isinstance(data, str):
        options: dict[str, Any] = {**({"task": task} if task else {}), **(data_options or {})}
        data = load_data(data, **options)
    if backbone.modality != data.modality:
        raise ValueError(f"backbone {backbone.spec} takes {backbone.modality}s, but {data.name} holds {data.modality}s")
    opened = None if open_set is None else OpenSet.of(open_set, data, data_options)
    if opened is not None:
        data = opened.known
    cluster = connect(engine, ray_address, device, memory)

    wanted = resolve_layers(layers, backbone.num_layers)
    stored = stored_layers(readouts, wanted, backbone)
    schedule = Schedule.sized(
        len(data.train), epochs, batch_size, patience=patience, optimizer=optimizer, weight_decay=weight_decay
    )
    parts = {"train": data.train, "validation": data.validation, "test": data.test}
    settings: dict[str, Any] = {
        **backbone_settings(backbone, backbone_options),
        "data": data.name,
        "data_fingerprint": {name: split.fingerprint for name, split in parts.items()},
        "items": {name: len(split) for name, split in parts.items()},
        "task": data.task,
        **grid_settings(readouts, wanted, stored, tokens, lrs, query_factors, seeds, dtype),
        "epochs": schedule.epochs,
        "batch_size": schedule.batch_size,
        "optimizer": optimizer,
        "weight_decay": weight_decay,
        "patience": patience,
        "views": views,
        "open_set": None if opened is None else opened.settings,
    }
    folder = Folder(Path(out), settings, resume) if out is not None else None

    stores = {}
    jobs = [
        ("train", data.train, 0),
        *[("train", data.train, view) for view in range(1, views + 1)],
        ("validation", data.validation, 0),
        ("test", data.test, 0),
        *[(part, split, 0) for part, split in (opened.parts if opened else ())],
    ]
    for part, split, view in jobs:
        display.stage(f"extract {part}" + (f" (view {view})" if view else ""), len(split))
        stores[part, view] = extract(
            backbone, split, layers=stored, cache_dir=cache_dir, dtype=dtype, on_batch=display_totals(display),
            view=view, augment=augment if view else None,
            elsewhere=None if cluster is None else cluster.extraction(source),
        )  # fmt: skip

    first = stores["train", 0]
    uniform = (
        all(store.uniform for store in stores.values())
        and len({int(store.counts[0]) for store in stores.values()}) == 1
    )
    host = Host(first.dim, tuple(first.layers), first.grid, first.prefix, data.modality, uniform)
    candidates = plan(readouts, host, backbone.num_layers, wanted, tokens, seeds, lrs, query_factors)
    objective = Objective.of(data.task, len(data.classes), data.train.targets)

    def feed(part: str, split: Any, view: int = 0) -> Feed:
        return Feed(
            stores[part, view], to_device_targets(split.targets, data.task), tuple(first.layers), memory, device
        )

    train, validation, test = feed("train", data.train), feed("validation", data.validation), feed("test", data.test)
    turns = [feed("train", data.train, view) for view in range(1, views + 1)] or [train]
    deadline = math.inf if budget is None else begin + 60 * budget
    notes = [f"{len(data.skipped)} items could not be read and were left out"] if data.skipped else []

    def stop() -> bool:
        return time.monotonic() > deadline

    learned = [c for c in candidates if c.members]
    free = [c for c in candidates if not c.members]
    names = split_specs(readouts)
    outcomes: list[Outcome] = []
    groups: list[Group] = []
    complete = interrupted = False
    try:
        outcomes += _fit_free(free, names, (train, validation, test), objective, host, display, stop, cluster)
        groups = [Group.create(c, host.dim, objective, schedule, uniform) for c in learned]
        complete = _train(groups, turns, validation, schedule, folder, display, stop, cluster, deadline)
        if not complete and groups:
            notes.append("the time budget ended training early; unfinished readouts are marked partial")
    except KeyboardInterrupt:
        interrupted = True
        notes.append("interrupted; unfinished readouts are marked partial, --resume goes on from here")
        display.say("interrupted: writing what there is")
    trained = [group for group in groups if np.isfinite(group.best_score).any()]
    with side_by_side(len(trained)) as every:
        outcomes += every(lambda group: group.outcome(test, complete), trained)
    if not outcomes:
        raise KeyboardInterrupt
    result = assemble(outcomes, data, test, objective, host, settings, notes, backbone)
    result = dataclasses.replace(result, interrupted=interrupted)
    if opened is not None:
        display.say("judging every readout on unknown items")
        unknowns = [feed(part, split) for part, split in opened.parts]
        result = judge(result, outcomes, Parts(train, validation, test, *unknowns), uniform, opened.note)
    if folder is not None:
        result = folder.write(result, outcomes, backbone, host, objective)
    return result


def stored_layers(readouts: str | Sequence[str], wanted: tuple[int, ...], backbone: Backbone) -> tuple[int, ...]:
    """The hidden states to extract: those asked for, and every block where a readout of several layers has only one."""
    named = not (isinstance(readouts, str) and readouts in GROUPS)
    specs = [s for s in split_specs(readouts) if s not in EXTRAS] if named else group(str(readouts), backbone.modality)
    stack = [spec for spec in specs if reads_stack(spec)] if readouts != "free" else []
    if not stack or len(set(wanted)) > 1:
        return tuple(sorted(set(wanted)))
    first = 0 if any(map(reads_embeddings, stack)) else 1
    return tuple(sorted({*wanted, *range(first, backbone.num_layers + 1)}))


def _train(
    groups: Sequence[Group],
    turns: Sequence[Feed],
    validation: Feed,
    schedule: Schedule,
    folder: Folder | None,
    display: Display,
    stop: Callable[[], bool],
    cluster: Engine | None,
    deadline: float,
) -> bool:
    """Train all groups together; whether they ran their schedule."""
    if not groups:
        return True
    checkpoint = None if folder is None else folder.checkpoint
    if cluster is not None:
        display.stage(f"train {len(groups)} readouts on the cluster", len(groups))
        return cluster.train(groups, turns, validation, checkpoint, deadline, lambda group: display.advance(1))
    if folder is not None and folder.resuming:
        restored = sum(group.restore(folder.checkpoint) for group in groups)
        display.say(f"resuming: {restored} of {len(groups)} readouts restored")
    members = sum(len(g.stack.members) for g in groups)
    display.stage(f"train {len(groups)} readouts, {members} heads", schedule.epochs)
    start = min(g.epoch for g in groups)
    display.advance(start)

    def on_epoch(active: Sequence[Group], epoch: int) -> None:
        top = max(active, key=lambda g: g.best_score.max())
        display.advance(1, f"best so far {top.best_score.max():.3f} {top.candidate.readout}")

    return train_groups(groups, turns, validation, schedule, folder=checkpoint, stop=stop, on_epoch=on_epoch)


def _fit_free(
    free: Sequence[Candidate],
    names: Sequence[str],
    feeds: tuple[Feed, Feed, Feed],
    objective: Objective,
    host: Host,
    display: Display,
    stop: Callable[[], bool],
    cluster: Engine | None,
) -> list[Outcome]:
    """Linear models for readouts without parameters, and the rows that are no poolings."""
    everything = len(names) == 1 and names[0] in GROUPS
    extras = [n for n in EXTRAS if everything or n in names]
    if not free and not extras:
        return []
    display.stage("fit linear models", len(free) + len(extras))
    jobs: list[Candidate | str] = [*free, *extras]
    found = []
    with side_by_side(len(jobs)) as every:
        if cluster is not None:
            fits = cluster.fit_free(jobs, feeds, objective, host, stop)
        else:
            fits = every(lambda job: None if stop() else fit_free(job, *feeds, objective, host), jobs)
        for outcome in fits:
            display.advance(1)
            if outcome is not None:
                found.append(outcome)
    return found
