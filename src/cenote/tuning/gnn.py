"""Training graph networks end to end with a readout, or a readout on a frozen network's history; ten-fold protocol."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn

from cenote.backbones.fingerprint import weights_digest
from cenote.backbones.pyg import GraphNetwork, GraphNetworkConfig, build_network, save_network
from cenote.data import load_data
from cenote.data.base import Data, Split
from cenote.files import write_whole
from cenote.pooling import create_pooling
from cenote.pooling.histograph import HistoGraph
from cenote.pooling.sets import pool_rows
from cenote.probe.readout import Readout, ReadoutConfig

if TYPE_CHECKING:
    import pandas as pd

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


class GraphBatch(NamedTuple):
    """Graphs laid end to end: what nodes carry, edges among them, the graph of each node, and labels."""

    x: Tensor
    edge_index: Int[Tensor, "2 edges"]
    batch: Int[Tensor, "nodes"]
    targets: Int[Tensor, "graphs"]


class PackedGraphs:
    """One part of a data set in memory.

    ``x`` holds what nodes carry: features, or the hidden states of a frozen network.

    Args:
        split: of a set of graphs.
        device: where the graphs are held, and the batches taken.
    """

    def __init__(self, split: Split, device: torch.device | str = "cpu") -> None:
        graphs = [split.items[number] for number in range(len(split))]
        self.x = torch.cat([graph.x for graph in graphs]).to(device)
        self.edges = torch.cat([graph.edge_index for graph in graphs], dim=1).to(device)
        self.nodes = torch.tensor([len(graph.x) for graph in graphs], device=device)
        self.links = torch.tensor([graph.edge_index.shape[1] for graph in graphs], device=device)
        self.targets = split.targets.to(device)

    def __len__(self) -> int:
        return len(self.targets)

    def take(self, index: Int[Tensor, "graphs"]) -> GraphBatch:
        """Some of the graphs."""
        index = index.to(self.nodes.device)
        nodes, links = self.nodes[index], self.links[index]
        rows, edges = _ranges(_starts(self.nodes)[index], nodes), _ranges(_starts(self.links)[index], links)
        shift = torch.repeat_interleave(_starts(nodes), links)
        owner = torch.repeat_interleave(torch.arange(len(index), device=index.device), nodes)
        return GraphBatch(self.x[rows], self.edges[:, edges] + shift, owner, self.targets[index])

    def batches(self, size: int, generator: torch.Generator | None = None) -> Iterator[GraphBatch]:
        """All graphs, shuffled where a generator (of the CPU, so that the order is the same everywhere) is given."""
        count = len(self)
        shuffled = generator is not None
        order = (
            torch.randperm(count, generator=generator, device="cpu") if shuffled else torch.arange(count, device="cpu")
        )
        for index in order.split(size):
            yield self.take(index)

    @torch.no_grad()
    def with_states(self, network: GraphNetwork, dtype: torch.dtype | None = None) -> PackedGraphs:
        """The same graphs carrying the network's hidden states, ``(nodes, layers + 1, dim)``, computed once."""
        packed = copy.copy(self)
        states = [network(batch.x, batch.edge_index).to(dtype) for batch in self.batches(256)]
        packed.x = torch.cat(states)
        return packed


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


@dataclass(frozen=True)
class CrossValidation:
    """Test accuracy of every fold.

    Attributes:
        name: what was trained.
        folds: numbers of the folds.
        accuracies: test accuracy of each.
        results: further figures of each fold: epoch, validation accuracy, floored, largest weight, seconds.
    """

    name: str
    folds: tuple[int, ...]
    accuracies: tuple[float, ...]
    results: tuple[dict[str, float], ...]

    @property
    def mean(self) -> float:
        """Mean accuracy over folds."""
        return float(np.mean(self.accuracies))

    @property
    def std(self) -> float:
        """Standard deviation over folds (of a sample; 0 for one fold)."""
        return float(np.std(self.accuracies, ddof=1)) if len(self.accuracies) > 1 else 0.0

    def frame(self) -> pd.DataFrame:
        """One row a fold."""
        import pandas as pd

        return pd.DataFrame([{"fold": fold, **row} for fold, row in zip(self.folds, self.results, strict=True)])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the folds as csv."""
        write_whole(Path(path), self.frame().to_csv(index=False))


def cross_validate(
    kind: str,
    data: str,
    readout: MakeReadout = "mean",
    settings: GNNSettings | None = None,
    *,
    folds: Sequence[int] = tuple(range(10)),
    frozen: bool = False,
    path: str | os.PathLike[str] | None = None,
    progress: Progress = lambda line: None,
    device: torch.device | str = "cpu",
) -> CrossValidation:
    """Ten-fold protocol: fold k is the test part, k + 1 the validation part that chooses the epoch, the rest trains.

    Args:
        kind, readout, settings, device: as for :func:`train_gnn`.
        data: a set of graphs for :func:`cenote.data.load_data`, ``"tu:MUTAG"`` or an archive.
        folds: which folds to run.
        frozen: train the network with the mean readout first, then the readout on its frozen history.
        path: JSON file that keeps finished folds; the same call on the same graphs goes on behind them. Functions
            that make readouts are told apart by name.
        progress: called with a line of text for every fold.

    Raises:
        ValueError: a ``path`` that belongs to another configuration or to other graphs, a lambda or another readout
            without a name where there is a ``path``, or what :func:`train_gnn` refuses.
    """
    settings = settings or GNNSettings()
    name = readout if isinstance(readout, str) else getattr(readout, "__name__", "<lambda>")
    key = {
        "kind": kind, "data": Path(data).name, "readout": name, "frozen": frozen, **dataclasses.asdict(settings),
    }  # fmt: skip
    done: dict[str, dict[str, float]] = {}
    if path is not None:
        if name == "<lambda>":
            raise ValueError("kept folds are told apart by the readout's name: give a named function, or no path")
        key["fingerprint"] = _fingerprint(data)
        if Path(path).exists():
            kept = json.loads(Path(path).read_text())
            if kept["key"] != key:
                raise ValueError(f"{path} belongs to another configuration: {kept['key']}, expected {key}")
            done = kept["folds"]
    for fold in folds:
        if str(fold) in done:
            continue
        loaded = load_data(data, fold=fold)
        run = train_gnn(kind, loaded, "mean" if frozen else readout, settings, device=device)
        seconds = run.seconds
        if frozen:
            run = train_head(run.network, loaded, readout, settings, device=device)
            seconds += run.seconds
        done[str(fold)] = {
            "accuracy": run.test, "validation": run.validation, "epoch": run.epoch, "floored": run.floored,
            "largest_weight": run.largest_weight, "seconds": round(seconds, 2),
        }  # fmt: skip
        if path is not None:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            write_whole(Path(path), json.dumps({"key": key, "folds": done}, indent=2) + "\n")
        progress(f"{kind} {name} on {key['data']}, fold {fold}: {run.test:.3f} in {seconds:.1f} s")
    rows = [done[str(fold)] for fold in folds]
    return CrossValidation(f"{kind} {name}", tuple(folds), tuple(row["accuracy"] for row in rows), tuple(rows))


def _fingerprint(data: str) -> str:
    """Of the graphs, their labels and their folds."""
    loaded = load_data(data, fold=0)
    parts = (loaded.train, loaded.validation, loaded.test)
    return hashlib.sha256("".join(part.fingerprint for part in parts).encode()).hexdigest()


def _parts(data: Data, device: torch.device | str) -> tuple[PackedGraphs, PackedGraphs, PackedGraphs]:
    if data.modality != "graph" or data.task != "classification":
        raise ValueError(f"expected graphs with classes, got {data.modality}s for {data.task} in {data.name}")
    return PackedGraphs(data.train, device), PackedGraphs(data.validation, device), PackedGraphs(data.test, device)


def _starts(counts: Int[Tensor, "n"]) -> Int[Tensor, "n"]:
    return counts.cumsum(0) - counts


def _ranges(starts: Int[Tensor, "n"], counts: Int[Tensor, "n"]) -> Int[Tensor, "total"]:
    """``starts[i], starts[i] + 1, ...`` of ``counts[i]`` numbers, one range behind the other."""
    return torch.repeat_interleave(starts - _starts(counts), counts) + torch.arange(
        int(counts.sum()), device=counts.device
    )
