"""Training graph networks end to end with a readout, or a readout on a frozen network's history."""

from __future__ import annotations

import copy
import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from cenote.backbones.fingerprint import weights_digest
from cenote.backbones.pyg import GraphNetwork, GraphNetworkConfig, build_network, save_network
from cenote.data.base import Data
from cenote.pooling import create_pooling
from cenote.pooling.histograph import HistoGraph
from cenote.pooling.sets import pool_rows
from cenote.probe.readout import Readout, ReadoutConfig
from cenote.tuning.gnn_data import GraphBatch, PackedGraphs

if TYPE_CHECKING:
    pass

Progress = Callable[[str], None]


class HistoryReadout(Protocol):
    """A module from ``(states (nodes, layers + 1, dim), graph of each node, number of graphs)`` to
    ``(graphs, out_dim)``."""

    out_dim: int

    def __call__(self, states: Tensor, batch: Tensor, size: int) -> Tensor: ...


MakeReadout = str | Callable[[int, int], Any]
"""A pooling by name, or ``make(dim, hidden states)``, which gives a :class:`HistoryReadout`."""


class PooledHistory(nn.Module):
    """A pooling by name as a :class:`HistoryReadout`.

    It reads the last state, or all; without hidden state 0 unless it asks for the embeddings.
    """

    def __init__(self, spec: str, dim: int, states: int) -> None:
        super().__init__()
        self.spec = spec
        self.pooling = create_pooling(spec, dim=dim, num_layers=states)
        self.skip = 0 if self.pooling.reads_embeddings else 1
        if self.pooling.layers == "all" and self.skip:
            self.pooling = create_pooling(spec, dim=dim, num_layers=states - 1)
        self.out_dim = self.pooling.out_dim

    def forward(self, states: Tensor, batch: Tensor, size: int) -> Tensor:
        rows = states[:, -1] if self.pooling.layers == "last" else states[:, self.skip :]
        return pool_rows(self.pooling, rows, batch, size)

    def layers(self, states: int) -> tuple[int, ...]:
        """Numbers of the hidden states that it reads, of so many."""
        return (states - 1,) if self.pooling.layers == "last" else tuple(range(self.skip, states))


@dataclass(frozen=True)
class GNNSettings:
    """How graph networks and readouts are trained: Adam, cross-entropy, the epoch chosen on the validation part.

    Attributes:
        hidden, layers, norm, dropout: of the network; see :class:`~cenote.backbones.pyg.GraphNetworkConfig`.
        epochs: passes over the training part.
        batch_size: graphs a step.
        lr, weight_decay: of Adam.
        clip: largest norm of the gradient.
        seed: of weights and order.
    """

    hidden: int = 64
    layers: int = 5
    norm: str | None = "batch"
    dropout: float = 0.0
    epochs: int = 100
    batch_size: int = 32
    lr: float = 1e-3
    weight_decay: float = 0.0
    clip: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class TrainedGNN:
    """A network with its readout and head, at the epoch that did best on the validation part.

    Attributes:
        network, readout, head: the trained modules, in eval mode, on the device of the training.
        classes: names in label order.
        epoch: the chosen epoch, from 1.
        validation, test: accuracy there.
        floored: share of test graphs whose layer scores had cancelled, so that the floor acted; 0 where the readout
            has no signed weights.
        largest_weight: largest magnitude of a layer weight on the test part; 0 likewise.
        seconds: of training.
    """

    network: GraphNetwork
    readout: nn.Module
    head: nn.Linear
    classes: tuple[str, ...]
    epoch: int
    validation: float
    test: float
    floored: float
    largest_weight: float
    seconds: float

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the network, and into ``readout`` below it the readout with its head, where that has a name.

        ``load_backbone("pyg:FOLDER")`` and ``Readout.from_pretrained("FOLDER/readout")`` load them, frozen.
        """
        save_network(self.network, folder)
        if isinstance(self.readout, PooledHistory):
            self.as_readout(folder).save_pretrained(Path(folder) / "readout")

    def as_readout(self, backbone_folder: str | os.PathLike[str]) -> Readout:
        """Readout and head as a :class:`~cenote.probe.readout.Readout` of the network's features, to save or push.

        Args:
            backbone_folder: where :meth:`save` wrote, or will write, the network; ``"pyg:FOLDER"`` is recorded.

        Raises:
            ValueError: a readout that a function made, which a configuration cannot name.
        """
        if not isinstance(self.readout, PooledHistory):
            kind = type(self.readout).__name__
            raise ValueError(f"only a readout given by name can be built again from a configuration, got {kind}")
        network = self.network.config
        # The head was trained on bare vectors: a standardisation that changes nothing.
        norm = nn.BatchNorm1d(self.readout.out_dim, eps=0.0, affine=False)
        config = ReadoutConfig(
            pooling=self.readout.spec, dim=network.hidden, layers=self.readout.layers(network.layers + 1),
            tokens="both", task="classification", outputs=len(self.classes), classes=self.classes,
            backbone=f"pyg:{os.fspath(backbone_folder)}",
            backbone_fingerprint=weights_digest(self.network, dataclasses.asdict(network)), norm_eps=norm.eps,
        )  # fmt: skip
        return Readout(config, copy.deepcopy(self.readout.pooling).cpu(), norm, copy.deepcopy(self.head).cpu())


def train_gnn(
    kind: str,
    data: Data,
    readout: MakeReadout = "mean",
    settings: GNNSettings | None = None,
    progress: Progress = lambda line: None,
    device: torch.device | str = "cpu",
) -> TrainedGNN:
    """Train a graph network, a readout and a linear head together.

    Args:
        kind: ``"gcn"``, ``"gin"``, ``"gat"`` or ``"sage"``.
        data: graphs, for classification.
        readout: any order-free pooling by name (``"histograph"``, ``"mean"``, ``"concat_layers > mean"``), or a
            function that makes a :class:`HistoryReadout`.
        settings: of network and training.
        progress: called with a line of text every ten epochs.
        device: where network, readout and all graphs live. The initial weights and the order of the graphs are those
            of the CPU; it has been run on CPUs only.

    Raises:
        ValueError: data that is not graphs with classes, an unknown kind or readout.
    """
    settings = settings or GNNSettings()
    parts = _parts(data, device)
    width = parts[0].x.shape[1]
    config = GraphNetworkConfig(
        kind, width, settings.hidden, settings.layers, norm=settings.norm, dropout=settings.dropout
    )
    network = build_network(config, settings.seed).to(device)
    return _train(network, parts, data, readout, settings, progress, device, frozen=False)


def train_head(
    network: GraphNetwork,
    data: Data,
    readout: MakeReadout = "histograph",
    settings: GNNSettings | None = None,
    progress: Progress = lambda line: None,
    cache_dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> TrainedGNN:
    """Train a readout and a linear head on a frozen network's history, which is computed once and kept.

    Args:
        network: left as it is; no gradient reaches it.
        data, readout, settings, progress, device: as for :func:`train_gnn`.
        cache_dtype: of the kept history; ``torch.float16`` halves it.
    """
    settings = settings or GNNSettings()
    network = copy.deepcopy(network).to(device).eval().requires_grad_(False)
    parts = tuple(part.with_states(network, cache_dtype) for part in _parts(data, device))
    return _train(network, parts, data, readout, settings, progress, device, frozen=True)


def _train(
    network: GraphNetwork,
    parts: Sequence[PackedGraphs],
    data: Data,
    readout: MakeReadout,
    settings: GNNSettings,
    progress: Progress,
    device: torch.device | str,
    frozen: bool,
) -> TrainedGNN:
    start = time.perf_counter()
    states = network.config.layers + 1
    with torch.random.fork_rng(devices=[device] if torch.device(device).type == "cuda" else []):
        torch.manual_seed(settings.seed)
        make = (lambda dim, n: PooledHistory(readout, dim, n)) if isinstance(readout, str) else readout
        read: Any = make(network.config.hidden, states)
        head = nn.Linear(read.out_dim, len(data.classes))
        model = nn.ModuleDict({"readout": read, "head": head} | ({} if frozen else {"network": network})).to(device)

        def outputs(batch: GraphBatch) -> Tensor:
            history = batch.x.to(head.weight.dtype) if frozen else network(batch.x, batch.edge_index)
            return head(read(history, batch.batch, len(batch.targets)))

        epoch, validation = _fit(model, outputs, parts, settings, progress)
    test = _score(model, outputs, parts[2])[0]
    floored, largest = _weights(read, network, parts[2], frozen)
    model.eval().requires_grad_(False)
    seconds = time.perf_counter() - start
    return TrainedGNN(network.eval(), read, head, data.classes, epoch, validation, test, floored, largest, seconds)


def _fit(
    model: nn.Module,
    outputs: Callable[[GraphBatch], Tensor],
    parts: Sequence[PackedGraphs],
    settings: GNNSettings,
    progress: Progress,
) -> tuple[int, float]:
    """Train and go back to the epoch of the best validation accuracy (of equal ones, the smallest loss)."""
    generator = torch.Generator().manual_seed(settings.seed)
    optimiser = torch.optim.Adam(model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    best, best_state, best_epoch = (-1.0, 0.0), copy.deepcopy(model.state_dict()), 0
    for epoch in range(1, settings.epochs + 1):
        model.train()
        for batch in parts[0].batches(settings.batch_size, generator):
            if len(batch.x) < 2:
                continue  # batch norm has no variance on a single node
            optimiser.zero_grad()
            nn.functional.cross_entropy(outputs(batch), batch.targets).backward()
            nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
            optimiser.step()
        accuracy, loss = _score(model, outputs, parts[1])
        if (accuracy, -loss) > best:
            best, best_state, best_epoch = (accuracy, -loss), copy.deepcopy(model.state_dict()), epoch
        if epoch % 10 == 0 or epoch == settings.epochs:
            progress(f"epoch {epoch}: validation {accuracy:.3f}, best {best[0]:.3f} in epoch {best_epoch}")
    model.load_state_dict(best_state)
    return best_epoch, best[0]


@torch.no_grad()
def _score(model: nn.Module, outputs: Callable[[GraphBatch], Tensor], part: PackedGraphs) -> tuple[float, float]:
    """Accuracy and loss in eval mode."""
    model.eval()
    right, loss = 0, 0.0
    for batch in part.batches(256):
        logits = outputs(batch)
        right += int((logits.argmax(dim=1) == batch.targets).sum())
        loss += float(nn.functional.cross_entropy(logits, batch.targets, reduction="sum"))
    return right / len(part), loss / len(part)


@torch.no_grad()
def _weights(readout: Any, network: GraphNetwork, part: PackedGraphs, frozen: bool) -> tuple[float, float]:
    """Share of graphs whose scores had cancelled, and the largest layer weight."""
    pooling = getattr(readout, "pooling", None)
    if not isinstance(pooling, HistoGraph):
        return 0.0, 0.0
    network.eval()
    floored, largest = 0, 0.0
    for batch in part.batches(256):
        states = batch.x.float() if frozen else network(batch.x, batch.edge_index)
        read = pooling.read_graphs(states, batch.batch, len(batch.targets))
        floored += int(read.floored.sum())
        largest = max(largest, float(read.layer_weights.abs().max()))
    return floored / len(part), largest


def _parts(data: Data, device: torch.device | str) -> tuple[PackedGraphs, PackedGraphs, PackedGraphs]:
    if data.modality != "graph" or data.task != "classification":
        raise ValueError(f"expected graphs with classes, got {data.modality}s for {data.task} in {data.name}")
    return PackedGraphs(data.train, device), PackedGraphs(data.validation, device), PackedGraphs(data.test, device)
