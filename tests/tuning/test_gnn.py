"""Training graph networks with readouts, readouts on frozen histories, and the ten-fold protocol."""

import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("torch_geometric")
from cenote.backbones import load_backbone
from cenote.data import load_data
from cenote.probe import Readout
from cenote.tuning import gnn_folds
from cenote.tuning.gnn import GNNSettings, PooledHistory, train_gnn, train_head
from cenote.tuning.gnn_data import PackedGraphs
from cenote.tuning.gnn_folds import cross_validate
from data.test_graphs import archive

QUICK = GNNSettings(hidden=16, layers=2, epochs=8, batch_size=16, lr=1e-2)


@pytest.fixture(scope="module")
def rings(tmp_path_factory):
    """Rings whose nodes all carry the class of their ring, so that every readout can tell it."""
    path = tmp_path_factory.mktemp("rings") / "rings.npz"

    def told(arrays):
        owner = torch.repeat_interleave(torch.arange(40), torch.tensor(arrays["node_ptr"]).diff()).numpy()
        arrays["node_tag"][:] = arrays["y"][owner]

    archive(path, told)
    return str(path)


def test_packed_graphs_are_those_that_the_backbone_collates(rings):
    split = load_data(rings, fold=0).train
    packed = PackedGraphs(split)
    index = torch.tensor([7, 0, 3])
    batch = packed.take(index)
    wanted = load_backbone("pyg:gcn(in_dim=2)").collate([split.items[int(n)] for n in index])
    assert torch.equal(batch.x, wanted["x"])
    assert torch.equal(batch.edge_index, wanted["edge_index"])
    assert torch.equal(batch.batch, wanted["batch"])
    assert batch.targets.tolist() == split.targets[index].tolist()
    seen = [b.targets for b in packed.batches(5, torch.Generator().manual_seed(0))]
    assert torch.cat(seen).sort().values.tolist() == split.targets.sort().values.tolist()


@pytest.mark.parametrize("readout", ["mean", "histograph", "weighted_layers > mean"])
def test_end_to_end_training_learns_and_repeats(rings, readout):
    data = load_data(rings, fold=0)
    run = train_gnn("gin", data, readout, QUICK)
    assert run.validation == 1.0
    assert run.test == 1.0
    assert 1 <= run.epoch <= 8
    again = train_gnn("gin", data, readout, QUICK)
    assert all(
        torch.equal(a, b) for a, b in zip(run.head.state_dict().values(), again.head.state_dict().values(), strict=True)
    )
    other = train_gnn("gin", data, readout, replace(QUICK, seed=1))
    assert not torch.equal(other.head.weight, run.head.weight)
    assert (run.largest_weight > 0) == (readout == "histograph")


def test_a_saved_network_is_a_backbone_with_the_same_history(rings, tmp_path):
    data = load_data(rings, fold=0)
    run = train_gnn("gcn", data, "mean", QUICK)
    run.save(tmp_path / "net")
    backbone = load_backbone(f"pyg:{tmp_path / 'net'}")
    packed = PackedGraphs(data.test)
    batch = packed.take(torch.arange(len(packed)))
    features = backbone(backbone.collate([data.test.items[n] for n in range(len(packed))]), (0, 1, 2))
    torch.testing.assert_close(
        features.hidden.transpose(1, 2)[features.mask],
        packed.with_states(run.network).take(torch.arange(len(packed))).x,
    )
    with torch.no_grad():
        logits = run.head(run.readout(run.network(batch.x, batch.edge_index), batch.batch, len(packed)))
    assert float((logits.argmax(1) == batch.targets).double().mean()) == run.test


def test_a_head_on_a_frozen_network_leaves_it_alone(rings):
    data = load_data(rings, fold=1)
    network = train_gnn("gin", data, "mean", QUICK).network.requires_grad_(True)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    run = train_head(network, data, "histograph", QUICK)
    assert run.test == 1.0
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert all(parameter.grad is None for parameter in run.network.parameters())
    half = train_head(network, data, "histograph", QUICK, cache_dtype=torch.float16)
    assert half.test == 1.0
    assert PackedGraphs(data.test).with_states(network, torch.float16).x.dtype == torch.float16


def test_folds_are_kept_and_taken_up_again(rings, tmp_path, monkeypatch):
    path, calls = tmp_path / "kept" / "gin.json", []
    train = gnn_folds.train_gnn
    monkeypatch.setattr(gnn_folds, "train_gnn", lambda *a, **k: calls.append(1) or train(*a, **k))
    lines = []
    first = cross_validate("gin", rings, "mean", QUICK, folds=range(2), path=path, progress=lines.append)
    assert (len(calls), len(lines)) == (2, 2)
    more = cross_validate("gin", rings, "mean", QUICK, folds=range(3), path=path)
    assert len(calls) == 3
    assert more.accuracies[:2] == first.accuracies
    assert more.mean == pytest.approx(sum(more.accuracies) / 3)
    assert list(json.loads(path.read_text())["folds"]) == ["0", "1", "2"]
    more.save(tmp_path / "folds.csv")
    assert (tmp_path / "folds.csv").read_text().startswith("fold,accuracy,validation")
    with pytest.raises(ValueError, match="another configuration"):
        cross_validate("gin", rings, "max", QUICK, folds=range(3), path=path)
    spread = gnn_folds.CrossValidation("x", (0, 1), (0.5, 0.7), ({}, {}))
    assert (spread.mean, spread.std) == (pytest.approx(0.6), pytest.approx(0.02**0.5))


def test_folds_are_kept_for_one_set_of_graphs(rings, tmp_path):
    quick, path = replace(QUICK, epochs=1), tmp_path / "folds.json"
    cross_validate("gin", rings, "mean", quick, folds=(0,), path=path)
    (tmp_path / "elsewhere").mkdir()
    archive(tmp_path / "elsewhere" / "rings.npz")  # the same name, other node classes
    with pytest.raises(ValueError, match="another configuration"):
        cross_validate("gin", str(tmp_path / "elsewhere" / "rings.npz"), "mean", quick, folds=(0,), path=path)
    make = lambda dim, states: PooledHistory("mean", dim, states)  # noqa: E731
    assert len(cross_validate("gin", rings, make, quick, folds=(0,)).accuracies) == 1
    with pytest.raises(ValueError, match="give a named function"):
        cross_validate("gin", rings, make, quick, folds=(0,), path=tmp_path / "other.json")


@pytest.mark.parametrize("readout", ["mean", "histograph", "weighted_layers > mean", "latent_attention(num_latents=4)"])
def test_a_trained_readout_is_saved_with_its_network(rings, readout, tmp_path):
    data = load_data(rings, fold=0)
    run = train_gnn("gin", data, readout, replace(QUICK, epochs=2))
    run.save(tmp_path / "net")
    backbone, loaded = load_backbone(f"pyg:{tmp_path / 'net'}"), Readout.from_pretrained(tmp_path / "net" / "readout")
    assert loaded.config.backbone == backbone.spec
    assert loaded.config.backbone_fingerprint == backbone.fingerprint()
    assert loaded.config.classes == data.classes == run.classes
    packed = PackedGraphs(data.test)
    batch = packed.take(torch.arange(len(packed)))
    assert len(packed.nodes.unique()) > 1
    with torch.no_grad():
        wanted = run.head(run.readout(run.network(batch.x, batch.edge_index), batch.batch, len(packed)))
    features = backbone(backbone.collate([data.test.items[n] for n in range(len(packed))]), loaded.config.layers)
    torch.testing.assert_close(loaded(features), wanted, rtol=1e-5, atol=1e-5)


def test_a_readout_made_by_a_function_cannot_be_named(rings, tmp_path):
    class Last(torch.nn.Module):
        out_dim = 16

        def forward(self, states, batch, size):
            return torch.zeros(size, 16).index_add(0, batch, states[:, -1])

    run = train_gnn("gin", load_data(rings, fold=0), lambda dim, states: Last(), replace(QUICK, epochs=1))
    run.save(tmp_path / "net")
    assert not (tmp_path / "net" / "readout").exists()
    with pytest.raises(ValueError, match="given by name"):
        run.as_readout(tmp_path / "net")


def test_packed_graphs_say_where_everything_lives(rings):
    data = load_data(rings, fold=0)
    packed = PackedGraphs(data.train, "cpu")
    wanted = packed.take(torch.tensor([7, 0, 3]))
    # A tensor made without a device would be of another one here, and would not meet the rest.
    with torch.device("meta"):
        found = PackedGraphs(data.train, "cpu").take(torch.tensor([7, 0, 3], device="cpu"))
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
        batches = list(packed.batches(5, torch.Generator("cpu").manual_seed(0)))
    assert {part.device.type for batch in batches for part in batch} == {"cpu"}


def test_a_device_changes_nothing_on_the_cpu(rings):
    data = load_data(rings, fold=0)
    run = train_gnn("gin", data, "histograph", QUICK)
    there = train_gnn("gin", data, "histograph", QUICK, device=torch.device("cpu"))
    assert torch.equal(run.head.weight, there.head.weight)
    assert train_head(run.network, data, "mean", QUICK, device="cpu").head.weight.device.type == "cpu"


def test_other_data_is_refused():
    with pytest.raises(ValueError, match="expected graphs with classes, got images"):
        train_gnn("gcn", load_data("digits", limit=20))
    with pytest.raises(ValueError, match="unknown pooling"):
        PooledHistory("meen", 4, 3)
