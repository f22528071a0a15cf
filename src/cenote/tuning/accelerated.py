"""Training one large readout on several GPUs, through Hugging Face accelerate.

The probe trains many small readouts side by side on one device. This is for one readout that deserves a machine of its
own (a latent attention at the width of a language model, say): the same loss, schedule, order of batches,
initialisation and normalisation, in as many processes as the launcher starts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from cenote.files import write_whole
from cenote.ops.masked import widen
from cenote.pooling.base import Pooling
from cenote.probe.feed import Feed
from cenote.probe.heads import BN_EPS, BN_MOMENTUM
from cenote.probe.manifest import digest
from cenote.probe.optim import warmup_cosine
from cenote.probe.plan import Candidate, Host, plan
from cenote.probe.readout import Readout, ReadoutConfig
from cenote.probe.store import FeatureStore
from cenote.probe.tasks import Objective, to_device_targets
from cenote.probe.train import SCORED, Schedule, select_tokens
from cenote.types import Features, Task

try:
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs
except ImportError as error:
    raise ImportError("training on several GPUs needs accelerate: pip install 'cenote[distributed]'") from error

CHECKPOINT = "checkpoint.safetensors"


class GlobalBatchNorm(nn.BatchNorm1d):
    """Batch norm without affine part whose batch is that of all processes together, ``(x - mean) / sqrt(var + eps)``.

    What torch's ``SyncBatchNorm`` computes, which exists for GPUs only; the gradient flows through the statistics of
    all processes. With one process it is ``nn.BatchNorm1d``.
    """

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=BN_EPS, momentum=BN_MOMENTUM, affine=False)

    def forward(self, input: Float[Tensor, "rows width"]) -> Float[Tensor, "rows width"]:
        if not self.training or not dist.is_initialized() or dist.get_world_size() == 1:
            return super().forward(input)
        from torch.distributed.nn.functional import all_reduce

        sums = all_reduce(torch.cat([input.sum(0), input.new_tensor([len(input)])]))
        rows = sums[-1].detach()
        mean = sums[:-1] / rows
        var = all_reduce((input - mean).square().sum(0)) / rows
        with torch.no_grad():
            assert self.running_mean is not None
            assert self.running_var is not None
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, BN_MOMENTUM)
            self.running_var.lerp_(var * rows / (rows - 1), BN_MOMENTUM)
        return (input - mean) * (var + self.eps).rsqrt()


class _Model(nn.Module):
    """Pooling, norm and head, initialised as the probe does it."""

    def __init__(self, candidate: Candidate, dim: int, outputs: int, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.pooling: Pooling = candidate.make(dim)
            self.head = nn.Linear(self.pooling.out_dim, outputs)
        self.norm = GlobalBatchNorm(self.pooling.out_dim)

    def forward(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        return self.head(self.norm(widen(self.pooling._pool(tokens, mask)[0])))


@dataclass(frozen=True)
class TrainedReadout:
    """What :func:`train_readout` returns, the same in every process.

    Attributes:
        readout: the state best on validation, in eval mode; save it in the process that is ``main``.
        validation: its score there.
        epoch: the epoch it stems from, counted from 1.
        scores: validation score after every epoch.
        main: whether this is the process that writes files.
    """

    readout: Readout
    validation: float
    epoch: int
    scores: tuple[float, ...]
    main: bool


@dataclass
class _Progress:
    """Where training stands, and the best state so far."""

    epoch: int = 0
    batch: int = 0
    score: float = -float("inf")
    loss: float = float("inf")
    best_epoch: int = 0
    scores: list[float] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)


def train_readout(
    readout: str,
    train: tuple[FeatureStore, Tensor],
    validation: tuple[FeatureStore, Tensor],
    *,
    task: Task = "classification",
    classes: Sequence[str] = (),
    layers: Sequence[int] | None = None,
    tokens: str = "auto",
    lr: float = 1e-3,
    query_factor: float = 1.0,
    seed: int = 0,
    epochs: int | None = None,
    batch_size: int | None = None,
    accumulate: int = 1,
    weight_decay: float = 0.0,
    patience: int | None = None,
    mixed_precision: str | None = None,
    folder: str | Path | None = None,
    save_every: int = 1000,
    memory: int = 2**30,
    device: str | None = None,
) -> TrainedReadout:
    """Train one readout from feature stores, in all processes of a launcher together.

    Started by ``accelerate launch --multi_gpu script.py`` (or ``torchrun``), every process calls this with the same
    arguments and takes its share of each batch; called from a plain script it trains in that process. The numbers are
    those of one process with the same ``batch_size`` (which counts the items of an optimiser step over all
    processes), up to the order of float sums: batch norm reads the whole batch, see :class:`GlobalBatchNorm`.

    Differences from :func:`cenote.probe.probe`: one learning rate and one seed, so nothing is pruned; AdamW only; with
    ``accumulate`` batch norm sees one of the pieces of a batch at a time, as batch norms do. A batch of fewer than two
    items a piece, or one a process, is left out.

    Args:
        readout: a pooling with parameters, as in the probe: ``"latent_attention"``, ``"weighted_layers > ep"``.
        train, validation: a store and the targets of its items each.
        task: what the targets are.
        classes: class names in label order; empty for regression.
        layers: for readouts of one layer, which (default: the last that is stored).
        tokens: ``"auto"`` (patches where there is a grid), ``"class"``, ``"patches"`` or ``"both"``.
        lr: peak learning rate; warm-up and cosine as in the probe.
        query_factor: factor on the learned queries' rate.
        seed: of the initialisation; the order of batches is the probe's.
        epochs, batch_size: by default those of the probe.
        accumulate: pieces of a batch that pass one after the other before an optimiser step.
        weight_decay: decay of weight matrices.
        patience: epochs without a better validation score after which training stops.
        mixed_precision: ``"no"``, ``"bf16"`` or ``"fp16"``; ``None`` as the launcher says.
        folder: where the state is saved, ``checkpoint.safetensors``, after every epoch and every ``save_every`` steps,
            and where training goes on from; all processes must see it. (It is written here and not by accelerate's
            ``save_state``, which pickles the optimiser.) A pooling with dropout goes on with other random numbers.
        save_every: optimiser steps between two saves within an epoch.
        memory: bytes of features that a process holds of each part.
        device: ``"cpu"`` to keep off GPUs; by default what accelerate finds.

    Raises:
        ValueError: a readout without parameters, or several; targets that do not fit the store; a checkpoint of
            another configuration or other data.
    """
    parallel = DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False)
    accelerator = Accelerator(mixed_precision=mixed_precision, cpu=device == "cpu", kwargs_handlers=[parallel])
    if accumulate < 1:
        raise ValueError(f"accumulate must be at least 1, got {accumulate}")
    for store, targets in (train, validation):
        if len(store) != len(targets):
            raise ValueError(f"{store.path} holds {len(store)} items, but there are {len(targets)} targets")
    store = train[0]
    candidate, uniform = _candidate(readout, store, validation[0], layers, tokens, lr, query_factor, seed)
    objective = Objective.of(task, len(classes), train[1])
    schedule = Schedule.sized(len(store), epochs, batch_size, patience=patience, weight_decay=weight_decay)
    where = str(accelerator.device)
    feeds = [Feed(s, to_device_targets(t, task), tuple(store.layers), memory, where) for s, t in (train, validation)]
    model = _Model(candidate, store.dim, objective.outputs, seed)
    data = " ".join(_data_id(*part) for part in (train, validation))
    run = _Run(accelerator, model, candidate, objective, schedule, uniform, accumulate, lr, query_factor, data)
    state = run.train(feeds[0], feeds[1], None if folder is None else Path(folder), save_every)
    model.load_state_dict(state.best)
    config = ReadoutConfig(
        pooling=candidate.readout, options=dict(candidate.options), dim=store.dim, layers=candidate.layers,
        tokens=candidate.tokens, grid=store.grid, task=task, classes=tuple(classes), outputs=objective.outputs,
        backbone=store.manifest.key["backbone"], revision=store.manifest.key["revision"],
        backbone_fingerprint=store.manifest.key["fingerprint"], norm_eps=BN_EPS, target_mean=objective.target_mean,
        target_std=objective.target_std,
    )  # fmt: skip
    model.cpu()
    trained = Readout(config, model.pooling, model.norm, model.head)
    return TrainedReadout(trained, state.score, state.best_epoch + 1, tuple(state.scores), accelerator.is_main_process)


def _data_id(store: FeatureStore, targets: Tensor) -> str:
    """What a store and its targets are told by."""
    return f"{digest(store.manifest.key)} {hashlib.sha256(targets.cpu().contiguous().numpy().tobytes()).hexdigest()}"


def _candidate(
    readout: str, store: FeatureStore, other: FeatureStore, layers: Sequence[int] | None, tokens: str, lr: float,
    query_factor: float, seed: int,
) -> tuple[Candidate, bool]:  # fmt: skip
    """The probe's own plan for one readout, and whether all items have as many tokens."""
    uniform = store.uniform and other.uniform and store.longest == other.longest
    modality = "text" if store.grid is None else "image"
    host = Host(store.dim, tuple(store.layers), store.grid, store.prefix, modality, uniform)
    wanted = layers or store.layers[-1:]
    found = plan([readout], host, max(store.layers), wanted, tokens, 1, [lr], [query_factor])
    if len(found) != 1:
        raise ValueError(f"{readout!r} at layers {list(wanted)} is {len(found)} readouts: train one at a time")
    if not found[0].members:
        raise ValueError(f"{readout!r} has no parameters: the probe fits its linear head to convergence")
    return found[0], uniform


@dataclass
class _Run:
    """A model in training in this and the other processes."""

    accelerator: Accelerator
    plain: _Model
    candidate: Candidate
    objective: Objective
    schedule: Schedule
    uniform: bool
    accumulate: int
    lr: float
    query_factor: float
    data: str

    def __post_init__(self) -> None:
        queries = {f"pooling.{name}" for name in self.plain.pooling.query_parameters}
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in self.plain.named_parameters():
            rate = self.lr * (self.query_factor if name in queries else 1.0)
            decay = self.schedule.weight_decay if parameter.ndim > 1 else 0.0
            groups.setdefault((rate, decay), []).append(parameter)
        self.optimizer = torch.optim.AdamW(
            [{"params": own, "base": rate, "lr": rate, "weight_decay": decay} for (rate, decay), own in groups.items()],
            fused=True,
        )
        self.model, self.stepper = self.accelerator.prepare(self.plain, self.optimizer)

    def train(self, feed: Feed, validation: Feed, folder: Path | None, save_every: int) -> _Progress:
        """Train from where the folder says to the end of the schedule."""
        at = self._restore(folder)
        steps = -(-len(feed) // self.schedule.batch_size)
        while at.epoch < self.schedule.epochs and not self._stale(at):
            for number, rows, pieces in self._batches(feed, at):
                rate = warmup_cosine(at.epoch + number / steps, self.schedule.epochs, self.schedule.warmup)
                self._step(pieces, rows, rate)
                at.batch = number + 1
                if at.batch % save_every == 0:
                    self._save(folder, at)
            self._validate(validation, at)
            at.epoch, at.batch = at.epoch + 1, 0
            self._save(folder, at)
        return at

    def _stale(self, at: _Progress) -> bool:
        patience = self.schedule.patience
        return patience is not None and at.epoch - at.best_epoch > patience

    def _batches(self, feed: Feed, at: _Progress) -> Iterator[tuple[int, int, list[tuple[Features, Tensor]]]]:
        """Number, size and this process's share of the pieces of every batch of the epoch that is still to come."""
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        least = max(2, processes)
        generator = torch.Generator().manual_seed(self.schedule.order_seed * 100_003 + at.epoch)
        batches = torch.randperm(len(feed), generator=generator).split(self.schedule.batch_size)
        shares = [
            (number, len(batch), [piece.tensor_split(processes)[rank] for piece in batch.tensor_split(count)])
            for number, batch in enumerate(batches)
            if number >= at.batch and (count := min(self.accumulate, len(batch) // least))
        ]
        with ThreadPoolExecutor(max_workers=1) as reader:  # reads one batch ahead

            def take(share: list[Tensor]) -> list[tuple[Features, Tensor]]:
                return [feed.take(index) for index in share]

            ahead = reader.submit(take, shares[0][2]) if shares else None
            for place, (number, rows, _) in enumerate(shares):
                assert ahead is not None
                ready = ahead.result()
                if place + 1 < len(shares):
                    ahead = reader.submit(take, shares[place + 1][2])
                yield number, rows, ready

    def _step(self, pieces: list[tuple[Features, Tensor]], rows: int, rate: float) -> None:
        """One update on one batch of ``rows`` over all processes. Each process weighs its own so that the mean over
        processes, which the gradients go through, is the mean over rows."""
        self.model.train()
        for number, (features, targets) in enumerate(pieces):
            last = number + 1 == len(pieces)
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                outputs = self.model(*select_tokens(features, self.candidate, self.uniform))
                loss = self.objective.loss(outputs.float()[None], targets)[0]
                self.accelerator.backward(loss * (len(targets) * self.accelerator.num_processes / rows))
        for group in self.optimizer.param_groups:
            group["lr"] = group["base"] * rate
        self.stepper.step()
        self.stepper.zero_grad()

    @torch.no_grad()
    def _validate(self, feed: Feed, at: _Progress) -> None:
        """Score the validation part, each process its share, and keep the state if it is better."""
        self.model.eval()
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        share = -(-len(feed) // processes)
        index = torch.arange(share * processes) % len(feed)  # the last processes fill up with the first items
        results = []
        for part in index.view(processes, share)[rank].split(SCORED):
            features, _ = feed.take(part)
            # Not through the parallel wrapper, which would wait for others whose shares have other shapes.
            with self.accelerator.autocast():
                outputs = self.plain(*select_tokens(features, self.candidate, self.uniform))
            results.append(outputs.float())
        outputs = self.accelerator.gather(torch.cat(results))[: len(feed)]
        loss = float(self.objective.loss(outputs[None], feed.targets.to(outputs.device))[0])
        scores = self.objective.item_scores(self.objective.predictions(outputs), feed.targets.cpu().numpy())
        score = float(np.mean(scores)) if np.isfinite(loss) else -float("inf")
        at.scores.append(score)
        if not at.best or (score, -loss) > (at.score, -at.loss):
            at.score, at.loss, at.best_epoch = score, loss, at.epoch
            at.best = {name: tensor.detach().cpu().clone() for name, tensor in self.plain.state_dict().items()}

    def _identity(self) -> str:
        return f"{self.candidate} {self.schedule} {self.objective} {self.data}"

    def _save(self, folder: Path | None, at: _Progress) -> None:
        if folder is None or not self.accelerator.is_main_process:
            return
        names: dict[Any, str] = {parameter: name for name, parameter in self.plain.named_parameters()}
        tensors = {f"model.{name}": tensor for name, tensor in self.plain.state_dict().items()}
        tensors |= {f"best.{name}": tensor for name, tensor in at.best.items()}
        for parameter, state in self.optimizer.state.items():
            tensors |= {f"optimizer.{names[parameter]}.{key}": torch.as_tensor(v) for key, v in state.items()}
        scaler = self.accelerator.scaler
        about = {
            "identity": self._identity(), "epoch": at.epoch, "batch": at.batch, "score": at.score, "loss": at.loss,
            "best_epoch": at.best_epoch, "scores": at.scores, "scaler": None if scaler is None else scaler.state_dict(),
        }  # fmt: skip
        packed = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        write_whole(folder / CHECKPOINT, save(packed, metadata={"state": json.dumps(about)}))

    def _restore(self, folder: Path | None) -> _Progress:
        path = None if folder is None else folder / CHECKPOINT
        if path is None or not path.exists():
            return _Progress()
        with safe_open(path, framework="pt") as file:
            about = json.loads(file.metadata()["state"])
        if about.pop("identity") != self._identity():
            raise ValueError(f"{path} belongs to another configuration: choose another folder or remove it")
        tensors = load_file(path)
        self.plain.load_state_dict(_below(tensors, "model."))
        for name, parameter in self.plain.named_parameters():
            state: dict[str, Any] = _below(tensors, f"optimizer.{name}.")
            if state:
                # The step stays in float32 beside the parameter, as the fused optimiser keeps it.
                self.optimizer.state[parameter] = {key: t.to(parameter.device) for key, t in state.items()}
        scaler = about.pop("scaler")
        if scaler is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(scaler)
        return _Progress(**about, best=_below(tensors, "best."))


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
