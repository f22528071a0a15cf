"""HistoGraph's reproduction: its generated tasks are what they say, and its peers are called right."""

import pytest
import torch

from cenote.reproductions import available, histograph_smoothing
from cenote.reproductions.base import Settings
from cenote.reproductions.histograph import run
from cenote.reproductions.histograph_difference import FreeScores, fit, opposed_layers
from cenote.reproductions.histograph_exact import kept_numbers, work
from cenote.reproductions.histograph_smoothing import PlainGCN, coloured_graphs, smoothing_accuracy
from cenote.reproductions.run import load_reproduction


def test_it_is_offered():
    assert "histograph" in available()
    assert load_reproduction("histograph").claim


def test_coloured_graphs_differ_only_in_what_edges_prefer():
    x, adjacency, mask, labels = coloured_graphs(4000, torch.Generator().manual_seed(0))
    assert mask.sum(1).min() >= 12
    assert mask.sum(1).max() <= 24
    assert torch.equal(adjacency, adjacency.mT)
    assert not adjacency.diagonal(dim1=1, dim2=2).any()
    assert not x[~mask].any()
    pairs = (mask[:, :, None] & mask[:, None, :]).float() * (1 - torch.eye(24))
    equal = x @ x.mT * pairs
    density = {}
    for label in (0, 1):
        own = labels == label
        density[label] = [float((adjacency * kind)[own].sum() / kind[own].sum()) for kind in (pairs, equal)]
    assert density[0][0] == pytest.approx(0.25, abs=0.01)
    assert density[0][1] == pytest.approx(0.25, abs=0.02)
    assert density[1][0] == pytest.approx(0.25, abs=0.01)  # as many edges on the whole
    assert density[1][1] == pytest.approx(0.57, abs=0.02)


def test_plain_gcn_is_pygs():
    pyg = pytest.importorskip("torch_geometric.nn")
    x, adjacency, mask, _ = coloured_graphs(1, torch.Generator().manual_seed(1))
    count = int(mask.sum())
    network, conv = PlainGCN(1, glorot=True), pyg.GCNConv(32, 32)
    conv.lin.weight.data, conv.bias.data = network.layers[0].weight.data, network.layers[0].bias.data + 0.1
    network.layers[0].bias.data += 0.1
    embedded, after = network(x, adjacency)[0, :, :count]
    wanted = conv(embedded, adjacency[0, :count, :count].nonzero().T).relu()
    torch.testing.assert_close(after, wanted)


def test_depth_kills_the_mean_of_the_last_layer_but_not_the_history():
    assert smoothing_accuracy("mean", 16, 0, steps=60, test=400)[0] < 0.6
    assert smoothing_accuracy("jk", 16, 0, steps=60, test=400)[0] > 0.65


def test_opposed_layers_need_a_difference():
    history, labels = opposed_layers(4000, torch.Generator().manual_seed(0))
    mean = history.mean(dim=(2, 3))
    assert torch.equal((mean[:, 1] - mean[:, 0] > 0).long(), labels)
    for layer in range(3):
        assert ((mean[:, layer] > 0).long() == labels).double().mean() < 0.55


def test_free_signed_scores_fit_the_difference_and_softmax_cannot():
    accuracy, model = fit(FreeScores, "signed", 0, 1000)
    assert accuracy > 0.9
    weights = model.weights()
    assert weights[0] < -0.5
    assert weights[1] > 0.5
    assert fit(FreeScores, "softmax", 0, 300)[0] < 0.6


def test_costs_count_every_part():
    dim, nodes, layers = 64, 10, 3
    projections = (
        nodes * dim * dim * (1 + 1 + 1 + 1 + 1 + 3) + dim * dim
    )  # embed last, Wq, Wk, fold, embed mix, QKV; out
    attention = 2 * nodes * nodes * dim
    layerwise = 2 * layers * nodes * dim
    assert projections + attention + layerwise <= work(layers, nodes) <= 1.05 * (projections + attention + layerwise)
    assert kept_numbers(8, 20) > 8 * 20 * 64


def test_peers_by_size_give_the_same_numbers():
    pytest.importorskip("torch_geometric")
    from cenote.reproductions.histograph_peers import GraphMultiset, JumpingKnowledgeCat, SetTransformer

    torch.manual_seed(0)
    sizes = torch.tensor([3, 1, 8, 5, 2])
    batch = torch.repeat_interleave(torch.arange(5), sizes)
    states = torch.randn(19, 4, 16)
    for kind in (GraphMultiset, SetTransformer):
        peer = kind(16, 4).eval()
        torch.testing.assert_close(
            peer(states, batch, 6)[:5], peer.aggregation(states[:, -1], batch, dim_size=5), rtol=1e-4, atol=1e-5
        )
        assert not peer(states, batch, 6)[5].any()
    cat = JumpingKnowledgeCat(16, 4)
    wanted = torch.stack([states[batch == g, 1:].flatten(1).mean(0) for g in range(5)])
    torch.testing.assert_close(cat(states, batch, 5), wanted)


def test_findings_have_a_value_a_seed(monkeypatch):
    """The whole run at toy sizes: what is compared with what, not the numbers."""
    import cenote.reproductions.histograph as main

    asked = []

    def accuracy(name, layers, seed, steps, glorot=False):
        asked.append((name, layers, glorot))
        return {"mean": 0.5, "jk": 0.9, "signed": 0.92, "softmax": 0.93}[name], 12.0

    monkeypatch.setattr(main, "smoothing_accuracy", accuracy)
    monkeypatch.setattr(main, "difference_findings", lambda seeds, quick: [])
    monkeypatch.setattr(main, "exact_findings", list)
    found = run(Settings(quick=False, seeds=(0, 1, 2)))
    verdicts = {f.claim.split(" layers ")[1][:28]: f.verdict for f in found}
    assert [f.verdict for f in found[:5]] == ["holds", "holds", "holds", "holds", "does not hold"], verdicts
    assert all(len(f.values) == 3 for f in found)
    assert found[3].values == (pytest.approx(2.0),) * 3
    assert {(n, l) for n, l, _ in asked} == {
        ("signed", 16),
        ("mean", 16),
        ("jk", 16),
        ("softmax", 16),
        ("mean", 3),
        ("signed", 3),
    }
    assert histograph_smoothing.WIDTH == 32
