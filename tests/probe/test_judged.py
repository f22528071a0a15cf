"""The judged probe from data to folder, on a backbone that hides a class on one token of each item."""

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
import torch

from cenote.probe import judged_training, probe
from cenote.probe.display import Quiet
from cenote.probe.embedding_readout import EmbeddingReadout
from cenote.probe.judged import probe_judged
from cenote.probe.judged_run import JudgedRun
from cenote.probe.judged_vectors import Vectors
from cenote.probe.statistics import Bootstrap
from cenote.tuning.embedding import ContrastiveSettings
from probe.planted import PlantedBackbone, labelled, pairs_data, relevance_data, with_other_classes

FREE = "mean,max,cls"
LEARNED = "efficient_probing(num_queries=2)"
SHORT = ContrastiveSettings(steps=(30, 0), batch_size=16, evaluations=2)
READERS = "mean,max,last_token,encoder_pooler"


def run(data, readouts, tmp_path, **options):
    return probe_judged(
        options.pop("backbone", PlantedBackbone()),
        data,
        readouts,
        cache_dir=str(tmp_path / "cache"),
        seeds=2,
        **options,
    )


@pytest.fixture(scope="module")
def verified(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verify")
    return run(labelled("verification"), f"{READERS},{LEARNED}", folder, epochs=25, out=folder / "out"), folder


def test_a_readout_that_finds_the_token_verifies_classes_it_never_saw(verified):
    rows = {row.readout: row for row in verified[0].rows}
    assert rows[LEARNED].score > rows["mean"].score + 0.03
    assert rows[LEARNED].score > 0.75
    assert rows[LEARNED].seeds == 2
    assert rows[LEARNED].lr is not None
    assert rows["mean"].params == 0
    assert rows["encoder_pooler"].score == pytest.approx(0.6, abs=0.2)


def test_rows_hold_the_operating_point(verified):
    for row in verified[0].rows:
        assert row.metric == "1 - equal error rate"
        assert row.extra["p_target"] == 0.01
        assert 0 < row.extra["min_dcf"] <= 1
        assert row.ci_low <= row.score <= row.ci_high
        if row.seeds == 1:
            assert row.extra["eer"] == pytest.approx(1 - row.score)


def test_everything_is_written(verified):
    result, folder = verified
    out = folder / "out"
    rows = json.loads((out / "results.json").read_text())
    assert [row["readout"] for row in rows] == [row.readout for row in result.rows]
    assert rows[0]["extra"]["eer"] == pytest.approx(result.rows[0].extra["eer"])
    assert "min_dcf" in pd.read_parquet(out / "results.parquet").columns
    saved = np.load(out / "predictions.npz")
    assert saved["targets"].tolist() == labelled("verification").test.value.tolist()
    page = (out / "report.html").read_text()
    assert "Detection error trade-off" in page
    assert "Calibration" not in page
    assert json.loads((out / "settings.json").read_text())["loss"] == "margin"


def test_the_best_readout_gives_the_vectors_that_were_judged(verified):
    result, folder = verified
    best = EmbeddingReadout.from_pretrained(folder / "out" / "best")
    assert best.config.pooling == result.rows[0].readout
    assert best.config.standardise
    data = labelled("verification")
    unit = best.encode(PlantedBackbone(), data.items, 7)
    torch.testing.assert_close(unit.norm(dim=1), torch.ones(len(data)))
    cosines = (unit[data.test.first] * unit[data.test.second]).sum(1).numpy()
    judged = result.predictions[result.key(result.rows[0])]
    assert min(np.abs(judged - cosines).max(axis=1)) < 1e-4
    with pytest.raises(ValueError, match="other weights"):
        best.encode(PlantedBackbone(signal=1.0), data.items)


def test_without_training_part_only_fixed_readouts_and_a_note(tmp_path):
    result = run(labelled("verification", trained=False), f"mean,{LEARNED}", tmp_path)
    assert [row.readout for row in result.rows] == ["mean"]
    assert any("no training part" in note and LEARNED in note for note in result.notes)
    assert result.settings["normalise"] == "none"
    with pytest.raises(ValueError, match="has to be trained"):
        run(labelled("verification", trained=False), LEARNED, tmp_path)


def test_what_cannot_be_judged_is_refused_before_the_backbone_is_asked(tmp_path):
    backbone = PlantedBackbone()
    untrained = dataclasses.replace(labelled("verification", trained=False), notes=("its training part was too small",))
    with pytest.raises(ValueError, match=r"has to be trained; its training part was too small"):
        run(untrained, LEARNED, tmp_path, backbone=backbone)
    with pytest.raises(ValueError, match="knn names classes"):
        run(untrained, "mean,knn", tmp_path, backbone=backbone)
    assert backbone.calls == 0


@pytest.mark.parametrize("task", ["verification", "clustering"])
@pytest.mark.parametrize("normalise", ["auto", "none"])
def test_other_classes_choose_settings_by_the_task_itself(task, normalise, tmp_path, monkeypatch):
    data = with_other_classes(labelled(task, classes=4, train=12))
    groups = []
    judge_group = JudgedRun._judge_group
    monkeypatch.setattr(JudgedRun, "_judge_group", lambda *given: (groups.append(given[1]), judge_group(*given))[1])
    result = run(
        data, f"mean,{LEARNED}", tmp_path, epochs=6, lrs=[1e-4, 1e-2], query_factors=[1.0], normalise=normalise,
        out=tmp_path / "out",
    )  # fmt: skip
    rows = {row.readout: row for row in result.rows}
    metric = rows["mean"].metric
    assert result.settings["chosen_by"] == metric
    assert any(f"chosen by {metric} on validation items of other classes" in note for note in result.notes)
    # What was written down is the task's score of the vectors of the kept states.
    (group,) = groups
    judge = judged_training.validation_judge(data)
    scores, backbone = [], PlantedBackbone()
    for member in range(len(group.stack.members)):
        pooling, norm, _ = group.stack.member(group.best, member)
        table = []
        for item in [data.items[int(i)] for i in judge.items]:
            features = backbone(backbone.collate([item]), "last")
            table.append(pooling(features.hidden[:, 0], features.mask))
        vectors = torch.cat(table).detach()
        vectors = norm(vectors) if normalise == "auto" else vectors
        place = np.full(len(data), -1)
        place[judge.items] = np.arange(len(judge.items))
        scores.append(judge.score(judge.outputs(Vectors(vectors, place)), judge.targets))
    slack = 1e-3 if task == "verification" else 0.03  # rounding can move an item to another cluster
    np.testing.assert_allclose(group.best_score, scores, atol=slack)
    chosen = [i for i, member in enumerate(group.stack.members) if member.lr == rows[LEARNED].lr]
    assert rows[LEARNED].validation == pytest.approx(np.mean([scores[i] for i in chosen]), abs=slack)
    assert 0.4 < rows["mean"].validation <= 1 if task == "verification" else rows["mean"].validation >= 0


def test_the_same_classes_choose_settings_by_accuracy_and_a_note_says_so(verified):
    assert verified[0].settings["chosen_by"] == "accuracy"
    assert any("accuracy on validation items of the classes trained on" in note for note in verified[0].notes)


@pytest.mark.parametrize(("task", "low"), [("verification", 0.0), ("similarity", -1.0), ("clustering", 0.0)])
def test_draws_beyond_the_range_are_clipped(task, low, tmp_path, monkeypatch):
    data = pairs_data() if task == "similarity" else labelled(task)

    def wide(self, outputs):
        estimate = np.array([self.score(each[0], self.targets) for each in outputs])
        return Bootstrap(estimate, estimate[:, None] + np.linspace(-5, 5, 100), len(self.targets))

    monkeypatch.setattr("cenote.probe.judged_scores._Resampled.bootstrap", wide)
    (row,) = run(data, "mean", tmp_path).rows
    assert (row.ci_low, row.ci_high) == (low, 1.0)


def test_standardisation_by_training_vectors_is_a_choice(tmp_path):
    data = labelled("verification")
    plain = run(data, "mean", tmp_path, normalise="none").predictions["mean | 2 | both"][0]
    scaled = run(data, "mean", tmp_path).predictions["mean | 2 | both"][0]
    assert np.abs(plain - scaled).max() > 0.05
    backbone = PlantedBackbone()
    means = []
    for item in data.items:
        features = backbone(backbone.collate([item]), "last")
        means.append(features.hidden[0, 0][features.mask[0]].mean(0))
    table = torch.stack(means)
    train = table[data.train.items]
    unit = torch.nn.functional.normalize((table - train.mean(0)) / (train.var(0, correction=0) + 1e-6).sqrt(), dim=1)
    expected = (unit[data.test.first] * unit[data.test.second]).sum(1)
    np.testing.assert_allclose(scaled, expected.numpy(), atol=1e-5)


def test_margin_loss_is_the_softmax_of_scaled_cosines_at_margin_zero():
    objective = judged_training.AngularObjective("classification", 4, margin=0.0)
    cosines, targets = torch.rand(3, 5, 4) * 2 - 1, torch.tensor([0, 1, 2, 3, 0])
    plain = torch.stack([torch.nn.functional.cross_entropy(30 * member, targets) for member in cosines])
    torch.testing.assert_close(objective.loss(cosines, targets), plain)
    wider = dataclasses.replace(objective, margin=0.3)
    assert (wider.loss(cosines, targets) > plain).all()


def test_clustering(tmp_path):
    data = labelled("clustering", classes=4)
    result = run(data, f"mean,{LEARNED}", tmp_path, epochs=25)
    rows = {row.readout: row for row in result.rows}
    assert rows[LEARNED].score > rows["mean"].score
    assert rows[LEARNED].extra["clusters"] == 4
    assert result.settings["loss"] == "cross_entropy"
    assert any("4 of 4 test classes" in note for note in result.notes)


def test_similarity_is_trained_contrastively(tmp_path):
    result = run(pairs_data(), f"mean,{LEARNED}", tmp_path, contrastive=SHORT, lrs=[1e-2], out=tmp_path / "out")
    rows = {row.readout: row for row in result.rows}
    assert rows[LEARNED].metric == "Spearman correlation"
    assert rows[LEARNED].score > rows["mean"].score
    assert rows[LEARNED].lr == 1e-2
    assert np.isfinite(rows["mean"].validation)
    assert any("random weights on a frozen encoder" in note for note in result.notes)
    assert "Cosines of" in (tmp_path / "out" / "report.html").read_text()


def test_retrieval_through_the_public_probe(tmp_path):
    result = probe(
        PlantedBackbone(), relevance_data(), "mean,max", cache_dir=str(tmp_path), judged_options={"index": "exact"}
    )
    rows = {row.readout: row for row in result.rows}
    assert rows["max"].metric == "nDCG@10"
    assert set(rows["max"].extra) == {"recall@10", "recall@100", "mrr@10"}
    assert rows["max"].extra["recall@100"] == 1.0
    outputs = result.predictions["max | 2 | both"][0][:, 0]
    assert outputs.shape == (20,)
    assert rows["max"].score == pytest.approx(outputs.mean())


def stub(monkeypatch, record, fail_after=None):
    """A training that records its calls and shifts the parameters by its learning rate."""

    def train_embedding(pooling, read, judgement, settings, *, evaluate=None, progress=None):
        if fail_after is not None and len(record) >= fail_after:
            raise KeyboardInterrupt
        tokens, _ = read(torch.tensor([1, 0]))
        record.append((settings.lr, settings.seed, tuple(tokens.shape), evaluate(pooling)))
        generator = torch.Generator().manual_seed(settings.seed)
        with torch.no_grad():
            for parameter in pooling.parameters():
                parameter += settings.lr * torch.randn(parameter.shape, generator=generator)
        return pooling

    monkeypatch.setattr("cenote.tuning.embedding.train_embedding", train_embedding)


def test_first_seed_tries_every_rate_and_the_others_take_the_best(tmp_path, monkeypatch):
    record = []
    stub(monkeypatch, record)
    result = run(relevance_data(), LEARNED, tmp_path, lrs=[1e-3, 1e-2, 1e-1])
    assert [(lr, seed) for lr, seed, *_ in record[:3]] == [(1e-3, 0), (1e-2, 0), (1e-1, 0)]
    assert record[3][:2] == (result.rows[0].lr, 1)
    assert record[0][2][0] == 2
    assert result.rows[0].seeds == 2


def test_an_interrupted_run_goes_on_where_it_was(tmp_path, monkeypatch):
    names = f"mean,{LEARNED},simpool,weighted_layers > mean"
    whole, record = [], []
    stub(monkeypatch, whole)
    expected = run(pairs_data(), names, tmp_path, out=tmp_path / "whole")
    stub(monkeypatch, record, fail_after=4)
    cut = run(pairs_data(), names, tmp_path, out=tmp_path / "cut")
    assert len(cut.rows) == 2
    assert any("interrupted" in note for note in cut.notes)
    assert (cut.interrupted, expected.interrupted) == (True, False)
    stub(monkeypatch, record)
    resumed = run(pairs_data(), names, tmp_path, out=tmp_path / "cut", resume=True)
    assert len(record) == 4 + 2 * 3
    assert [row.readout for row in resumed.rows] == [row.readout for row in expected.rows]
    for key, outputs in expected.predictions.items():
        np.testing.assert_array_equal(resumed.predictions[key], outputs)
    with pytest.raises(ValueError, match="another configuration"):
        run(pairs_data(count=140), names, tmp_path, out=tmp_path / "cut", resume=True)


def test_a_spent_budget_leaves_readouts_out_by_name(tmp_path):
    result = run(pairs_data(), f"mean,max,{LEARNED}", tmp_path, budget=0.0)
    assert len(result.rows) == 1
    assert any("time budget" in note and LEARNED in note for note in result.notes)


def test_features_are_extracted_once(tmp_path):
    backbone = PlantedBackbone()
    run(pairs_data(), "mean", tmp_path, backbone=backbone)
    calls = backbone.calls
    run(pairs_data(), "max", tmp_path, backbone=backbone)
    assert backbone.calls == calls


class Said(Quiet):
    def __init__(self):
        self.stages, self.steps = [], 0

    def stage(self, name, total):
        self.stages.append((name.split()[0], total))


def test_stages_are_announced(tmp_path):
    said = Said()
    run(labelled("verification"), f"mean,{LEARNED}", tmp_path, epochs=2, display=said)
    assert [name for name, _ in said.stages] == ["extract", "judge", "train", "judge"]


def test_bad_input(tmp_path):
    for options, match in (
        ({"normalise": "whiten"}, "normalise must be"),
        ({"loss": "triplet"}, "loss must be"),
        ({"normalise": "standardise"}, "takes its statistics from training labels"),
        ({"task": "retrieval"}, "was loaded for similarity"),
    ):
        with pytest.raises((ValueError, TypeError), match=match if "must" not in match else None):
            run(pairs_data(), "mean", tmp_path, **options)
    with pytest.raises(ValueError, match="knn names classes"):
        run(pairs_data(), "mean,knn", tmp_path)
    with pytest.raises(ValueError, match="judged tasks know no"):
        probe(PlantedBackbone(), pairs_data(), "mean", engine="ray")
    with pytest.raises(ValueError, match="judged_options belong to"):
        probe(judged_options={"p_target": 0.1})


def test_interrupted_label_training_is_judged_as_far_as_it_went_and_resumes(tmp_path, monkeypatch):
    data, options = labelled("verification"), {"epochs": 8, "out": tmp_path / "out"}
    whole = run(data, f"mean,{LEARNED}", tmp_path, epochs=8, out=tmp_path / "whole")

    class Impatient(Quiet):
        def advance(self, steps=1, best=""):
            self.steps = getattr(self, "steps", 0) + (steps == 1 and not best)
            if self.steps == 4:
                raise KeyboardInterrupt

    cut = run(data, f"mean,{LEARNED}", tmp_path, display=Impatient(), **options)
    rows = {row.readout: row for row in cut.rows}
    assert rows[LEARNED].status == "partial"
    assert any("interrupted" in note for note in cut.notes)
    resumed = run(data, f"mean,{LEARNED}", tmp_path, resume=True, **options)
    for key, outputs in whole.predictions.items():
        np.testing.assert_allclose(resumed.predictions[key], outputs, atol=1e-6)
