"""Sets of graphs: archives in one file, and the TU collection through PyTorch Geometric."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np

from cenote.data.items import Unreadable
from cenote.data.source import PartName, Source

FOLDS = 10
MAX_DEGREE = 63
"""One-hot degrees end here: larger ones share the last place."""
NEEDED = ("node_ptr", "edge_index", "edge_ptr", "y")


class Graphs:
    """Graphs laid end to end, given out as ``torch_geometric.data.Data`` with ``x`` and ``edge_index``.

    Args:
        features: node features ``(nodes, width)`` float32.
        edges: ``(2, edges)``, numbers of nodes in the whole.
        node_ptr, edge_ptr: where each graph's nodes and edges begin, and at last how many there are.
    """

    def __init__(self, features: np.ndarray, edges: np.ndarray, node_ptr: np.ndarray, edge_ptr: np.ndarray) -> None:
        self.features, self.edges, self.node_ptr, self.edge_ptr = features, edges, node_ptr, edge_ptr

    def __len__(self) -> int:
        return len(self.node_ptr) - 1

    def __getitem__(self, index: int) -> Any:
        import torch

        x, edges = self._read(index)
        return _data_class()(x=torch.from_numpy(x), edge_index=torch.from_numpy(edges))

    def check(self, index: int) -> None:
        """Raise :class:`Unreadable` for a graph without nodes, with edges that leave it or non-finite features."""
        self._read(index)

    def _read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        start, stop = int(self.node_ptr[index]), int(self.node_ptr[index + 1])
        if stop <= start:
            raise Unreadable("the graph has no nodes")
        x = self.features[start:stop]
        broken = ~np.isfinite(x).all(axis=1)
        if broken.any():
            raise Unreadable(f"node {int(broken.argmax())} has features that are not finite")
        edges = self.edges[:, int(self.edge_ptr[index]) : int(self.edge_ptr[index + 1])].astype(np.int64) - start
        if edges.size and (edges.min() < 0 or edges.max() >= stop - start):
            raise Unreadable(f"an edge leaves the graph of {stop - start} nodes")
        return np.ascontiguousarray(x), edges


def holds_graphs(path: Path) -> bool:
    """Whether a file is an archive of graphs rather than of images."""
    if path.suffix.lower() != ".npz" or not path.is_file():
        return False
    try:
        with np.load(path, allow_pickle=False) as archive:
            return "node_ptr" in archive.files
    except (OSError, ValueError, EOFError):
        return False


def graph_source(path: Path, fold: int | None = None) -> Source:
    """An ``.npz`` archive of graphs laid end to end.

    Graph g owns nodes ``node_ptr[g]`` to ``node_ptr[g+1]`` and edges ``edge_ptr[g]`` to ``edge_ptr[g+1]`` of
    ``edge_index (2, edges)``, which numbers the nodes of the whole; ``y`` is its label and ``fold`` (optional) its
    fold. Node features are ``x (nodes, width)`` where there are any, else the class ``node_tag`` one-hot, else (one
    class only) the number of incoming edges one-hot, 63 and more sharing a place.

    Args:
        path: the file.
        fold: the test part is this fold and the validation part the next of ten; without it the set is undivided.

    Raises:
        TypeError: node features that are not floating-point, node classes or folds that are not whole numbers.
        ValueError: missing arrays, or arrays that do not fit each other; a fold outside of 0 to 9, or without graphs.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    missing = [name for name in NEEDED if name not in arrays]
    if missing or not ({"x", "node_tag"} & set(arrays)):
        raise ValueError(
            f"{path} should hold {', '.join(NEEDED)} and node_tag or x, but {', '.join(missing or ['node_tag'])} is "
            f"missing: it holds {', '.join(arrays)}"
        )
    node_ptr, edge_ptr, edges = arrays["node_ptr"].astype(np.int64), arrays["edge_ptr"], arrays["edge_index"]
    nodes = len(arrays["x"] if "x" in arrays else arrays["node_tag"])
    for name, ptr, total in (("node_ptr", node_ptr, nodes), ("edge_ptr", edge_ptr, edges.shape[-1])):
        if ptr.ndim != 1 or len(ptr) < 2 or ptr[0] != 0 or ptr[-1] != total or (np.diff(ptr) < 0).any():
            raise ValueError(f"{name} of {path} must rise from 0 to {total}")
    graphs = len(node_ptr) - 1
    if edges.ndim != 2 or len(edges) != 2 or len(edge_ptr) != graphs + 1 or len(arrays["y"]) != graphs:
        raise ValueError(
            f"{path} holds {graphs} graphs: expected edge_index (2, edges), edge_ptr ({graphs + 1},) and y ({graphs},),"
            f" got {edges.shape}, {edge_ptr.shape} and {arrays['y'].shape}"
        )
    for name in ("node_tag", "fold"):
        if name in arrays and not np.issubdtype(arrays[name].dtype, np.integer):
            raise TypeError(f"{name} of {path} must hold whole numbers, got {arrays[name].dtype}")
    if "x" in arrays:
        features = _floats(arrays["x"], str(path))
    else:
        features = one_hot(arrays["node_tag"].astype(np.int64), edges[1], nodes)
    folds = arrays.get("fold")
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(name.encode() + np.ascontiguousarray(arrays[name]).tobytes())
    return _source(str(path), Graphs(features, edges, node_ptr, edge_ptr), arrays["y"], folds, fold, digest.hexdigest())


def tu_source(name: str, fold: int | None = None) -> Source:
    """A set of the TU collection, ``"MUTAG"``, say, through ``torch_geometric.datasets.TUDataset``.

    It is downloaded once, to ``tu`` below the cache directory (``CENOTE_CACHE`` or ``~/.cache/cenote``). Node features
    are the node classes one-hot, or one-hot degrees where there are none; the ten folds are stratified, by seed 0.

    Raises:
        ValueError: no such set, or it cannot be downloaded.
        ImportError: PyTorch Geometric is missing.
    """
    _data_class()
    from torch_geometric.datasets import TUDataset

    root = Path(os.environ.get("CENOTE_CACHE", "~/.cache/cenote")).expanduser() / "tu"
    try:
        graphs = list(TUDataset(str(root), name))
    except Exception as error:  # what the download, the archive and the parser raise has no common class
        raise ValueError(f"cannot load the TU set {name!r}: {str(error).strip().splitlines()[0]}") from error
    sizes = [graph.num_nodes for graph in graphs]
    node_ptr = np.cumsum([0, *sizes])
    edge_ptr = np.cumsum([0, *(graph.edge_index.shape[1] for graph in graphs)])
    edges = np.concatenate([g.edge_index.numpy() + s for g, s in zip(graphs, node_ptr, strict=False)], axis=1)
    if graphs[0].x is None or graphs[0].x.shape[1] == 0:
        features = one_hot(np.zeros(node_ptr[-1], dtype=np.int64), edges[1], int(node_ptr[-1]))
    else:
        features = _floats(np.concatenate([graph.x.numpy() for graph in graphs]), name)
    y = np.array([graph.y.item() for graph in graphs])
    digest = hashlib.sha256()
    for array in (features, edges, node_ptr, edge_ptr, y):
        digest.update(np.ascontiguousarray(array).tobytes())
    return _source(f"tu:{name}", Graphs(features, edges, node_ptr, edge_ptr), y, None, fold, digest.hexdigest())


def one_hot(tags: np.ndarray, targets: np.ndarray, nodes: int) -> np.ndarray:
    """Node classes one-hot; where there is only one, the number of incoming edges, cut at :data:`MAX_DEGREE`."""
    if nodes and tags.min() < 0:
        raise ValueError(f"node classes count from 0, got {tags.min()}")
    if not nodes or tags.max() == 0:
        tags = np.minimum(np.bincount(targets, minlength=nodes), MAX_DEGREE)
    features = np.zeros((len(tags), int(tags.max(initial=0)) + 1), dtype=np.float32)
    features[np.arange(len(tags)), tags] = 1
    return features


def stratified_folds(labels: np.ndarray, seed: int = 0) -> np.ndarray:
    """A fold of 0 to 9 for each item, classes spread evenly."""
    from sklearn.model_selection import StratifiedKFold

    folds = np.zeros(len(labels), dtype=np.int64)
    splitter = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    for number, (_, held) in enumerate(splitter.split(np.zeros(len(labels)), labels)):
        folds[held] = number
    return folds


def _source(
    name: str, graphs: Graphs, labels: np.ndarray, folds: np.ndarray | None, fold: int | None, digest: str
) -> Source:
    parts: list[PartName] | None = None
    if fold is not None:
        if not 0 <= fold < FOLDS:
            raise ValueError(f"fold must lie in 0..{FOLDS - 1}, got {fold}")
        folds = stratified_folds(labels) if folds is None else folds
        if folds.shape != labels.shape:
            raise ValueError(f"fold of {name} must hold a fold for each of {len(labels)} graphs, got {folds.shape}")
        for needed in (fold, (fold + 1) % FOLDS):
            if needed not in folds:
                raise ValueError(f"fold {needed} of {name} holds no graph: expected folds 0 to {FOLDS - 1}")
        # With a fixed number of folds an item is tested once and validated on once.
        parts = ["test" if f == fold else "validation" if f == (fold + 1) % FOLDS else "train" for f in folds]
    return Source(
        name=name if fold is None else f"{name} (fold {fold})",
        modality="graph",
        items=graphs,
        labels=labels.tolist(),
        ids=[f"graph {number}" for number in range(len(graphs))],
        digest=digest,
        parts=parts,
    )


def _floats(features: np.ndarray, where: str) -> np.ndarray:
    if not np.issubdtype(features.dtype, np.floating):
        raise TypeError(f"{where} has node features of type {features.dtype}: expected floating-point ones")
    if features.ndim != 2:
        raise ValueError(f"{where} should have node features (nodes, width), got shape {features.shape}")
    return features.astype(np.float32)


def _data_class() -> Any:
    try:
        from torch_geometric.data import Data
    except ImportError as error:
        raise ImportError("graphs need PyTorch Geometric: pip install 'cenote[graph]'") from error
    return Data
