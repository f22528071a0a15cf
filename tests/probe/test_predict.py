"""Predictions of a saved readout, from Python and from the command line."""

import io
import json

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import cenote.backbones
from cenote.cli import main
from cenote.probe.inputs import read_inputs
from cenote.probe.predict import predict
from probe.models import PatchBackbone, make_readout


def picture(seed):
    quarters = np.random.default_rng(seed).integers(0, 256, (2, 2), dtype=np.uint8)
    return Image.fromarray(quarters.repeat(4, axis=0).repeat(4, axis=1))


def reference(readout, backbone, items):
    """One item at a time, straight through backbone and readout."""
    rows = [readout(backbone(backbone.collate([item]), readout.config.layers))[0] for item in items]
    return torch.stack(rows)


def test_rows_hold_the_most_probable_classes():
    backbone = PatchBackbone()
    readout, items = make_readout(backbone), [picture(k) for k in range(7)]
    frame = predict(readout, backbone, items, batch_size=3, top=2)
    assert list(frame) == ["item", "label_1", "probability_1", "label_2", "probability_2"]
    assert frame["item"].tolist() == [str(k) for k in range(7)]
    expected = reference(readout, backbone, items).softmax(-1).sort(descending=True)
    np.testing.assert_allclose(frame[["probability_1", "probability_2"]], expected.values[:, :2], rtol=1e-5)
    assert frame["label_2"].tolist() == [readout.config.classes[i] for i in expected.indices[:, 1]]
    assert len(predict(readout, backbone, items[:1], top=9).columns) == 7  # three classes, not nine


def test_batches_do_not_matter_nor_does_padding():
    backbone = PatchBackbone("text")
    readout, texts = (
        make_readout(backbone, tokens="both"),
        ["one", "one two three four", "a b", "longest of these many texts here"],
    )
    one, all_at_once = (predict(readout, backbone, texts, batch_size=n) for n in (1, 4))
    np.testing.assert_allclose(one["probability_1"], all_at_once["probability_1"], rtol=1e-5)
    assert one["label_1"].tolist() == all_at_once["label_1"].tolist()


def test_multilabel_and_regression_columns():
    backbone, items = PatchBackbone(), [picture(k) for k in range(6)]
    readout = make_readout(backbone, task="multilabel", seed=1)
    frame = predict(readout, backbone, items, top=1)
    probabilities = reference(readout, backbone, items).sigmoid()
    expected = [
        "; ".join(c for c, p in zip(readout.config.classes, row, strict=True) if p >= 0.5) for row in probabilities
    ]
    assert frame["labels"].tolist() == expected
    assert len(set(expected)) > 1
    assert list(frame) == ["item", "labels", "label_1", "probability_1"]
    one = make_readout(backbone, task="regression", outputs=1, classes=(), target_mean=5.0)
    np.testing.assert_allclose(predict(one, backbone, items)["value"], reference(one, backbone, items)[:, 0], rtol=1e-5)
    two = make_readout(backbone, task="regression", outputs=2, classes=())
    assert list(predict(two, backbone, items)) == ["item", "value_1", "value_2"]


class SomeBroken:
    def __len__(self):
        return 5

    def __getitem__(self, index):
        if index in (1, 4):
            raise OSError("truncated\nfile")
        return picture(index)


def test_unreadable_items_raise_or_are_left_out():
    backbone = PatchBackbone()
    readout, names = make_readout(backbone), list("abcde")
    with pytest.raises(ValueError, match="cannot read b: truncated file"):
        predict(readout, backbone, SomeBroken(), ids=names)
    frame = predict(readout, backbone, SomeBroken(), batch_size=2, ids=names, on_error="skip")
    assert frame["item"].tolist() == ["a", "c", "d"]
    assert backbone.seen == [2, 1]  # left-out items leave no holes in the batches
    assert [(s.id, s.reason) for s in frame.attrs["skipped"]] == [("b", "truncated file"), ("e", "truncated file")]
    direct = predict(readout, backbone, [picture(k) for k in (0, 2, 3)])
    np.testing.assert_allclose(frame["probability_1"], direct["probability_1"], rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"items": []}, "at least one item"),
        ({"batch_size": 0}, "at least 1"),
        ({"top": 0}, "at least 1"),
        ({"ids": ["x"]}, "a name for each"),
        ({"backbone": PatchBackbone(weights=3)}, "other weights give meaningless answers"),
    ],
)
def test_wrong_arguments_are_refused(change, message):
    backbone = PatchBackbone()
    values = {"readout": make_readout(backbone), "backbone": backbone, "items": [picture(0), picture(1)], **change}
    with pytest.raises(ValueError, match=message):
        predict(**values)


def test_another_backbone_passes_when_told():
    readout = make_readout(PatchBackbone())
    assert len(predict(readout, PatchBackbone(weights=3), [picture(0)], allow_other_backbone=True)) == 1


def test_scores_that_are_not_finite_name_the_item():
    backbone = PatchBackbone("text")
    readout = make_readout(backbone)
    readout.head.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="scores of second, third are not finite"):
        predict(readout, backbone, ["a b", "a c d"], ids=["second", "third"])


def test_everything_unreadable_is_an_error():
    class Broken(SomeBroken):
        def __getitem__(self, index):
            raise OSError("gone")

    backbone = PatchBackbone()
    with pytest.raises(ValueError, match="none of the 5 items could be read; the first: 0: gone"):
        predict(make_readout(backbone), backbone, Broken(), on_error="skip")


def test_inputs_of_text(tmp_path):
    (tmp_path / "lines.txt").write_text("first line\n\nthird line\n")
    pd.DataFrame({"text": ["in a table", "1"], "label": [0, 1]}).to_csv(tmp_path / "table.csv", index=False)
    pd.DataFrame({"review": ["with\ttab"], "label": [0]}).to_csv(tmp_path / "table.tsv", index=False, sep="\t")
    texts, ids = read_inputs(["just text", str(tmp_path / "lines.txt"), str(tmp_path / "table.csv")], "text")
    assert texts == ["just text", "first line", "third line", "in a table", "1"]
    assert ids[2] == f"{tmp_path / 'lines.txt'}:3"
    assert read_inputs([str(tmp_path / "table.tsv")], "text", "review")[0] == ["with\ttab"]
    assert read_inputs(["see notes.txt"], "text")[0] == ["see notes.txt"]  # a sentence that ends like a file name
    for inputs, column, message in [
        ([str(tmp_path / "table.tsv")], None, "no column 'text'.*it has review, label"),
        ([str(tmp_path / "table.csv")], "body", "no column 'body'"),
        ([str(tmp_path / "absent.csv")], None, "no such file"),
        ([], None, "nothing to predict"),
    ]:
        with pytest.raises(ValueError, match=message):
            read_inputs(inputs, "text", column)


def test_inputs_of_images(tmp_path):
    (tmp_path / "photos" / "deep").mkdir(parents=True)
    for name in ("b.png", "a.JPG", "deep/c.bmp"):
        picture(1).save(tmp_path / "photos" / name)
    (tmp_path / "photos" / "notes.md").write_text("no image")
    items, ids = read_inputs([str(tmp_path / "photos"), str(tmp_path / "photos" / "b.png")], "image")
    assert [i.removeprefix(f"{tmp_path}/photos/") for i in ids] == ["a.JPG", "b.png", "deep/c.bmp", "b.png"]
    assert items[1].size == (8, 8)
    (tmp_path / "empty").mkdir()
    for given, message in [("empty", "no images in"), ("absent.png", "no such image")]:
        with pytest.raises(ValueError, match=message):
            read_inputs([str(tmp_path / given)], "image")


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """A folder with a readout, images beside it, and a ``load_backbone`` that gives the fake."""
    backbone = PatchBackbone()
    make_readout(backbone).save_pretrained(tmp_path / "best")
    (tmp_path / "photos").mkdir()
    for k in range(3):
        picture(k).save(tmp_path / "photos" / f"{k}.png")
    asked = []

    def load(spec, **options):
        asked.append((spec, options))
        return backbone

    monkeypatch.setattr(cenote.backbones, "load_backbone", load, raising=False)
    return tmp_path, backbone, asked


def test_command_prints_a_table_and_writes_files(saved, capsys, monkeypatch):
    folder, backbone, asked = saved
    monkeypatch.setenv("COLUMNS", "200")
    out = folder / "out.csv"
    assert main(["predict", str(folder / "best"), str(folder / "photos"), "--top", "2", "--csv", str(out)]) == 0
    printed = capsys.readouterr().out
    expected = predict(make_readout(backbone), backbone, [picture(k) for k in range(3)], top=2)
    for label, probability in zip(expected["label_1"], expected["probability_1"], strict=True):
        assert f"{label}  {probability:.1%}" in printed
    written = pd.read_csv(out)
    np.testing.assert_allclose(written["probability_1"], expected["probability_1"], rtol=1e-5)
    assert written["label_1"].tolist() == expected["label_1"].tolist()
    assert asked == [("fake:image", {"trust_remote_code": False, "revision": None, "device": "cpu"})]


def test_command_gives_machines_nothing_but_data(saved, capsys):
    folder, *_ = saved
    assert main(["predict", str(folder / "best"), str(folder / "photos"), "--json", "-"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["item"].rsplit("/")[-1] for row in rows] == ["0.png", "1.png", "2.png"]
    assert main(["predict", str(folder / "best"), str(folder / "photos"), "--csv", "-"]) == 0
    assert len(pd.read_csv(io.StringIO(capsys.readouterr().out))) == 3


def test_command_on_unreadable_images(saved, capsys):
    folder, *_ = saved
    (folder / "photos" / "1.png").write_bytes(b"not a picture")
    arguments = ["predict", str(folder / "best"), str(folder / "photos"), "--json", "-"]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "1.png" in error
    assert error.count("\n") == 1
    assert main([*arguments, "--on-error", "skip"]) == 0
    captured = capsys.readouterr()
    assert len(json.loads(captured.out)) == 2
    assert "left out 1 of 3 inputs" in captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{best}", "{photos}", "--json", "-", "--csv", "-"], "only one of --json and --csv"),
        (["{photos}", "{photos}"], "config.json is missing"),
        (["{best}", "nowhere.png"], "no such image file or folder"),
        (["{best}", "{photos}", "--device", "quantum"], "cannot use device 'quantum'"),
    ],
)
def test_command_tells_bad_input_in_one_line(saved, capsys, arguments, message):
    folder, *_ = saved
    filled = [a.format(best=folder / "best", photos=folder / "photos") for a in arguments]
    assert main(["predict", *filled]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_command_refuses_another_backbone_unless_told(saved, capsys):
    folder, backbone, _ = saved
    backbone.weights = 5
    arguments = ["predict", str(folder / "best"), str(folder / "photos"), "--json", "-"]
    assert main(arguments) == 2
    assert "--allow-other-backbone" in capsys.readouterr().err
    assert main([*arguments, "--allow-other-backbone"]) == 0
