"""The main job on graphs of different sizes."""

import json

import pytest
import torch

pytest.importorskip("torch_geometric")
from cenote import cli
from cenote.backbones import load_backbone
from cenote.data import load_data
from cenote.pooling import create_pooling
from cenote.probe import Readout, probe
from cenote.probe.heads import Member, StackedReadout
from cenote.probe.plan import group
from cenote.probe.predict import predict
from data.test_graphs import archive


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("graphs")

    def told(arrays):
        owner = torch.repeat_interleave(torch.arange(40), torch.tensor(arrays["node_ptr"]).diff()).numpy()
        arrays["node_tag"][:] = arrays["y"][owner]

    archive(folder / "rings.npz", told)
    result = probe(
        "pyg:gin(in_dim=2, hidden=8, layers=3)",
        str(folder / "rings.npz"),
        "mean,histograph,weighted_layers > mean,efficient_probing(num_queries=4),knn",
        seeds=2,
        epochs=20,
        lrs=[1e-2],
        data_options={"fold": 0},
        out=folder / "out",
        cache_dir=str(folder / "cache"),
    )
    return result, folder


def test_readouts_of_graphs_are_compared(run):
    result, _ = run
    rows = {row.readout: row for row in result.rows}
    assert len(rows) == 5
    assert rows["histograph"].layers == "0,1,2,3"
    assert rows["weighted_layers > mean"].layers == "1,2,3"
    assert rows["mean"].score == 1.0
    assert rows["histograph"].score == 1.0


def test_the_best_readout_predicts_graphs(run):
    result, folder = run
    readout = Readout.from_pretrained(folder / "out" / "best")
    test = load_data(folder / "rings.npz", fold=0).test
    answers = predict(readout, load_backbone(readout.config.backbone), [test.items[n] for n in range(len(test))], top=1)
    truth = [result.classes[t] for t in test.targets.tolist()]
    assert answers["label_1"].tolist() == truth


def test_all_on_graphs_includes_histograph_and_all_elsewhere_does_not():
    assert "histograph" in group("all", "graph")
    assert "histograph" not in group("all", "image")


def test_stacked_copies_are_the_single_ones():
    members = [Member(1e-3, 1.0, seed) for seed in range(3)]
    stack = StackedReadout(lambda: create_pooling("histograph", dim=8, num_layers=4), members, 2).eval()
    hidden = torch.randn(5, 4, 7, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(7) < torch.tensor([7, 3, 1, 5, 6])[:, None]
    outputs = stack(hidden, mask)
    for number in range(3):
        pooling, norm, head = stack.member(stack.state(), number)
        torch.testing.assert_close(outputs[number], head(norm(pooling(hidden, mask))), rtol=1e-4, atol=1e-5)


def test_a_fold_from_the_command_line(run, tmp_path, capsys):
    _, folder = run
    found = {}
    for fold in (0, 4):
        status = cli.main(
            ["probe", "--backbone", "pyg:gin(in_dim=2, hidden=8, layers=3)", "--data", str(folder / "rings.npz"),
             "--readouts", "mean", "--seeds", "1", "--fold", str(fold), "--out", str(tmp_path / str(fold)),
             "--cache-dir", str(folder / "cache")]
        )  # fmt: skip
        assert status == 0, capsys.readouterr().err
        settings = json.loads((tmp_path / str(fold) / "settings.json").read_text())
        settings = settings.get("settings", settings)
        found[fold] = settings["data_fingerprint"]
        wanted = load_data(folder / "rings.npz", fold=fold)
        assert settings["data"].endswith(f"(fold {fold})")
        assert found[fold] == {
            "train": wanted.train.fingerprint, "validation": wanted.validation.fingerprint,
            "test": wanted.test.fingerprint,
        }  # fmt: skip
    assert found[0] != found[4]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "digits", "--fold", "0"], "fold applies to sets of graphs, not to 'digits'"),
        (["--data", "digits", "--fold", "0", "--task", "retrieval"], "--fold divides sets of graphs"),
    ],
)
def test_folds_of_other_data_are_refused(options, message, tmp_path, capsys):
    assert cli.main(["probe", *options, "--out", str(tmp_path)]) != 0
    assert message in " ".join(capsys.readouterr().err.split())
