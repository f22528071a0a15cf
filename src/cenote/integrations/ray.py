"""The two expensive parts of a probe on a Ray cluster: extraction, a task a shard, and the sweep, a task a readout.

What workers must see: the cache directory (a shared file system or an fsspec URL) and, for checkpoints, the results
folder. Items travel through Ray's object store, once to each machine: texts and arrays whole, image and sound files as
their paths, which must then be the same everywhere. A worker loads the backbone from its spec, once a process, and
compares its fingerprint with the driver's.

What a death costs: Ray runs the task again on another worker. A shard is written again, with the same bytes and under
the same name, and appears whole or not at all, so that it does not matter if the first worker was only cut off. A
readout goes on from its last checkpoint, or from its start without a results folder. When the driver dies, the same
call goes on: shards in the manifest stay (it lists them up to the first that is missing), and readouts have their
checkpoints.

Numbers are those of a run in one process with as many threads as a task here has, ``cpus``: float sums may depend on
the number of threads in the last bits.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cenote.allocator import keep_freed_memory
from cenote.backbones import load_backbone
from cenote.backbones.base import Backbone
from cenote.probe.engine import Source
from cenote.probe.feed import Feed
from cenote.probe.fits import fit_free
from cenote.probe.manifest import Layout, Shard
from cenote.probe.outcome import Outcome
from cenote.probe.plan import Candidate, Host
from cenote.probe.store import FeatureStore
from cenote.probe.tasks import Objective
from cenote.probe.train import Group, Schedule, train_groups
from cenote.probe.work import Done, Elsewhere, Job, Work

try:
    import ray
    import ray.data
    from ray.exceptions import OutOfMemoryError, RayError, RayTaskError
except ImportError as error:
    raise ImportError("engine 'ray' needs Ray: pip install 'cenote[distributed]'") from error

RETRIES = 10
"""Times a readout is started again after its worker died, so that one that always kills its worker comes to an end."""


class RayEngine:
    """A connection to a Ray cluster, see :class:`cenote.probe.engine.Engine`.

    A connection that is already there is used; otherwise Ray is asked for one, which stays until the process ends or
    ``ray.shutdown()``.

    Args:
        address: of the cluster, ``"host:6379"`` or ``"auto"``; ``None`` is Ray's own rule: ``$RAY_ADDRESS``, a cluster
            on this machine, or else a new one on this machine.
        cpus: cores, and threads, of a task.
        gpus: GPUs of a task.
        memory: bytes of features that a process holds of each part, as in :func:`cenote.probe.probe`.

    Raises:
        ValueError: there is no cluster at the address.
    """

    def __init__(self, address: str | None = None, *, cpus: int = 1, gpus: float = 0, memory: int = 2**30) -> None:
        self.cpus, self.gpus, self.memory = cpus, gpus, memory
        if not ray.is_initialized():
            try:
                ray.init(address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
            except ConnectionError as error:
                raise ValueError(f"no Ray cluster at {address}: {str(error).splitlines()[0]}") from None

    def extraction(self, source: Source | None = None) -> Elsewhere:
        """Shards by Ray Data, for :func:`cenote.probe.extract.extract`.

        Args:
            source: how workers load the backbone, ``(spec, keywords of load_backbone)``; ``None`` sends the driver's
                own through the object store, which does for small ones.
        """

        def elsewhere(work: Work, jobs: Sequence[Job], layout: Layout | None) -> Iterator[Done]:
            expected = None if source is None or work.backbone is None else work.backbone.fingerprint()
            sent = work if source is None else dataclasses.replace(work, backbone=None)
            task = _ShardTask(_put(sent, "the data and the backbone"), source, expected, layout, self.cpus)
            _silence_data()
            rows = ray.data.from_items([job._asdict() for job in jobs], override_num_blocks=len(jobs))
            # A GPU task ends its process unless told otherwise, and with it the loaded backbone.
            reuse: dict[str, Any] = {"num_gpus": self.gpus, "max_calls": 0} if self.gpus else {}
            found = iter(rows.map(task, num_cpus=self.cpus, **reuse).iter_rows())
            while (row := _raising(lambda: next(found, None))) is not None:
                yield _received(json.loads(row["result"]))

        return elsewhere

    def fit_free(
        self, jobs: Sequence[Candidate | str], feeds: tuple[Feed, Feed, Feed], objective: Objective, host: Host,
        stop: Callable[[], bool],
    ) -> Iterator[Outcome | None]:  # fmt: skip
        """A task for each readout without parameters; outcomes in the order of the jobs."""
        sent = self._send(feeds)
        tasks = [self._task(_fit_free, sent, job, objective, host, self.cpus) for job in jobs]
        found: dict[int, Outcome | None] = {}
        for number, outcome in _finished(tasks, stop):
            found[number] = outcome
        yield from (found.get(number) for number in range(len(jobs)))

    def train(
        self, groups: Sequence[Group], turns: Sequence[Feed], validation: Feed, folder: Path | None, deadline: float,
        on_group: Callable[[Group], Any],
    ) -> bool:  # fmt: skip
        """A task for each group; the groups take up the states that their tasks came to."""
        sent = self._send((*turns, validation))
        stop_at = time.time() + deadline - time.monotonic()
        place = None if folder is None else folder.absolute()
        tasks = [
            self._task(
                _train, sent, g.candidate, g.objective, g.schedule, g.uniform, place, stop_at, self.cpus
            )
            for g in groups
        ]  # fmt: skip
        complete, left = True, set(range(len(groups)))
        try:
            for number, (name, state, whole) in _finished(tasks):
                with tempfile.TemporaryDirectory() as received:
                    (Path(received) / name).write_bytes(state)
                    groups[number].restore(Path(received))
                complete &= whole
                left.discard(number)
                on_group(groups[number])
        except KeyboardInterrupt:
            if folder is not None:
                for number in left:
                    groups[number].restore(folder)
            raise
        return complete

    def _task(self, call: Callable[..., Any], *args: Any) -> Any:
        options: dict[str, Any] = {"num_cpus": self.cpus, "num_gpus": self.gpus, "max_retries": RETRIES}
        return ray.remote(**options)(call).remote(*args)

    def _send(self, feeds: Sequence[Feed]) -> Sent:
        parts = [_Part(feed.store.path, feed.targets, feed.layers, self.memory, feed.device) for feed in feeds]
        return _put(parts, "the targets")


@dataclasses.dataclass(frozen=True)
class Sent:
    """Something in the object store, not fetched in place of the task's argument but when it is asked for."""

    ref: Any

    def once(self, build: Callable[[Any], Any]) -> Any:
        """``build`` of what was sent, made once a process; what was made before from other things is let go."""
        key = self.ref.hex()
        if key not in _MADE:
            _MADE.clear()
            _MADE[key] = build(ray.get(self.ref))
        return _MADE[key]


_MADE: dict[str, Any] = {}


def _put(value: Any, what: str) -> Sent:
    try:
        return Sent(ray.put(value))
    except (TypeError, AttributeError) as error:
        raise TypeError(
            f"{what} cannot be sent to other machines ({error}): name the backbone by its spec, and keep data in "
            "files, arrays or tables"
        ) from error


@dataclasses.dataclass(frozen=True)
class _ShardTask:
    """Makes the shard of a row ``{"number", "first", "end"}``; the row that comes out holds what became of it."""

    work: Sent
    source: Source | None
    fingerprint: str | None
    layout: Layout | None
    threads: int

    def __call__(self, row: dict[str, Any]) -> dict[str, str]:
        _settle(self.threads)
        try:
            done = self.work.once(self._loaded).shard(Job(**row), self.layout)
        except (ValueError, TypeError, OSError) as error:
            kind = next(kind for kind in (OSError, TypeError, ValueError) if isinstance(error, kind))
            result: list[Any] = ["error", kind.__name__, getattr(error, "errno", None), str(error)]
        else:
            result = ["done", done.number, dataclasses.asdict(done.shard), dataclasses.asdict(done.layout)]
        return {"result": json.dumps(result)}

    def _loaded(self, work: Work) -> Work:
        if self.source is None:
            return work
        return dataclasses.replace(work, backbone=_backbone(self.source, self.fingerprint))


_BACKBONES: dict[str, Backbone] = {}


def _backbone(source: Source, fingerprint: str | None) -> Backbone:
    """The backbone of a source, loaded once a process, whatever parts and views of the data it then reads."""
    key = repr((source, fingerprint))
    if key not in _BACKBONES:
        _BACKBONES.clear()
        spec, options = source
        backbone = load_backbone(spec, **options)
        if backbone.fingerprint() != fingerprint:
            node = ray.get_runtime_context().get_node_id()
            raise ValueError(f"backbone {spec} has other weights on node {node} ({os.uname().nodename}) than here")
        _BACKBONES[key] = backbone
    return _BACKBONES[key]


def _received(result: list[Any]) -> Done:
    """What a shard's task came to; its error is raised here."""
    if result[0] == "error":
        _, kind, number, message = result
        if kind == "OSError":
            raise OSError(number, message) if number else OSError(message)
        raise {"TypeError": TypeError, "ValueError": ValueError}[kind](message)
    _, number, shard, layout = result
    grid = layout.pop("grid")
    return Done(number, Shard(**shard), Layout(**layout, grid=None if grid is None else tuple(grid)))


class _Part(NamedTuple):
    """A :class:`~cenote.probe.feed.Feed` without its features."""

    path: str
    targets: Tensor
    layers: tuple[int, ...]
    memory: int
    device: str


def _feeds(parts: Iterable[_Part]) -> list[Feed]:
    return [Feed(FeatureStore.open(p.path), p.targets, p.layers, p.memory, p.device) for p in parts]


def _train(
    sent: Sent, candidate: Candidate, objective: Objective, schedule: Schedule, uniform: bool, folder: Path | None,
    stop_at: float, threads: int,
) -> tuple[str, bytes, bool]:  # fmt: skip
    """One group, from its checkpoint if there is one: name and content of its state, and whether it is finished."""
    _settle(threads)
    *turns, validation = sent.once(_feeds)
    group = Group.create(candidate, validation.store.dim, objective, schedule, uniform)
    if folder is not None:
        group.restore(folder)
    whole = train_groups([group], turns, validation, schedule, folder=folder, stop=lambda: time.time() > stop_at)
    with tempfile.TemporaryDirectory() as state:
        group.save(Path(state))
        (file,) = Path(state).iterdir()
        return file.name, file.read_bytes(), whole


def _fit_free(sent: Sent, job: Candidate | str, objective: Objective, host: Host, threads: int) -> Outcome | None:
    _settle(threads)
    train, validation, test = sent.once(_feeds)
    return fit_free(job, train, validation, test, objective, host)


def _finished(tasks: Sequence[Any], stop: Callable[[], bool] = lambda: False) -> Iterator[tuple[int, Any]]:
    """Number and result of every task as it ends; those that are not wanted any more are cancelled."""
    waiting = {task: number for number, task in enumerate(tasks)}
    try:
        while waiting and not stop():
            ready, _ = ray.wait(list(waiting), num_returns=1, timeout=1.0)
            for task in ready:
                yield waiting.pop(task), _result(task)
    finally:
        for task in waiting:
            ray.cancel(task, force=True)


def _result(task: Any) -> Any:
    """A task's result, or the error that it raised, without Ray's account of it."""
    return _raising(lambda: ray.get(task))


def _raising(call: Callable[[], Any]) -> Any:
    """``call()``; what a task raised comes out as it was, and what Ray itself could not do as an ``OSError``."""
    try:
        try:
            return call()
        except RayTaskError as error:
            raise error.cause from None
    except RayError as error:
        raise _lost(error) from None


def _lost(error: RayError) -> OSError:
    """A worker, node or object that Ray lost and could not bring back, in one line."""
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")
    advice = "see that the nodes live, then call again with resume: what is finished is kept"
    if isinstance(error, OutOfMemoryError):
        advice = "give each task more cores (cpus), so that fewer share a machine, or a lower memory; then resume"
    return OSError(f"the Ray cluster lost a task ({type(error).__name__}: {reason}): {advice}")


def _settle(threads: int) -> None:
    """Make a worker compute as the local run does."""
    torch.set_num_threads(threads)
    keep_freed_memory()


def _silence_data() -> None:
    """The probe has a progress display of its own."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
