"""Graph archives, the TU collection, folds, and graphs that cannot be read."""

import numpy as np
import pytest
import torch

pytest.importorskip("torch_geometric")
from cenote.data import load_data
from cenote.data.graphs import MAX_DEGREE, one_hot, stratified_folds


def archive(path, change=None):
    """40 rings of 3 to 6 nodes of classes 0 to 2; the label is whether the ring is longer than 4."""
    generator = np.random.default_rng(0)
    sizes = generator.integers(3, 7, size=40)
    starts = np.concatenate([[0], sizes.cumsum()])
    edges = []
    for start, size in zip(starts, sizes, strict=False):
        ring = np.arange(size)
        for step in (1, -1):
            edges.append(np.stack([start + ring, start + (ring + step) % size]))
    arrays = {
        "node_tag": generator.integers(0, 3, size=starts[-1]).astype(np.int16),
        "node_ptr": starts.astype(np.int32),
        "edge_index": np.concatenate(edges, axis=1).astype(np.int32),
        "edge_ptr": (2 * starts).astype(np.int32),
        "y": (sizes > 4).astype(np.int8),
        "fold": (np.arange(40) % 10).astype(np.int8),
    }
    (change or (lambda a: None))(arrays)
    np.savez(path, **arrays)
    return arrays


def test_graphs_are_given_out_with_local_numbers(tmp_path):
    arrays = archive(tmp_path / "rings.npz")
    data = load_data(tmp_path / "rings.npz", fold=3)
    assert (data.modality, data.task, data.classes) == ("graph", "classification", ("0", "1"))
    assert (len(data.train), len(data.validation), len(data.test)) == (32, 4, 4)
    assert list(data.test.ids) == [f"graph {n}" for n in (3, 13, 23, 33)]
    assert list(data.validation.ids) == [f"graph {n}" for n in (4, 14, 24, 34)]
    for place, number in enumerate((3, 13, 23, 33)):
        graph, start, stop = data.test.items[place], *arrays["node_ptr"][number : number + 2]
        assert graph.x.dtype == torch.float32
        assert graph.x.argmax(dim=1).tolist() == arrays["node_tag"][start:stop].tolist()
        assert torch.equal(graph.x.sum(dim=1), torch.ones(stop - start))
        assert graph.num_nodes == stop - start
        assert graph.edge_index.tolist() == (arrays["edge_index"][:, 2 * start : 2 * stop] - start).tolist()
        assert data.test.targets[place] == arrays["y"][number]


def test_ten_folds_test_every_graph_once(tmp_path):
    archive(tmp_path / "rings.npz")
    tested, validated = [], []
    for fold in range(10):
        data = load_data(tmp_path / "rings.npz", fold=fold)
        assert not {*data.test.ids} & ({*data.train.ids} | {*data.validation.ids})
        tested += data.test.ids
        validated += data.validation.ids
    assert sorted(tested) == sorted(validated) == sorted(f"graph {n}" for n in range(40))
    assert len({load_data(tmp_path / "rings.npz", fold=f).test.fingerprint for f in range(10)}) == 10
    with pytest.raises(ValueError, match=r"0\.\.9, got 10"):
        load_data(tmp_path / "rings.npz", fold=10)
    with pytest.raises(ValueError, match="sets of graphs, not to 'digits'"):
        load_data("digits", fold=0)


def test_without_a_fold_the_usual_fractions(tmp_path):
    archive(tmp_path / "rings.npz")
    data = load_data(tmp_path / "rings.npz", test_fraction=0.25)
    assert (len(data.train), len(data.test)) == (27, 10)


def test_degrees_stand_in_for_a_single_class():
    targets = np.array([0] * 100 + [1] * 2)
    assert one_hot(np.zeros(3, dtype=int), targets, 3).argmax(axis=1).tolist() == [MAX_DEGREE, 2, 0]
    assert one_hot(np.array([1, 0]), targets, 2).shape == (2, 2)
    with pytest.raises(ValueError, match="count from 0"):
        one_hot(np.array([-1, 0]), targets, 2)


def test_folds_made_here_are_stratified():
    labels = np.array([0] * 30 + [1] * 70)
    folds = stratified_folds(labels)
    assert np.bincount(folds[labels == 0]).tolist() == [3] * 10
    assert np.bincount(folds[labels == 1]).tolist() == [7] * 10


def spoil(arrays):
    """Features of our own with a hole in graph 5, an edge out of graph 7."""
    arrays["x"] = np.ones((len(arrays["node_tag"]), 2), dtype=np.float32)
    arrays["x"][arrays["node_ptr"][5] + 1, 0] = np.nan
    arrays["edge_index"][1, arrays["edge_ptr"][7]] = arrays["node_ptr"][8]


def test_bad_graphs_are_named_and_skipped(tmp_path):
    archive(tmp_path / "bad.npz", spoil)
    with pytest.raises(ValueError, match=r"graph 7 .*an edge leaves the graph of \d nodes"):
        load_data(tmp_path / "bad.npz", fold=5)
    data = load_data(tmp_path / "bad.npz", fold=5, on_error="skip")
    assert {(s.split, s.id) for s in data.skipped} == {("test", "graph 5"), ("train", "graph 7")}
    assert {s.reason.split()[0] for s in data.skipped} == {"node", "an"}
    assert len(data.train) + len(data.validation) + len(data.test) == 38


def test_empty_graphs_are_skipped(tmp_path):
    def hollow(arrays):
        for ends in ("node", "edge"):
            ptr = arrays[f"{ends}_ptr"]
            arrays[f"{ends}_ptr"] = np.concatenate([ptr[:3], ptr[2:]])
        arrays["y"] = np.insert(arrays["y"], 2, 0)
        arrays["fold"] = np.insert(arrays["fold"], 2, 2)

    archive(tmp_path / "hollow.npz", hollow)
    data = load_data(tmp_path / "hollow.npz", on_error="skip")
    assert [(s.id, s.reason) for s in data.skipped] == [("graph 2", "the graph has no nodes")]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda a: a.pop("y"), ValueError, "y is missing"),
        (lambda a: a.pop("node_tag"), ValueError, "node_tag is missing"),
        (lambda a: a.update(node_ptr=a["node_ptr"][:-1]), ValueError, "node_ptr of .* must rise"),
        (lambda a: a.update(edge_ptr=a["edge_ptr"][::-1]), ValueError, "edge_ptr of .* must rise"),
        (lambda a: a.update(y=a["y"][:-1]), ValueError, "holds 40 graphs"),
        (lambda a: a.update(x=np.ones((len(a["node_tag"]), 2), dtype=int)), TypeError, "features of type int64"),
        (lambda a: a.update(node_tag=a["node_tag"] + 0.5), TypeError, "node_tag of .* whole numbers, got float64"),
        (lambda a: a.update(fold=a["fold"][:3]), ValueError, r"a fold for each of 40 graphs, got \(3,\)"),
        (lambda a: a.update(fold=a["fold"] + 5), ValueError, r"fold 2 of .* holds no graph"),
        (lambda a: a.update(fold=a["fold"] % 3), ValueError, r"fold 3 of .* holds no graph"),
    ],
)
def test_bad_archives(tmp_path, change, error, message):
    archive(tmp_path / "bad.npz", change)
    with pytest.raises(error, match=message):
        load_data(tmp_path / "bad.npz", fold=2)


def test_tu_sets_come_through_pyg(tmp_path, monkeypatch):
    """The raw files of a made-up set in the cache, so that nothing is downloaded."""
    monkeypatch.setenv("CENOTE_CACHE", str(tmp_path))
    raw = tmp_path / "tu" / "TOY" / "raw"
    raw.mkdir(parents=True)
    sizes = [2 + n % 3 for n in range(40)]
    starts = np.cumsum([0, *sizes])
    pairs = [(s + i + 1, s + (i + 1) % n + 1) for s, n in zip(starts, sizes, strict=False) for i in range(n)]
    both = sorted({(a, b) for a, b in pairs} | {(b, a) for a, b in pairs})
    (raw / "TOY_A.txt").write_text("".join(f"{a}, {b}\n" for a, b in both))
    (raw / "TOY_graph_indicator.txt").write_text("".join(f"{g + 1}\n" * n for g, n in enumerate(sizes)))
    (raw / "TOY_graph_labels.txt").write_text("".join(f"{1 - 2 * (n == 3)}\n" for n in sizes))
    (raw / "TOY_node_labels.txt").write_text("".join("0\n1\n2\n3\n"[: 2 * n] for n in sizes))
    data = load_data("tu:TOY", fold=0)
    assert (data.modality, len(data.test), len(data.train)) == ("graph", 4, 32)
    number = int(data.test.ids[0].split()[1])
    graph = data.test.items[0]
    assert graph.x.argmax(dim=1).tolist() == list(range(sizes[number]))
    local = {
        (a - starts[number] - 1, b - starts[number] - 1) for a, b in both if starts[number] < a <= starts[number + 1]
    }
    assert {tuple(edge) for edge in graph.edge_index.T.tolist()} == local
    monkeypatch.setattr(
        "torch_geometric.datasets.TUDataset.download", lambda self: (_ for _ in ()).throw(OSError("no"))
    )
    with pytest.raises(ValueError, match="cannot load the TU set 'NOWHERE': no"):
        load_data("tu:NOWHERE")
