import json
import re

import datasets
import numpy as np
import pandas as pd
import pytest
import torch

from cenote.data import load_data
from data.tables import encoded, image_folder, picture, rows, texts_of


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    """The datasets library keeps converted tables in a cache; let it be one of the tests' own."""
    patch = pytest.MonkeyPatch()
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    yield
    patch.undo()


def frame(count=40, classes=2):
    texts, labels = rows(count, classes)
    return pd.DataFrame({"text": texts, "label": labels})


def save(table, path):
    if path.name.endswith((".csv", ".csv.gz")):
        table.to_csv(path, index=False)
    elif path.suffix == ".tsv":
        table.to_csv(path, index=False, sep="\t")
    elif path.suffix == ".parquet":
        table.to_parquet(path)
    elif path.suffix == ".jsonl":
        table.to_json(path, orient="records", lines=True)
    else:
        path.write_text(json.dumps(table.to_dict("records")))
    return path


@pytest.mark.parametrize("file", ["a.csv", "a.csv.gz", "a.tsv", "a.parquet", "a.jsonl", "a.json"])
def test_formats(file, tmp_path):
    data = load_data(save(frame(), tmp_path / file))
    assert data.modality == "text"
    assert data.task == "classification"
    assert data.classes == ("0", "1")
    assert (len(data.train), len(data.validation), len(data.test)) == (29, 3, 8)
    assert sorted(texts_of(data.train) + texts_of(data.validation) + texts_of(data.test)) == sorted(frame()["text"])
    for split in (data.train, data.validation, data.test):
        for i, text in enumerate(texts_of(split)):
            assert split.targets[i] == int(text.split()[-1]) % 2
            assert split.ids[i] == f"row {text.split()[-1]}"


def test_a_split_column_is_honoured(tmp_path):
    table = frame(12).assign(split=["train"] * 8 + ["dev"] * 2 + ["test"] * 2)
    data = load_data(save(table, tmp_path / "a.csv"))
    assert (len(data.train), len(data.validation), len(data.test)) == (8, 2, 2)
    assert texts_of(data.test) == ["text number 10", "text number 11"]
    undivided = load_data(tmp_path / "a.csv", split_column="")
    assert len(undivided.train) + len(undivided.validation) == 10
    table.loc[0, "split"] = "fold1"
    with pytest.raises(ValueError, match="unknown split 'fold1' in the column 'split'"):
        load_data(save(table, tmp_path / "b.csv"))


def test_named_columns_and_readable_names(tmp_path):
    table = frame(30, 3).rename(columns={"text": "utterance_en", "label": "goal"})
    table["goal_name"] = [["pay", "ask", "quit"][i] for i in table["goal"]]
    table["noise"] = 1.5
    path = save(table, tmp_path / "a.parquet")
    data = load_data(path, text_column="utterance_en", label_column="goal")
    assert data.classes == ("pay", "ask", "quit")
    with pytest.raises(ValueError, match=r"no column 'gaol'.*utterance_en, goal.*did you mean 'goal'"):
        load_data(path, text_column="utterance_en", label_column="gaol")
    with pytest.raises(ValueError, match=r"is the label \(label_column\): its columns are utterance_en"):
        load_data(path, text_column="utterance_en")
    with pytest.raises(ValueError, match=r"is the image \(image_column\) or the text"):
        load_data(path, label_column="goal")
    with pytest.raises(ValueError, match="not both"):
        load_data(path, text_column="utterance_en", image_column="noise", label_column="goal")


def test_string_labels_are_sorted(tmp_path):
    table = frame().assign(label=["pos" if i % 2 else "neg" for i in range(40)])
    data = load_data(save(table, tmp_path / "a.csv"))
    assert data.classes == ("neg", "pos")
    assert data.train.targets.dtype == torch.int64
    for text, target in zip(texts_of(data.train), data.train.targets, strict=True):
        assert target == int(text.split()[-1]) % 2


def test_regression_is_inferred_from_fractions_and_can_be_asked_for(tmp_path):
    table = frame().assign(label=np.arange(40) / 7)
    data = load_data(save(table, tmp_path / "a.csv"))
    assert data.task == "regression"
    assert data.classes == ()
    for text, target in zip(texts_of(data.test), data.test.targets, strict=True):
        assert target.item() == pytest.approx(int(text.split()[-1]) / 7)
    assert load_data(save(frame(), tmp_path / "b.csv"), task="regression").train.targets.dtype == torch.float32
    assert load_data(tmp_path / "b.csv", task="auto").task == "classification"
    with pytest.raises(ValueError, match="needs numbers"):
        load_data(save(frame().assign(label=list("ab") * 20), tmp_path / "c.csv"), task="regression")


@pytest.mark.parametrize(
    "labels",
    [
        [[["red"], ["red", "round"], ["blue"]][i % 3] for i in range(30)],
        [[[0, 0, 1], [0, 1, 1], [1, 0, 0]][i % 3] for i in range(30)],
        [["red", "red|round", "blue"][i % 3] for i in range(30)],
    ],
    ids=["names", "zeros and ones", "separated"],
)
def test_multilabel(labels, tmp_path):
    table = frame(30).assign(label=labels)
    task = "multilabel" if isinstance(labels[0], str) else None
    data = load_data(save(table, tmp_path / "a.parquet"), task=task)
    assert data.task == "multilabel"
    names = {"blue": 0, "red": 1, "round": 2}
    column = names if not isinstance(labels[0][0], int) else {"blue": 0, "round": 1, "red": 2}
    assert data.classes == (("blue", "red", "round") if column is names else ("0", "1", "2"))
    for text, target in zip(texts_of(data.train), data.train.targets, strict=True):
        expected = [{"red"}, {"red", "round"}, {"blue"}][int(text.split()[-1]) % 3]
        assert {name for name, i in column.items() if target[i] == 1} == expected
        assert target.sum() == len(expected)
    with pytest.raises(ValueError, match=r"needs one label a row|did you mean" if task is None else "needs numbers"):
        load_data(tmp_path / "a.parquet", task="classification" if task is None else "regression")


def test_images_as_bytes(tmp_path):
    table = pd.DataFrame({"image": [encoded(i) for i in range(20)], "label": [i % 2 for i in range(20)], "path": "x"})
    data = load_data(save(table, tmp_path / "a.parquet"))
    assert data.modality == "image"
    for i, name in enumerate(data.train.ids):
        assert data.train.items[i].getpixel((0, 0))[0] == int(name.removeprefix("row "))


def test_images_as_paths(tmp_path):
    (tmp_path / "pictures").mkdir()
    for i in range(20):
        picture(i).save(tmp_path / "pictures" / f"{i}.png")
    table = pd.DataFrame({"file_name": [f"pictures/{i}.png" for i in range(20)], "class": ["a", "b"] * 10})
    path = save(table, tmp_path / "a.csv")
    data = load_data(path)
    assert data.modality == "image"
    assert data.train.items[0].getpixel((0, 0))[0] == int(data.train.ids[0].removeprefix("row "))
    (tmp_path / "pictures" / "3.png").unlink()
    with pytest.raises(ValueError, match=r"cannot read row 3 of .*: there is no file .*3\.png"):
        load_data(path)
    skipped = load_data(path, on_error="skip").skipped
    assert [s.id for s in skipped] == ["row 3"]


def test_gaps_are_named_or_skipped(tmp_path):
    table = frame()
    table.loc[5, "text"] = None
    table["label"] = table["label"].astype("Int64")
    table.loc[7, "label"] = pd.NA
    path = save(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"cannot read row 7 .*there is no label"):
        load_data(path)
    data = load_data(path, on_error="skip")
    assert {(s.id, s.reason) for s in data.skipped} == {("row 5", "there is no text"), ("row 7", "there is no label")}
    assert len(data.train) + len(data.validation) + len(data.test) == 38
    assert data.classes == ("0", "1")


def test_whole_numbers_with_gaps_in_a_csv_stay_classes(tmp_path):
    table = frame()
    table.loc[7, "label"] = None
    data = load_data(save(table, tmp_path / "a.csv"), on_error="skip", task="classification")
    assert data.classes == ("0", "1")


def test_bad_tables(tmp_path):
    with pytest.raises(ValueError, match="one class only"):
        load_data(save(frame(20, 1), tmp_path / "one.csv"))
    table = frame(12).assign(split=["train"] * 8 + ["test"] * 4)
    table["label"] = table["label"].astype(str)
    table.loc[9, "label"] = "new"
    with pytest.raises(ValueError, match=r"1 labels of the test part .* never occur in its training part: new"):
        load_data(save(table, tmp_path / "new.csv"))
    table.loc[table["split"] == "test", "label"] = None
    with pytest.raises(ValueError, match=r"the labels of the test part of .* are missing"):
        load_data(save(table, tmp_path / "hidden.csv"), on_error="skip")
    with pytest.raises(ValueError, match="no training part"):
        load_data(save(frame(4).assign(split="test"), tmp_path / "test.csv"))
    with pytest.raises(ValueError, match="too few items"):
        load_data(save(frame(1), tmp_path / "single.csv"))
    (tmp_path / "empty.csv").write_text("text,label\n")
    with pytest.raises(ValueError, match=r"has no rows|cannot read"):
        load_data(tmp_path / "empty.csv")
    (tmp_path / "broken.parquet").write_text("not parquet")
    with pytest.raises(ValueError, match="cannot read"):
        load_data(tmp_path / "broken.parquet")
    (tmp_path / "a.xlsx").write_text("")
    with pytest.raises(ValueError, match=r"ending in .csv"):
        load_data(tmp_path / "a.xlsx")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_error": "ignore"}, "on_error"),
        ({"limit": 0}, "limit"),
        ({"test_fraction": 1.0}, "test_fraction"),
        ({"validation_fraction": 0}, "validation_fraction"),
        ({"task": "ranking"}, "task"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        load_data("digits", **options)


def test_unknown_data_sets(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="did you mean 'digits'"):
        load_data("digit")
    save(frame(), tmp_path / "sst2.csv")
    with pytest.raises(ValueError, match=r"there is no file or folder .*did you mean '.*sst2\.csv'"):
        load_data(str(tmp_path / "sst3.csv"))
    with pytest.raises(ValueError, match="there is no file or folder"):
        load_data("./nowhere")

    def absent(name, configuration=None):
        raise FileNotFoundError(f"no {name}\nand more lines")

    monkeypatch.setattr(datasets, "load_dataset", absent)
    with pytest.raises(ValueError, match=r"cannot load 'org/name': no org/name$"):
        load_data("org/name")


def dictionary(**sizes):
    features = datasets.Features(
        {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "fine", "good"])}
    )
    parts = {}
    for part, size in sizes.items():
        texts, labels = rows(size, 3)
        parts[part] = datasets.Dataset.from_dict({"sentence": texts, "label": labels}, features=features)
    return datasets.DatasetDict(parts)


def test_a_saved_dictionary(tmp_path):
    dictionary(train=20, validation=6, test=9).save_to_disk(tmp_path / "saved")
    for spec in (str(tmp_path / "saved"), f"datasets:{tmp_path / 'saved'}"):
        data = load_data(spec)
        assert data.classes == ("bad", "fine", "good")
        assert (len(data.train), len(data.validation), len(data.test)) == (20, 6, 9)
        assert data.test.ids[2] == "test row 2"
        assert texts_of(data.test)[2] == "text number 2"
        assert data.test.targets.tolist() == [i % 3 for i in range(9)]


def test_a_saved_data_set_with_images(tmp_path):
    features = datasets.Features({"img": datasets.Image(), "fine_label": datasets.ClassLabel(names=["a", "b"])})
    table = {"img": [picture(i) for i in range(20)], "fine_label": [i % 2 for i in range(20)]}
    datasets.Dataset.from_dict(table, features=features).save_to_disk(tmp_path / "saved")
    data = load_data(tmp_path / "saved")
    assert data.modality == "image"
    assert data.classes == ("a", "b")
    assert data.train.items[4].getpixel((0, 0))[0] == int(data.train.ids[4].removeprefix("row "))
    assert data.train.fingerprint == load_data(tmp_path / "saved").train.fingerprint


def test_hidden_labels_of_a_hub_test_part(tmp_path):
    parts = dictionary(train=20, test=6)
    parts["test"] = parts["test"].map(lambda row: {"label": -1})
    parts.save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"the labels of the test part of .* are missing"):
        load_data(tmp_path / "saved")


def test_an_id_goes_to_the_datasets_library(monkeypatch):
    asked = []

    def load_dataset(name, configuration=None):
        asked.append((name, configuration))
        return dictionary(train=20, test=9)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    first, again = load_data("org/name"), load_data("datasets:org/name:config")
    assert asked == [("org/name", None), ("org/name", "config")]
    assert first.test.ids == again.test.ids
    assert (len(first.train), len(first.validation)) == (18, 2)
    unknown = dictionary(train=20, unsupervised=4)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: unknown)
    with pytest.raises(ValueError, match="unknown split 'unsupervised'"):
        load_data("org/name")


def test_folders_in_the_layout_of_the_hub(tmp_path):
    save(frame(20), tmp_path / "train.csv")
    save(frame(6), tmp_path / "test.csv")
    data = load_data(tmp_path)
    assert (len(data.train), len(data.validation), len(data.test)) == (18, 2, 6)


def test_a_stray_table_does_not_hide_a_folder_of_images(tmp_path):
    image_folder(tmp_path, {"cat": 5, "dog": 5})
    save(frame(3), tmp_path / "notes.csv")
    assert load_data(tmp_path).classes == ("cat", "dog")


def test_fingerprints_follow_the_content(tmp_path):
    a, b = load_data(save(frame(), tmp_path / "a.csv")), load_data(save(frame(), tmp_path / "b.csv"))
    changed = load_data(save(frame().assign(text="same"), tmp_path / "c.csv"))
    assert a.train.fingerprint == b.train.fingerprint
    assert re.fullmatch("[0-9a-f]{64}", a.train.fingerprint)
    assert len({a.train.fingerprint, a.test.fingerprint, changed.train.fingerprint}) == 3
