"""Graph networks as backbones: their layer history, independence of batch mates, saving, and bad graphs."""

import pytest
import torch

pytest.importorskip("torch_geometric")
from torch_geometric.data import Data

from cenote.backbones import load_backbone
from cenote.backbones.pyg import GraphNetworkConfig, build_network, save_network

SIZES = (5, 1, 9, 3)


def graphs(sizes=SIZES, width=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    found = []
    for size in sizes:
        adjacency = torch.rand(size, size, generator=generator).triu(1) > 0.5
        edges = (adjacency | adjacency.T).nonzero().T.contiguous()
        found.append(Data(x=torch.randn(size, width, generator=generator), edge_index=edges))
    return found


def load(kind="gcn", **options):
    return load_backbone(f"pyg:{kind}(in_dim=4, hidden=8, layers=3)", **options)


@pytest.mark.parametrize("norm", [None, "batch", "layer"])
@pytest.mark.parametrize("kind", ["gcn", "gin", "gat", "sage"])
def test_history_of_every_kind(kind, norm):
    backbone = load(kind, norm=norm)
    network = backbone.module
    with torch.no_grad():
        for buffer in network.buffers():  # batch statistics that are not those of a fresh norm
            if buffer.is_floating_point():
                buffer.add_(0.3)
    items = graphs()
    batch = backbone.collate(items)
    features = backbone(batch, (0, 1, 2, 3))
    assert features.hidden.shape == (4, 4, 9, 8)
    assert features.mask.sum(1).tolist() == list(SIZES)
    assert (features.grid, features.prefix, backbone.modality, backbone.num_layers) == (None, 0, "graph", 3)
    # The last hidden state is what PyTorch Geometric's own forward gives, the first the linear map of the features.
    last = network.gnn(network.embed(batch["x"]), batch["edge_index"])
    torch.testing.assert_close(features.hidden[:, 3][features.mask], last)
    torch.testing.assert_close(features.hidden[:, 0][features.mask], network.embed(batch["x"]))
    assert (features.hidden[:, 1:] >= 0).all()  # every layer's state is taken behind its activation
    for place, item in enumerate(items):
        alone = backbone(backbone.collate([item]), (0, 1, 2, 3))
        torch.testing.assert_close(alone.hidden[0], features.hidden[place, :, : SIZES[place]], rtol=1e-5, atol=1e-6)


def test_streamed_reduction_sees_every_layer_masked():
    backbone = load()
    batch = backbone.collate(graphs())
    features = backbone(batch, "all")

    def mean(hidden, mask):
        return (hidden * mask[..., None]).sum(1, keepdim=True) / mask.sum(1)[:, None, None]

    reduced = backbone(batch, "all", reduce=mean)
    assert reduced.hidden.shape == (4, 3, 1, 8)
    wanted = torch.stack([mean(features.hidden[:, l], features.mask) for l in range(3)], dim=1)
    torch.testing.assert_close(reduced.hidden, wanted)


def test_saved_network_is_loaded_frozen(tmp_path):
    network = build_network(GraphNetworkConfig("gin", 4, 8, 3, "batch", dropout=0.5), seed=3)
    save_network(network, tmp_path / "net")
    backbone = load_backbone(f"pyg:{tmp_path / 'net'}")
    batch = backbone.collate(graphs())
    assert not any(parameter.requires_grad for parameter in backbone.module.parameters())
    with torch.no_grad():
        wanted = network.eval()(batch["x"], batch["edge_index"])
    features = backbone(batch, (0, 1, 2, 3))
    torch.testing.assert_close(features.hidden.transpose(1, 2)[features.mask], wanted)
    other = load_backbone("pyg:gin(in_dim=4, hidden=8, layers=3, norm='batch', dropout=0.5, seed=4)")
    assert backbone.fingerprint() != other.fingerprint()
    assert load_backbone(other.spec).fingerprint() == other.fingerprint()
    assert load("gcn").transform_id() != load_backbone("pyg:gcn(in_dim=5)").transform_id()
    assert backbone.token_strings(graphs()[0]) == ["0", "1", "2", "3", "4"]


def test_half_precision():
    backbone = load(dtype="bfloat16")
    features = backbone(backbone.collate(graphs()), "last")
    assert features.hidden.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("pyg:gnc(in_dim=4)", "did you mean .*'gcn'"),
        ("pyg:gcn", "needs in_dim"),
        ("pyg:gcn(in_dim=4, width=8)", "unknown setting 'width'"),
        ("pyg:gcn(in_dim=0)", "in_dim must be a positive whole number"),
        ("pyg:gcn(in_dim=4, norm='graph')", "'batch', 'layer' or None"),
        ("pyg:gcn(in_dim=4, in_dim=4)", "gives in_dim twice"),
        ("pyg:gcn(in_dim=4, act='rulu')", "act must be an activation .*'rulu'"),
        ("pyg:gcn(in_dim=4, act=3)", "act must be the name"),
        ("pyg:gcn(in_dim=4, dropout='much')", "dropout must be a number"),
        ("pyg:gcn(in_dim=4, dropout=1.5)", "dropout must lie between 0 and 1, got 1.5"),
        ("pyg:gcn(in_dim=4, seed='a')", "seed must be a whole number from 0, got 'a'"),
        ("pyg:gcn(in_dim=4, seed=-1)", "seed must be a whole number from 0, got -1"),
        ("pyg:", "names no model"),
    ],
)
def test_bad_specs(spec, message):
    with pytest.raises(ValueError, match=message):
        load_backbone(spec)


def test_bad_folders(tmp_path):
    with pytest.raises(ValueError, match=r"has no config\.json"):
        load_backbone(f"pyg:{tmp_path}")
    save_network(build_network(GraphNetworkConfig("gcn", 4, 8, 2)), tmp_path)
    with pytest.raises(ValueError, match="its settings are in its"):
        load_backbone(f"pyg:{tmp_path}", hidden=16)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="does not hold a graph network"):
        load_backbone(f"pyg:{tmp_path}")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(3, 4).long()}, TypeError, "graph 1 has node features of type torch.int64"),
        ({"x": torch.ones(3, 5)}, ValueError, r"reads 4 features a node, graph 1 has \(3, 5\)"),
        ({"x": torch.full((3, 4), float("nan"))}, ValueError, "graph 1 has node features that are not finite"),
        ({"x": torch.ones(0, 4), "edge_index": torch.zeros(2, 0).long()}, ValueError, "graph 1 has no nodes"),
        ({"edge_index": torch.tensor([[0], [3]])}, ValueError, "beyond its 3"),
        ({"x": None}, ValueError, "no node features"),
    ],
)
def test_bad_graphs_are_named(change, error, message):
    good, bad = graphs((4, 3))
    for name, value in change.items():
        bad[name] = value
    with pytest.raises(error, match=message):
        load().collate([good, bad])


def test_no_graphs():
    with pytest.raises(ValueError, match="no graphs"):
        load().collate([])
