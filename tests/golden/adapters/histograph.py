"""HistoGraph on graphs laid end to end, and the same with the paper's average over the nodes of the whole batch."""

import torch
from torch import Tensor

from cenote.ops.layer_history import layer_positions
from cenote.pooling.histograph import HistoGraph
from golden.cases import Case

SIZES = ("in_dim", "hidden_dim", "num_layers", "num_heads")
OPTIONS = ("normalisation", "residual", "layer_norm", "eps", "widths", "positions")


@torch.no_grad()
def run(case: Case) -> dict[str, Tensor]:
    if not case.target.startswith("HistoGraph"):
        raise ValueError(f"unknown target {case.target!r}")
    unknown = set(case.config) - {*SIZES, *OPTIONS}
    if unknown:
        raise ValueError(f"unknown settings {sorted(unknown)}")
    history, batch = case.inputs["history"], case.inputs["batch"].long()
    pool = HistoGraph.from_reference(case.state, **case.config).eval()
    shared = HistoGraph.from_reference(case.state, weights="batch", **case.config).eval()
    read, together = pool.read_graphs(history, batch), shared.read_graphs(history, batch)
    return {
        "layer_pe": layer_positions(history.shape[1], pool.out_dim),
        "layer_scores": read.layer_scores,
        "layer_weights": read.layer_weights,
        "node_layer_pooled": read.mixed,
        "node_out": read.nodes,
        "graph": read.graph,
        "layer_weights_batch_shared": together.layer_weights,
        "graph_batch_shared": together.graph,
    }
