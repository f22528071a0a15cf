"""The main job on a slice of the digits: table, artefacts, resuming, refusing."""

import json

import numpy as np
import pandas as pd
import pytest
import torch

from cenote.backbones import load_backbone
from cenote.data import load_data
from cenote.probe import Readout, probe
from cenote.probe.plan import QUERY_LRS
from cenote.probe.predict import predict

QUICK = {"seeds": 2, "epochs": 4, "readouts": "mean,ep(num_queries=4),gem,knn", "data_options": {"limit": 160}}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, cache):
    out = tmp_path_factory.mktemp("run") / "out"
    return probe(**QUICK, out=out, cache_dir=cache), out


def test_table_is_ranked_and_complete(finished):
    result, out = finished
    frame = result.frame()
    assert list(frame.readout.sort_values()) == ["ep(num_queries=4)", "gem", "knn", "mean"]
    assert list(frame.score) == sorted(frame.score, reverse=True)
    assert ((frame.ci_low <= frame.score) & (frame.score <= frame.ci_high)).all()
    assert frame.tie_group.iloc[0] == 1
    ep = frame[frame.readout == "ep(num_queries=4)"].iloc[0]
    assert ep.params == 4 * 64 + 64 * 64 + 64 * 10 + 10
    assert ep.macs == 2 * 16 * 4 * 64 + 64 * 64 + 640
    assert 0 <= ep.attention_entropy <= 1
    assert ep.lr in QUERY_LRS
    mean = frame[frame.readout == "mean"].iloc[0]
    assert np.isnan(mean.lr)
    assert mean.params == 650
    rows = json.loads((out / "results.json").read_text())
    assert [row["readout"] for row in rows] == list(frame.readout)
    needed = {"readout", "layers", "score", "ci_low", "ci_high", "params", "macs", "train_seconds", "lr", "tie_group"}
    assert needed <= set(rows[0])
    pd.testing.assert_frame_equal(pd.read_parquet(out / "results.parquet"), frame, check_dtype=False)
    assert "<html" in (out / "report.html").read_text().lower()


def test_scores_are_those_of_the_predictions(finished):
    result, _ = finished
    for row in result.rows:
        predictions = result.predictions[result.key(row)]
        assert row.score == pytest.approx((predictions.argmax(-1) == result.targets).mean())


def test_best_readout_predicts_what_the_table_says(finished):
    result, out = finished
    readout = Readout.from_pretrained(out / "best")
    row = next(r for r in result.rows if r.readout != "knn")
    assert readout.config.pooling == row.readout
    data = load_data("digits", limit=160)
    frame = predict(readout, load_backbone("embedded"), [data.test.items[i] for i in range(len(data.test))])
    labels = np.array([data.classes.index(str(label)) for label in frame["label_1"]])
    accuracies = (result.predictions[result.key(row)].argmax(-1) == result.targets).mean(axis=1)
    assert (labels == result.targets).mean() in accuracies


def test_same_seed_gives_the_same_numbers(finished, cache):
    again = probe(**QUICK, cache_dir=cache)
    for key, expected in finished[0].predictions.items():
        np.testing.assert_array_equal(again.predictions[key], expected)


def test_interrupted_run_leaves_a_table_and_resumes_to_the_same_numbers(tmp_path, monkeypatch, finished, cache):
    from cenote.probe import train

    validate, calls = train.Group.validate, []

    def interrupting(group, validation):
        calls.append(group)
        if len(calls) == 4:
            raise KeyboardInterrupt
        validate(group, validation)

    monkeypatch.setattr(train.Group, "validate", interrupting)
    partial = probe(**QUICK, out=tmp_path / "out", cache_dir=cache)
    assert {row.status for row in partial.rows} == {"done", "partial"}
    assert any("interrupted" in note for note in partial.notes)
    assert json.loads((tmp_path / "out" / "results.json").read_text())
    monkeypatch.setattr(train.Group, "validate", validate)
    resumed = probe(**QUICK, out=tmp_path / "out", cache_dir=cache, resume=True)
    assert {row.status for row in resumed.rows} == {"done"}
    for key, expected in finished[0].predictions.items():
        np.testing.assert_allclose(resumed.predictions[key], expected, atol=1e-6)


def test_budget_ends_training_early(cache):
    result = probe(**{**QUICK, "epochs": 1000}, budget=0.02, cache_dir=cache)
    assert any(row.status == "partial" for row in result.rows)
    assert any("budget" in note for note in result.notes)


def test_refuses_a_folder_of_another_configuration(finished, cache):
    with pytest.raises(ValueError, match=r"belongs to another configuration.*epochs"):
        probe(**{**QUICK, "epochs": 5}, out=finished[1], cache_dir=cache)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"readouts": "efficient_probin"}, "did you mean efficient_probing"),
        ({"backbone": "embeded"}, "did you mean 'embedded'"),
        ({"readouts": "weighted_layer > mean"}, "did you mean weighted_layers"),
        ({"tokens": "patch"}, "tokens must be"),
        ({"layers": "9"}, r"0\.\.4"),
        ({"seeds": 0}, "seeds"),
        ({"readouts": ""}, "nothing to compare"),
        ({"views": 2}, "augment"),
    ],
)
def test_bad_input_is_told(change, message, cache):
    with pytest.raises(ValueError, match=message):
        probe(**{**QUICK, **change}, cache_dir=cache)


def test_layers_and_tokens_are_axes(cache):
    result = probe(
        readouts="mean,mean_layers > mean",
        layers="2,4",
        tokens=["patches", "both"],
        seeds=1,
        data_options={"limit": 100},
        cache_dir=cache,
    )
    keys = {result.key(row) for row in result.rows}
    assert keys == {f"mean | {layer} | {t}" for layer in (2, 4) for t in ("patches", "both")} | {
        f"mean_layers > mean | 2,4 | {t}" for t in ("patches", "both")
    }


def test_augmented_views_take_turns(cache):
    data = load_data("digits", limit=60)

    def flip(item, seed):
        from PIL import ImageOps

        return ImageOps.mirror(item)

    plain = probe(data=data, readouts="gem", seeds=1, epochs=3, cache_dir=cache)
    flipped = probe(data=data, readouts="gem", seeds=1, epochs=3, cache_dir=cache, views=1, augment=flip)
    key = plain.key(plain.rows[0])
    assert not np.allclose(plain.predictions[key], flipped.predictions[key])


def test_regression_and_multilabel(cache):
    import dataclasses

    data = load_data("digits", limit=150)

    def with_targets(make, task, classes):
        parts = {
            p: dataclasses.replace(getattr(data, p), targets=make(getattr(data, p).targets))
            for p in ("train", "validation", "test")
        }
        return dataclasses.replace(data, task=task, classes=classes, **parts)

    regression = with_targets(lambda y: y.float() * 3 + 100, "regression", ())
    result = probe(data=regression, readouts="mean,ep(num_queries=4)", seeds=1, epochs=15, cache_dir=cache)
    assert result.rows[0].metric == "R2"
    assert result.rows[0].score > 0.3
    bits = with_targets(
        lambda y: torch.stack([y % 2 == 0, y > 4, y > 7], dim=1).float(), "multilabel", ("even", "big", "top")
    )
    result = probe(data=bits, readouts="mean,ep(num_queries=4)", seeds=1, epochs=15, cache_dir=cache)
    assert result.rows[0].score > 0.85
