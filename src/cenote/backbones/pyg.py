"""Message-passing networks of PyTorch Geometric, whose layers are a stack of hidden states."""

from __future__ import annotations

import ast
import difflib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from cenote.backbones.base import Backbone, LayerReducer
from cenote.backbones.collect import Collector
from cenote.backbones.fingerprint import weights_digest
from cenote.files import write_all
from cenote.types import Features

KINDS = {"gcn": "GCN", "gin": "GIN", "gat": "GAT", "sage": "GraphSAGE"}
CONFIG, WEIGHTS = "config.json", "model.safetensors"


@dataclass(frozen=True)
class GraphNetworkConfig:
    """What a :class:`GraphNetwork` is.

    Attributes:
        kind: ``"gcn"``, ``"gin"``, ``"gat"`` or ``"sage"``.
        in_dim: width of the node features.
        hidden: width of every hidden state.
        layers: message-passing layers.
        norm: behind every layer: ``"batch"``, ``"layer"`` (over the channels of a node) or ``None``.
        act: activation, as PyTorch Geometric names it.
        dropout: behind the activation, in training.
        heads: attention heads of ``"gat"``.
    """

    kind: str
    in_dim: int
    hidden: int = 64
    layers: int = 5
    norm: str | None = None
    act: str = "relu"
    dropout: float = 0.0
    heads: int = 1

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"a graph network is one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.norm not in ("batch", "layer", None):
            # Norms over all nodes of a graph or batch would make a node depend on what it is batched with.
            raise ValueError(f"norm must be 'batch', 'layer' or None, got {self.norm!r}")
        for name in ("in_dim", "hidden", "layers", "heads"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name} must be a positive whole number, got {getattr(self, name)!r}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie between 0 and 1, got {self.dropout!r}")


class GraphNetwork(nn.Module):
    """A linear map of the node features, then layers of message passing of one width.

    ``x^(0) = W x + b``, ``x^(l) = act(norm(conv_l(x^(l-1), edges)))`` with the layers of
    ``torch_geometric.nn.models`` (GCN, GIN, GAT, GraphSAGE), no residuals. Hidden state l is what leaves layer l,
    after its norm and activation (the last one too), before dropout. Edge features and weights are not read.
    """

    def __init__(self, config: GraphNetworkConfig) -> None:
        super().__init__()
        pyg = _pyg()
        models = pyg.nn.models
        try:
            pyg.nn.resolver.activation_resolver(config.act)
        except ValueError:
            raise ValueError(f"act must be an activation of torch or PyTorch Geometric, got {config.act!r}") from None
        self.config = config
        self.embed = nn.Linear(config.in_dim, config.hidden)
        extra: dict[str, Any] = {"heads": config.heads} if config.kind == "gat" else {}
        if config.norm == "layer":
            extra["norm_kwargs"] = {"mode": "node"}
        # With jk="last" the last layer, too, is followed by norm and activation; the linear map behind is not wanted.
        self.gnn = getattr(models, KINDS[config.kind])(
            config.hidden, config.hidden, config.layers, dropout=config.dropout, act=config.act,
            norm=config.norm, jk="last", **extra,
        )  # fmt: skip
        self.gnn.lin = nn.Identity()

    def states(
        self, x: Float[Tensor, "nodes in_dim"], edge_index: Int[Tensor, "2 edges"]
    ) -> Iterator[Float[Tensor, "nodes hidden"]]:
        """Hidden states 0 to ``layers``, one by one as they are computed."""
        x = self.embed(x)
        yield x
        for conv, norm in zip(self.gnn.convs, self.gnn.norms, strict=True):
            x = self.gnn.act(norm(conv(self.gnn.dropout(x), edge_index)))
            yield x

    def forward(
        self, x: Float[Tensor, "nodes in_dim"], edge_index: Int[Tensor, "2 edges"]
    ) -> Float[Tensor, "nodes states hidden"]:
        """All hidden states."""
        return torch.stack(list(self.states(x, edge_index)), dim=1)


class PyGBackbone(Backbone):
    """A frozen :class:`GraphNetwork`; nodes are tokens, in the order of the graph.

    There are no pretrained ones to download: :func:`cenote.tuning.gnn.train_gnn` trains them.

    Args:
        network: the network.
        spec: what it was loaded from.
        device: where to run.
        dtype: of the weights; float32 unless given.
    """

    modality = "graph"
    module: GraphNetwork

    def __init__(
        self,
        network: GraphNetwork,
        spec: str,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.spec, self.config = spec, network.config
        self.module = network.to(device=device, dtype=dtype).eval().requires_grad_(False)
        self.dim, self.num_layers = self.config.hidden, self.config.layers

    def collate(self, items: Sequence[Any]) -> dict[str, Tensor]:
        """``torch_geometric.data.Data`` to ``x``, ``edge_index`` and ``batch`` of all graphs laid end to end.

        Raises:
            TypeError: node features that are not floating-point.
            ValueError: no graphs, a graph without nodes, features that are missing, of another width or not finite,
                edges that leave the graph; the graph is named by its place.
        """
        if not items:
            raise ValueError("there are no graphs")
        sizes = [_check(item, place, self.config.in_dim) for place, item in enumerate(items)]
        starts = torch.tensor([0, *sizes[:-1]]).cumsum(0)
        edges = [item.edge_index + start for item, start in zip(items, starts.tolist(), strict=True)]
        return {
            "x": torch.cat([item.x for item in items]),
            "edge_index": torch.cat(edges, dim=1),
            "batch": torch.repeat_interleave(torch.arange(len(items)), torch.tensor(sizes)),
        }

    def encode(self, batch: dict[str, Tensor], layers: tuple[int, ...], reduce: LayerReducer | None) -> Features:
        to_dense_batch = _pyg().utils.to_dense_batch
        weight = self.module.embed.weight
        x, edges = batch["x"].to(weight), batch["edge_index"].to(weight.device)
        index = batch["batch"].to(weight.device)
        graphs = int(index[-1]) + 1
        mask = to_dense_batch(index[:, None].to(weight.dtype), index, batch_size=graphs)[1]
        collector = Collector(layers, mask, reduce)
        for number, state in enumerate(self.module.states(x, edges)):
            if number in layers:
                collector(number, to_dense_batch(state, index, batch_size=graphs)[0])
        return collector.features(None, 0, None)

    def token_strings(self, item: Any) -> list[str]:
        """Numbers of the nodes."""
        return [str(node) for node in range(item.num_nodes)]

    def transform_id(self) -> str:
        return f"graphs of {self.config.in_dim} node features"

    def fingerprint(self) -> str:
        return weights_digest(self.module, asdict(self.config))


def load_pyg(
    name: str, device: torch.device | str | None = None, dtype: torch.dtype | None = None, **options: Any
) -> PyGBackbone:
    """A folder written by :func:`save_network`, or a description of an untrained network.

    Args:
        name: a folder, or ``"gcn(in_dim=7, hidden=64, layers=5, seed=0)"`` with the fields of
            :class:`GraphNetworkConfig`; ``options`` are further ones. The weights are drawn from ``seed`` (0).
        device, dtype: of the network.

    Raises:
        ValueError: no such folder or kind of network (nearest names suggested), unknown or missing settings, weights
            that do not fit.
        ImportError: PyTorch Geometric is missing.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if options:
            raise ValueError(f"{name!r} is trained: its settings are in its {CONFIG}, got {', '.join(options)}")
        return PyGBackbone(load_network(path), f"pyg:{name}", device, dtype)
    kind, settings = _parse(name)
    if kind not in KINDS:
        near = difflib.get_close_matches(kind, KINDS, n=3)
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise ValueError(f"'pyg:{name}' is neither a folder nor one of {', '.join(KINDS)}{hint}")
    settings |= options
    seed = settings.pop("seed", 0)
    _check_seed(seed)
    config = _config({"kind": kind, **settings}, f"'pyg:{name}'")
    shown = ", ".join(f"{key}={value!r}" for key, value in {**settings, "seed": seed}.items())
    return PyGBackbone(build_network(config, seed), f"pyg:{kind}({shown})", device, dtype)


def build_network(config: GraphNetworkConfig, seed: int = 0) -> GraphNetwork:
    """An untrained network with the weights of a seed."""
    _check_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GraphNetwork(config)


def save_network(network: GraphNetwork, folder: str | os.PathLike[str]) -> None:
    """Write ``model.safetensors`` and ``config.json``."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    write_all(Path(folder), {WEIGHTS: save(state), CONFIG: json.dumps(asdict(network.config), indent=2) + "\n"})


def load_network(folder: str | os.PathLike[str]) -> GraphNetwork:
    """Read what :func:`save_network` wrote."""
    folder = Path(folder)
    for file in (CONFIG, WEIGHTS):
        if not (folder / file).is_file():
            raise ValueError(f"a graph network is a folder with {CONFIG} and {WEIGHTS}; {folder} has no {file}")
    try:
        network = GraphNetwork(_config(json.loads((folder / CONFIG).read_text()), str(folder / CONFIG)))
        network.load_state_dict(load_file(folder / WEIGHTS))
    except (SafetensorError, RuntimeError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder} does not hold a graph network: {error}") from error
    return network


def _check(item: Any, place: int, in_dim: int) -> int:
    """The number of nodes of a graph that can be read."""
    x, edges = getattr(item, "x", None), getattr(item, "edge_index", None)
    if x is None or edges is None:
        raise ValueError(f"graph {place} has no node features x or no edge_index: expected torch_geometric Data")
    if not x.is_floating_point():
        raise TypeError(f"graph {place} has node features of type {x.dtype}: expected floating-point ones")
    if x.ndim != 2 or x.shape[1] != in_dim:
        raise ValueError(f"this network reads {in_dim} features a node, graph {place} has {tuple(x.shape)}")
    if not len(x):
        raise ValueError(f"graph {place} has no nodes")
    if not bool(x.isfinite().all()):
        raise ValueError(f"graph {place} has node features that are not finite")
    if edges.numel() and not 0 <= int(edges.min()) <= int(edges.max()) < len(x):
        raise ValueError(f"graph {place} has edges to nodes beyond its {len(x)}")
    return len(x)


def _parse(name: str) -> tuple[str, dict[str, Any]]:
    """``"gcn(in_dim=7)"`` to ``("gcn", {"in_dim": 7})``; only literals are read. ``ValueError`` for a setting given
    twice."""
    try:
        node = ast.parse(name.strip(), mode="eval").body
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.args:
            pairs = [(str(k.arg), ast.literal_eval(k.value)) for k in node.keywords]
        else:
            return name.strip(), {}
    except (SyntaxError, ValueError):
        return name.strip(), {}
    given = [key for key, _ in pairs]
    twice = next((key for key in given if given.count(key) > 1), None)
    if twice is not None:
        raise ValueError(f"'pyg:{name}' gives {twice} twice")
    return node.func.id, dict(pairs)


def _check_seed(seed: Any) -> None:
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ValueError(f"seed must be a whole number from 0, got {seed!r}")


def _config(settings: dict[str, Any], where: str) -> GraphNetworkConfig:
    known = [field.name for field in fields(GraphNetworkConfig)]
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise ValueError(f"{where}: unknown setting {unknown[0]!r}; known are {', '.join(known)}")
    missing = [name for name in ("kind", "in_dim") if name not in settings]
    if missing:
        raise ValueError(f"{where} needs {' and '.join(missing)} (in_dim is the width of the node features)")
    if not isinstance(settings.get("act", ""), str):
        raise ValueError(f"{where}: act must be the name of an activation, got {settings['act']!r}")
    if not isinstance(settings.get("dropout", 0), int | float):
        raise ValueError(f"{where}: dropout must be a number, got {settings['dropout']!r}")
    return GraphNetworkConfig(**settings)


def _pyg() -> Any:
    try:
        import torch_geometric.nn
        import torch_geometric.utils
    except ImportError as error:
        raise ImportError("graph networks need PyTorch Geometric: pip install 'cenote[graph]'") from error
    return torch_geometric
