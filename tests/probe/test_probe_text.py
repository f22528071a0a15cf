"""The main job on texts of different lengths, with a tiny BERT of random weights and a table of sentences."""

import json

import numpy as np
import pandas as pd
import pytest

from backbones.hosts import save_text
from cenote.probe import Readout, probe
from cenote.probe.across import compare_across


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Sentences whose label is whether a certain word occurs, among words that mean nothing."""
    folder = tmp_path_factory.mktemp("text")
    save_text("bert", folder / "bert")
    generator = np.random.default_rng(0)
    filler = ["the", "mat", "on", "ran", "sat"]
    rows = []
    for number in range(240):
        label = number % 2
        words = list(generator.choice(filler, size=generator.integers(2, 9)))
        words[generator.integers(len(words))] = "dog" if label else "cat"
        rows.append({"text": " ".join(words), "label": ("none", "dog")[label]})
    table = folder / "sentences.csv"
    pd.DataFrame(rows).to_csv(table, index=False)
    result = probe(
        f"hf:{folder / 'bert'}",
        str(table),
        "mean,cls,last_token,efficient_probing(num_queries=4),weighted_layers > efficient_probing(num_queries=4),"
        "multi_layer_pooling,encoder_pooler,knn",
        layers="last",
        seeds=2,
        epochs=12,
        out=folder / "out",
        cache_dir=str(folder / "cache"),
    )
    return result, folder


def test_every_readout_has_a_row(run):
    result, folder = run
    rows = {row.readout: row for row in result.rows}
    assert len(rows) == 8
    assert rows["multi_layer_pooling"].layers == "1,2,3"
    assert rows["mean"].layers == "3"
    assert {row.tokens for row in result.rows} == {"both", "class"}
    assert json.loads((folder / "out" / "results.json").read_text())[0]["readout"] == result.rows[0].readout


def test_the_telling_word_is_found(run):
    result, _ = run
    assert {row.readout: row.score for row in result.rows}["efficient_probing(num_queries=4)"] > 0.8


def test_galleries_show_tokens_and_ignore_padding(run):
    result, _ = run
    gallery = result.galleries[0]
    lengths = [len(tokens) for tokens in result.gallery_items]
    assert len(set(lengths)) > 1
    for weights, length in zip(gallery.weights, lengths, strict=True):
        np.testing.assert_allclose(weights[:, :length].sum(axis=1), 1.0, rtol=1e-4)
        assert not weights[:, length:].any()


def test_the_best_readout_loads_and_across_compares(run, tmp_path):
    result, folder = run
    assert Readout.from_pretrained(folder / "out" / "best").config.classes == ("dog", "none")
    table = compare_across([result, result], tmp_path)
    assert (table["p"] >= 0.5).all()
    assert table["note"].str.contains("cannot reach").all()
