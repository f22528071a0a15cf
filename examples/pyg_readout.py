"""Readouts of graphs in PyTorch Geometric: any order-free pooling as an aggregation, HistoGraph on all layers."""

import torch
from torch_geometric.data import Batch, Data
from torch_geometric.nn import SAGEConv
from torch_geometric.nn.models import GCN

from cenote.backbones import load_backbone
from cenote.integrations.pyg import HistoryAggregation, PoolingAggregation

torch.manual_seed(0)


def ring(nodes: int) -> Data:
    step = torch.arange(nodes)
    edges = torch.stack([step, (step + 1) % nodes])
    return Data(x=torch.randn(nodes, 16), edge_index=torch.cat([edges, edges.flip(0)], dim=1))


graphs = [ring(nodes) for nodes in (4, 7, 5)]
batch = Batch.from_data_list(graphs)

# A readout behind a PyG model, and the aggregation of messages inside a PyG layer.
states = GCN(16, 32, num_layers=3)(batch.x, batch.edge_index)
for spec in ("mean", "gem", "efficient_probing(num_queries=4)"):
    print(f"{spec:34} {tuple(PoolingAggregation(spec, dim=32)(states, batch.batch).shape)}")
layer = SAGEConv(16, 32, aggr=PoolingAggregation("gem", dim=16))
print(f"{'gem inside SAGEConv':34} {tuple(layer(batch.x, batch.edge_index).shape)}")

# All layers of a graph network: one signed weight a layer and graph.
backbone = load_backbone("pyg:gcn(in_dim=16, hidden=32, layers=3)")
features = backbone(backbone.collate(graphs), (0, 1, 2, 3))
history = features.hidden.transpose(1, 2)[features.mask]  # (nodes, layers, dim)
readout = HistoryAggregation("histograph", dim=32)
print(f"{'histograph':34} {tuple(readout(history, batch.batch).shape)}")
weights = readout.pooling.read_graphs(history, batch.batch).layer_weights
print(f"layer weights of each graph sum to {[round(total, 4) for total in weights.sum(dim=1).tolist()]}")
