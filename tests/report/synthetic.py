"""Made-up results of a probe: what the report must cope with, without a probe."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from cenote.probe.result import Gallery, ProbeResult, Row

# readout, layers, tokens, score, parameters, MACs, latency, learning rate, entropy, tie group
TABLE: tuple[tuple[Any, ...], ...] = (
    ("efficient_probing(num_queries=16)", "4", "patches", 0.963, 5770, 70000, 0.0121, 0.03, 0.61, 1),
    ("weighted_layers > efficient_probing", "1,2,3,4", "patches", 0.961, 7002, 140000, 0.0210, 0.01, 0.66, 1),
    ("siglip", "4", "patches", 0.957, 50570, 190000, 0.0402, 0.003, 0.71, 1),
    ("efficient_probing(num_queries=16)", "3", "patches", 0.949, 5770, 70000, 0.0122, 0.03, 0.58, 2),
    ("simpool", "4", "patches", 0.941, 8970, 90000, 0.0180, 0.01, 0.80, 2),
    ("efficient_probing(num_queries=16)", "2", "patches", 0.921, 5770, 70000, 0.0120, 0.03, 0.55, 3),
    ("knn", "4", "patches", 0.905, 0, 76800, 0.0300, None, None, 3),
    ("encoder_pooler", "4", "both", 0.874, 650, 640, 0.0020, None, None, 4),
    ("mean", "4", "patches", 0.862, 650, 1700, 0.0031, None, None, 4),
    ("mean", "3", "patches", 0.845, 650, 1700, 0.0031, None, None, 4),
    ("cls", "4", "class", 0.843, 650, 640, 0.0021, None, None, 4),
    ("mean", "2", "patches", 0.802, 650, 1700, 0.0031, None, None, 5),
    ("max", "4", "patches", 0.790, 650, 1700, 0.0035, None, None, 5),
)
SETTINGS = {
    "backbone": "embedded",
    "data": "digits",
    "task": "classification",
    "layers": [2, 3, 4],
    "seeds": 3,
    "epochs": 60,
    "lrs": None,
    "backbone_fingerprint": "9f86d081884c7d65",
}


def rows(table: tuple[tuple[Any, ...], ...] = TABLE, metric: str = "accuracy") -> tuple[Row, ...]:
    return tuple(
        Row(
            readout,
            layers,
            tokens,
            score,
            score - 0.014,
            score + 0.012,
            metric,
            score + 0.004,
            params,
            macs,
            latency,
            4.2 + k,
            lr,
            None if lr else 1e-3,
            10.0 if entropy else None,
            entropy,
            31.0 if lr else None,
            3 if lr else 1,
            tie,
            "partial" if readout == "siglip" else "done",
        )
        for k, (readout, layers, tokens, score, params, macs, latency, lr, entropy, tie) in enumerate(table)
    )


def _probabilities(
    rng: np.random.Generator, targets: np.ndarray, classes: int, accuracy: float, seeds: int = 3
) -> np.ndarray:
    logits = rng.normal(size=(seeds, len(targets), classes))
    logits[:, np.arange(len(targets)), targets] += 6 * accuracy - 1.4
    exp = np.exp(1.6 * logits)
    return exp / exp.sum(-1, keepdims=True)


def image_result(classes: int = 10) -> ProbeResult:
    """Classification of images, attentive readouts on a 4 x 4 grid, one of them with a class token in front."""
    rng = np.random.default_rng(0)
    table = rows()
    targets = rng.integers(0, classes, 597)
    bunch = load_digits()
    items = tuple(Image.fromarray((image * 255 / 16).astype(np.uint8)) for image in bunch.images[1200:1208])
    bright = bunch.images[1200:1208].reshape(8, 4, 2, 4, 2).sum((2, 4)).reshape(8, 1, 16) / 20
    galleries = []
    for row, queries, prefix in ((table[0], 16, 0), (table[1], 16, 0), (table[2], 1, 1)):
        scores = rng.normal(size=(1, queries, 16 + prefix)) * 2 + rng.normal(size=(8, queries, 16 + prefix)) * 0.3
        scores[..., prefix:] += bright
        weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
        entropy = -(weights * np.log(weights)).sum(-1).mean(0) / np.log(16 + prefix)
        galleries.append(Gallery(ProbeResult.key(row), weights, entropy))
    return ProbeResult(
        table,
        SETTINGS,
        tuple(f"class {k}" if classes > 10 else str(k) for k in range(classes)),
        {ProbeResult.key(row): _probabilities(rng, targets, classes, row.score, row.seeds) for row in table},
        targets,
        items,
        (4, 4),
        1,
        tuple(galleries),
        ("3 items could not be read and were left out",),
    )


def text_result() -> ProbeResult:
    """Classification of texts by two readouts, one of them attentive, and a hostile token and class name."""
    rng = np.random.default_rng(1)
    table = rows((TABLE[0], TABLE[8]))
    items = (
        ["[CLS]", "a", "won", "##der", "##ful", "film", ",", "moving", "and", "funny", ".", "[SEP]"],
        ["[CLS]", "</script><b>", "du", "##ll", "[SEP]"],
    )
    weights = rng.random((2, 4, 12)) ** 4
    weights[1, :, 5:] = 0
    weights /= weights.sum(-1, keepdims=True)
    targets = rng.integers(0, 2, 80)
    return ProbeResult(
        table,
        {**SETTINGS, "backbone": "hf:tiny"},
        ("<b>negative</b>", "positive"),
        {ProbeResult.key(row): _probabilities(rng, targets, 2, 0.6, row.seeds) for row in table},
        targets,
        items,
        None,
        0,
        (Gallery(table[0].readout, weights, np.array([0.7, 0.6, 0.9, np.nan])),),
    )


def multilabel_result() -> ProbeResult:
    rng = np.random.default_rng(2)
    table = rows(TABLE[:3], "label-ranking average precision")
    targets = (rng.random((60, 4)) < 0.4).astype(np.float32)
    targets[:, 3] = 0
    predictions = {
        ProbeResult.key(row): np.clip(targets * 0.5 + rng.random((row.seeds, 60, 4)) * 0.5, 0, 1) for row in table
    }
    return ProbeResult(table, SETTINGS, ("red", "green", "blue", "never"), predictions, targets)


def regression_result() -> ProbeResult:
    rng = np.random.default_rng(3)
    table = rows(TABLE[:3], "R2")
    targets = rng.normal(size=90).astype(np.float32)
    predictions = {
        ProbeResult.key(row): targets[None, :, None] + 0.2 * rng.normal(size=(row.seeds, 90, 1)) for row in table
    }
    return ProbeResult(table, SETTINGS, (), predictions, targets)
