"""A probe with unknown items: what is held out, what is judged, what is written, and that resuming gives the same."""

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
import torch

from cenote.backbones import load_backbone
from cenote.cli import main
from cenote.data import load_data
from cenote.inspection import OPEN_SET_SCORES, CoStarr, load_open_set_score
from cenote.ops.open_set import auoscr, auroc, best_threshold, open_set_accuracy, oscr_curve
from cenote.probe import Readout, probe
from cenote.probe.open_set_data import OpenSet

QUICK = {
    "seeds": 1,
    "epochs": 3,
    "readouts": "mean,ep(num_queries=4),knn",
    "lrs": [0.03],
    "data_options": {"limit": 300},
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, cache):
    out = tmp_path_factory.mktemp("run") / "out"
    return probe(**QUICK, open_set="3,7,8", out=out, cache_dir=cache), out


@pytest.fixture(scope="module")
def digits():
    return load_data("digits", limit=300)


def test_held_out_classes_are_gone_from_training_and_split_in_two(digits):
    opened = OpenSet.of("3,7,8", digits)
    assert opened.known.classes == ("0", "1", "2", "4", "5", "6", "9")
    for part in ("train", "validation", "test"):
        whole, kept = getattr(digits, part), getattr(opened.known, part)
        old = whole.targets[~torch.isin(whole.targets, torch.tensor([3, 7, 8]))]
        assert [digits.classes[k] for k in old.tolist()] == [opened.known.classes[k] for k in kept.targets.tolist()]
        assert kept.fingerprint != whole.fingerprint
    at = dict(zip(digits.train.ids, digits.train.targets.tolist(), strict=True))
    assert {at[name] for name in opened.surrogate.ids} == {3}
    wanted = [i for i, k in zip(digits.test.ids, digits.test.targets.tolist(), strict=True) if k in (7, 8)]
    assert list(opened.unknown.ids) == wanted
    assert (opened.unknown.targets == -1).all()
    # The items follow their names.
    position = digits.test.ids.index(opened.unknown.ids[5])
    assert np.array_equal(np.asarray(opened.unknown.items[5]), np.asarray(digits.test.items[position]))
    assert opened.settings["held_out"] == {"surrogate": ["3"], "test": ["7", "8"]}
    assert len(opened.surrogate) <= len(opened.known.validation)


def test_one_class_is_both_and_the_note_says_so(digits):
    opened = OpenSet.of(["5"], digits)
    assert opened.settings["held_out"] == {"surrogate": ["5"], "test": ["5"]}
    assert not set(opened.surrogate.ids) & set(opened.unknown.ids)
    assert "the threshold of OOSA has seen its like" in opened.note


def test_names_go_before_numbers(digits):
    renamed = dataclasses.replace(digits, classes=tuple("9876543210"))
    assert OpenSet.of("0,9", renamed).settings["held_out"] == {"surrogate": ["0"], "test": ["9"]}
    words = dataclasses.replace(digits, classes=tuple("abcdefghij"))
    assert OpenSet.of("0,j", words).settings["held_out"] == {"surrogate": ["a"], "test": ["j"]}


def grey_noise(folder):
    """Images with one class only: labels of unknown items do not matter."""
    pixels = np.random.default_rng(0).integers(0, 256, (80, 8, 8), dtype=np.uint8)
    np.savez(folder / "noise.npz", train_x=pixels, train_y=np.zeros(80, dtype=np.int64))
    return str(folder / "noise.npz")


def test_second_data_set_needs_no_classes(digits, tmp_path):
    opened = OpenSet.of(grey_noise(tmp_path), digits, {"limit": 40, "label_column": "ignored"})
    assert opened.known is digits
    assert (len(opened.surrogate), len(opened.unknown)) == (40, 16)
    assert "Both come from the same source" in opened.note


def test_what_is_no_open_set_is_refused(digits, tmp_path):
    def refused(spec, message, data=digits):
        with pytest.raises(ValueError, match=message):
            OpenSet.of(spec, data)

    refused("3,17", "open_set names '17', not classes of digits")
    refused(["cat"], "'cat', not classes")
    refused([], "nothing")
    refused(" ", "names nothing")  # and not the folder at hand
    refused("0,1,2,3,4,5,6,7,8", r"leaves 1 known class\(es\)")
    refused("no/such/folder", "neither classes of digits .* nor a data set")
    refused(digits, "is the data set itself")
    refused("3", "judges classification", dataclasses.replace(digits, task="regression"))
    refused(dataclasses.replace(digits, modality="text"), "holds texts")


def test_every_head_is_judged_and_neighbours_are_not(finished):
    result, out = finished
    frame = result.frame().set_index("readout")
    measures = ["auoscr", "auroc", "oosa", "fpr95", "maxlogit_auoscr", "msp_auoscr", "msp_auroc"]
    assert frame.loc[["mean", "ep(num_queries=4)"], measures].notna().all(axis=None)
    assert frame.loc["knn", measures].isna().all()
    assert (frame.auoscr.dropna() <= frame.score[frame.auoscr.notna()] + 1e-9).all()  # one seed: the accuracy is its
    table = pd.read_csv(out / "open_set.csv")
    records = json.loads((out / "open_set.json").read_text())
    assert [r["method"] for r in records] == list(table.method)
    assert set(table[table.readout == "mean"].method) == set(OPEN_SET_SCORES)
    rows = json.loads((out / "results.json").read_text())
    assert rows[0]["extra"]["auoscr"] == frame.auoscr.iloc[0]
    assert json.loads((out / "settings.json").read_text())["open_set"]["held_out"]["test"] == ["7", "8"]


def test_numbers_are_those_of_the_saved_artefacts(finished, digits):
    """From the files alone: readout, scorer and items give the table's AUOSCR and OOSA."""
    result, out = finished
    readout, scorer = Readout.from_pretrained(out / "best"), load_open_set_score(out / "best" / "open_set")
    backbone, opened = load_backbone("embedded"), OpenSet.of("3,7,8", digits)
    assert readout.config.classes == opened.known.classes
    assert isinstance(scorer, CoStarr)

    def vectors(split):
        with torch.inference_mode():
            features = backbone(backbone.collate([split.items[i] for i in range(len(split))]), readout.config.layers)
            return readout.norm(readout.vector(features).float()), readout(features)

    parts = [opened.known.validation, opened.surrogate, opened.known.test, opened.unknown]
    read = [vectors(part)[0] for part in parts]
    scorer.check_logits(*vectors(opened.unknown))

    def scored(known, unknown, split):
        x = torch.cat([known, unknown]).clone()
        labels = torch.cat([split.targets, torch.full((len(unknown),), -1)])
        return scorer.score(x), scorer.logits(x).argmax(dim=1), labels

    threshold, _ = best_threshold(*scored(read[0], read[1], opened.known.validation))
    scores, predictions, labels = scored(read[2], read[3], opened.known.test)
    row = next(r for r in result.open_set.rows if r.method == "costarr" and r.key == result.open_set.best)
    assert row.readout == next(r.readout for r in result.rows if r.readout != "knn")
    assert row.auroc == pytest.approx(auroc(scores, labels), abs=2e-3)
    assert row.auoscr == pytest.approx(auoscr(oscr_curve(scores, predictions, labels)), abs=2e-3)
    assert scorer.notes["threshold"] == pytest.approx(threshold, abs=1e-4)
    assert row.oosa == pytest.approx(open_set_accuracy(scores, predictions, labels, row.threshold), abs=5e-3)


def test_report_shows_curves_and_table(finished):
    page = (finished[1] / "report.html").read_text()
    section = page[page.index('id="open-set"') :]
    assert section.count('class="series s') == 8
    assert "surrogate unknowns (3, from the training part)" in section
    assert "COSTARR" in section
    assert "MaxLogit AUOSCR" in section


def test_resuming_gives_the_same_and_another_choice_is_refused(finished, cache):
    result, out = finished
    again = probe(**QUICK, open_set="3,7,8", out=out, cache_dir=cache, resume=True)
    pd.testing.assert_frame_equal(again.open_set.frame(), result.open_set.frame())
    for other in ("3,7,9", "7,3,8", None):
        with pytest.raises(ValueError, match="belongs to another configuration"):
            probe(**QUICK, open_set=other, out=out, cache_dir=cache, resume=True)


def test_command_line_takes_a_second_data_set(tmp_path, cache, capsys):
    options = ["--readouts", "mean", "--limit", "120", "--cache-dir", cache, "--out", str(tmp_path / "out")]
    assert main(["probe", *options, "--open-set", grey_noise(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "best AUOSCR" in printed
    assert main(["probe", *options, "--open-set", "3,x"]) == 2
    assert "not classes of digits" in capsys.readouterr().err
