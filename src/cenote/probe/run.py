"""The main job: every readout on a frozen backbone, compared on equal terms."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cenote.backbones import load_backbone
from cenote.backbones.base import Backbone
from cenote.data import load_data
from cenote.data.base import Data
from cenote.probe.cost import attention_entropy, latency_ms, macs
from cenote.probe.display import Display, Quiet
from cenote.probe.extract import extract
from cenote.probe.feed import Feed
from cenote.probe.fits import Fitted, fit_free
from cenote.probe.plan import EXTRAS, Candidate, Host, plan, reads_stack, split_specs
from cenote.probe.result import Gallery, ProbeResult, Row
from cenote.probe.statistics import bootstrap_interval, tie_groups
from cenote.probe.tasks import Objective, to_device_targets
from cenote.probe.train import Group, Schedule, select_tokens, train_groups
from cenote.probe.write import Folder
from cenote.types import resolve_layers

GALLERY_ITEMS = 12
ENTROPY_ITEMS = 256


@dataclass
class Outcome:
    """A trained or fitted candidate before it becomes a row.

    Attributes:
        key: unique name.
        pooling, head: one trained model (the seed with the best validation score), in eval mode; ``head`` maps vectors to outputs.
        predictions: ``(seeds, items, outputs)`` on the test part.
    """

    key: str
    readout: str
    layers: tuple[int, ...]
    tokens: str
    candidate: Candidate | None
    pooling: nn.Module | None
    head: nn.Module | None
    predictions: np.ndarray
    validation: float
    params: int
    seconds: float
    lr: float | None = None
    query_factor: float | None = None
    regularisation: float | None = None
    epochs: float | None = None
    status: str = "done"
    extra: dict[str, Any] = field(default_factory=dict)


def probe(
    backbone: str | Backbone = "embedded",
    data: str | Data = "digits",
    readouts: str | Sequence[str] = "all",
    *,
    layers: str | int | Sequence[int] = "last",
    tokens: str | Sequence[str] = "auto",
    task: str | None = None,
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
    display: Display | None = None,
    backbone_options: dict[str, Any] | None = None,
    data_options: dict[str, Any] | None = None,
) -> ProbeResult:
    """Compare readouts of a frozen backbone on a labelled data set.

    One pass over the backbone fills the feature store; all readouts x learning rates x seeds are then trained together from it.
    Readouts without parameters get a converged linear model. Learning rates are chosen on the validation part; the test
    part is looked at once.

    Args:
        backbone: a spec for :func:`cenote.backbones.load_backbone`, or a backbone.
        data: a spec for :func:`cenote.data.load_data`, or data.
        readouts: ``"all"``, ``"last"`` (one layer only), ``"free"`` (no parameters), or names and compositions.
        layers: hidden states compared by one-layer readouts; ``"last"``, ``"all"``, ``"3,4"``. Readouts of several layers read
            these, or all blocks when only one is named.
        tokens: ``"auto"`` (patches for images, all tokens for text) or any of class, patches, both.
        task: overrides the task inferred from the targets.
        lrs, query_factors: learning rates and factors on the learned queries' rate, in place of each readout's own grid.
        seeds: initialisations a configuration; the batch order is shared.
        epochs: passes over the training part; by default enough for about 600 steps, between 8 and 60.
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

    Raises:
        ValueError: unknown names (nearest suggested), a readout that the backbone cannot feed, a results folder that
            belongs to another configuration, features that are not finite (the item is named).
    """
    begin = time.monotonic()
    display = display or Quiet()
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {seeds}")
    if views and augment is None:
        raise ValueError("views needs augment, a function from (item, seed) to another view of the item")
    if isinstance(backbone, str):
        backbone = load_backbone(backbone, **{"device": device, **(backbone_options or {})})
    if isinstance(data, str):
        data = load_data(data, **({"task": task} if task else {}), **(data_options or {}))
    if backbone.modality != data.modality:
        raise ValueError(f"backbone {backbone.spec} takes {backbone.modality}s, but {data.name} holds {data.modality}s")

    wanted = resolve_layers(layers, backbone.num_layers)
    stored = _stored_layers(readouts, wanted, backbone.num_layers)
    size = len(data.train)
    batch_size = batch_size or int(np.clip(2 ** round(math.log2(max(size / 24, 1))), 32, 256))
    epochs = epochs or int(np.clip(math.ceil(600 / math.ceil(size / batch_size)), 8, 60))
    schedule = Schedule(epochs, min(max(1.0, 0.1 * epochs), epochs / 2), batch_size, patience, optimizer=optimizer, weight_decay=weight_decay)
    settings = {
        "backbone": backbone.spec, "backbone_options": _plain(backbone_options), "backbone_fingerprint": backbone.fingerprint(), "data": data.name,
        "data_fingerprint": [s.fingerprint for s in (data.train, data.validation, data.test)],
        "items": [len(data.train), len(data.validation), len(data.test)], "task": data.task,
        "readouts": readouts if isinstance(readouts, str) else list(readouts), "layers": list(wanted), "stored_layers": list(stored),
        "tokens": tokens if isinstance(tokens, str) else list(tokens), "lrs": None if lrs is None else list(lrs),
        "query_factors": None if query_factors is None else list(query_factors), "seeds": seeds, "epochs": epochs,
        "batch_size": batch_size, "optimizer": optimizer, "weight_decay": weight_decay, "patience": patience, "views": views,
        "dtype": str(dtype).removeprefix("torch."),
    }  # fmt: skip
    folder = Folder(Path(out), settings, resume) if out is not None else None

    stores = {}
    jobs = [("train", data.train, 0), *[("train", data.train, view) for view in range(1, views + 1)], ("validation", data.validation, 0), ("test", data.test, 0)]
    for part, split, view in jobs:
        display.stage(f"extract {part}" + (f" (view {view})" if view else ""), len(split))
        seen = 0

        def progress(done: int, total: int) -> None:
            nonlocal seen
            display.advance(done - seen)
            seen = done

        stores[part, view] = extract(
            backbone, split, layers=stored, cache_dir=cache_dir, dtype=dtype, on_batch=progress, view=view,
            augment=augment if view else None,
        )  # fmt: skip

    first = stores["train", 0]
    uniform = all(store.uniform for store in stores.values()) and len({int(store.counts[0]) for store in stores.values()}) == 1
    host = Host(first.dim, tuple(first.layers), first.grid, first.prefix, data.modality, uniform)
    candidates = plan(readouts, host, backbone.num_layers, wanted, tokens, seeds, lrs, query_factors)
    objective = Objective.of(data.task, len(data.classes), data.train.targets)

    def feed(part: str, split: Any, view: int = 0) -> Feed:
        return Feed(stores[part, view], to_device_targets(split.targets, data.task), tuple(first.layers), memory, device)

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
    complete = False
    try:
        outcomes += _fit_free(free, names, train, validation, test, objective, host, display, stop)
        groups = [Group.create(c, host.dim, objective, schedule, uniform) for c in learned]
        complete = _train(groups, turns, validation, schedule, folder, display, stop)
        if not complete and groups:
            notes.append("the time budget ended training early; unfinished readouts are marked partial")
    except KeyboardInterrupt:
        notes.append("interrupted; unfinished readouts are marked partial, --resume goes on from here")
        display.say("interrupted: writing what there is")
    outcomes += [_test(group, test, objective, complete) for group in groups if np.isfinite(group.best_score).any()]
    if not outcomes:
        raise KeyboardInterrupt
    result = _result(outcomes, data, test, objective, host, settings, notes, backbone)
    if folder is not None:
        result = folder.write(result, outcomes, backbone, host, objective)
    return result


def _plain(options: dict[str, Any] | None) -> dict[str, Any]:
    """Options of the backbone that change its features, JSON-able: how it is loaded, not where it runs or which revision."""
    chosen = {k: v for k, v in (options or {}).items() if k not in ("device", "device_map", "revision")}
    return {k: v if isinstance(v, bool | int | float | str | None) else str(v) for k, v in chosen.items()}


def _stored_layers(readouts: str | Sequence[str], wanted: tuple[int, ...], num_layers: int) -> tuple[int, ...]:
    """The hidden states to extract: those asked for, and every block where a readout of several layers has only one."""
    if isinstance(readouts, str) and readouts in ("last", "free"):
        return tuple(sorted(set(wanted)))
    stack = readouts == "all" or any(reads_stack(s) for s in split_specs(readouts) if s not in EXTRAS)
    if stack and len(set(wanted)) == 1:
        return tuple(sorted({*wanted, *range(1, num_layers + 1)}))
    return tuple(sorted(set(wanted)))


def _train(groups, turns, validation, schedule: Schedule, folder, display: Display, stop) -> bool:
    if not groups:
        return True
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

    return train_groups(
        groups, turns, validation, schedule, folder=folder.checkpoint if folder else None, stop=stop, on_epoch=on_epoch
    )


def _fit_free(free, names, train, validation, test, objective, host, display, stop) -> list[Outcome]:
    everything = names in (["all"], ["last"], ["free"])
    extras = [n for n in EXTRAS if everything or n in names]
    if not free and not extras:
        return []
    display.stage("fit linear models", len(free) + len(extras))
    found = []
    for job in [*free, *extras]:
        fitted: Fitted | None = fit_free(job, train, validation, test, objective, host)
        if fitted is not None:
            found.append(Outcome(status="done", **fitted.__dict__))
        display.advance(1)
        if stop():
            break
    return found


class Head(nn.Sequential):
    """Batch norm and linear layer of a trained readout."""


def _test(group: Group, test: Feed, objective: Objective, complete: bool) -> Outcome:
    """Score the winning members on the test part: the only time it is looked at."""
    winners = group.winners()
    best = max(winners, key=lambda i: (group.best_score[i], -group.best_loss[i]))
    pooling, norm, linear = group.stack.member(group.best, best)
    lr, factor = group.stack.members[best].lr, group.stack.members[best].query_factor
    validation, epochs = float(group.best_score[winners].mean()), float(group.best_epoch[winners].mean()) + 1
    group.stack.load(group.best)
    group._keep(winners)
    start = time.perf_counter()
    outputs, _ = group.outputs(test.batches(512))
    seconds = group.seconds + time.perf_counter() - start
    params = sum(p.numel() for m in (pooling, linear) for p in m.parameters())
    has_queries = bool(group.stack.template.query_parameters)
    return Outcome(
        group.candidate.key, group.candidate.readout, group.candidate.layers, group.candidate.tokens, group.candidate,
        pooling, Head(norm, linear), objective.predictions(outputs), validation, params, seconds, lr,
        factor if has_queries else None, None, epochs, "done" if complete or group.finished else "partial",
    )  # fmt: skip


def _result(outcomes, data: Data, test: Feed, objective, host: Host, settings, notes, backbone) -> ProbeResult:
    targets = data.test.targets.numpy()
    scores = {o.key: objective.item_scores(o.predictions, targets) for o in outcomes}
    order = sorted(outcomes, key=lambda o: -scores[o.key].mean())
    ties = tie_groups([scores[o.key] for o in order])
    some, _ = test.take(torch.arange(min(ENTROPY_ITEMS, len(test))))
    rows, galleries = [], []
    for outcome, tie in zip(order, ties, strict=True):
        low, high = bootstrap_interval(scores[outcome.key])
        cost, latency, entropy = 0, float("nan"), None
        if outcome.candidate is not None and outcome.pooling is not None:
            tokens, mask = select_tokens(some, outcome.candidate, host.uniform)
            cost = macs(outcome.pooling, outcome.head, tokens, mask)
            part = None if mask is None else mask[:32]
            latency = latency_ms(outcome.pooling, outcome.head, tokens[:32], part)
            if outcome.pooling.attends:
                entropy, gallery = _look(outcome, tokens, mask, host)
                galleries.append(gallery)
        elif outcome.extra:
            cost, latency = outcome.extra.get("macs", 0), outcome.extra.get("latency_ms", float("nan"))
        rows.append(
            Row(
                outcome.readout, ",".join(map(str, outcome.layers)), outcome.tokens, float(scores[outcome.key].mean()), low, high,
                objective.metric, outcome.validation, outcome.params, cost, latency, outcome.seconds, outcome.lr,
                outcome.regularisation, outcome.query_factor, entropy, outcome.epochs, len(outcome.predictions), tie, outcome.status,
            )  # fmt: skip
        )
    shown = [data.test.items[i] for i in range(min(GALLERY_ITEMS, len(data.test)))]
    if data.modality == "image":
        items: tuple[Any, ...] = tuple(backbone.input_image(item) for item in shown)
    else:
        items = tuple(backbone.token_strings(item) for item in shown)
    return ProbeResult(
        tuple(rows), settings, data.classes, {o.key: o.predictions for o in order}, targets, items,
        None if host.grid is None else tuple(host.grid), 0, tuple(galleries), tuple(notes),
    )  # fmt: skip


@torch.no_grad()
def _look(outcome: Outcome, tokens: Tensor, mask: Tensor | None, host: Host) -> tuple[float, Gallery]:
    """Mean attention entropy over test items, and the weights on the first few (patches only where there is a grid)."""
    weights = outcome.pooling._pool(tokens, mask)[1]  # type: ignore[union-attr, operator]
    entropy = attention_entropy(weights, mask)
    shown = weights[:GALLERY_ITEMS].float().cpu().numpy()
    if host.grid is not None and outcome.tokens == "both":
        shown = shown[..., host.prefix :]
    key = f"{outcome.readout} | {','.join(map(str, outcome.layers))} | {outcome.tokens}"
    return float(entropy.mean()), Gallery(key, shown, entropy.cpu().numpy())
