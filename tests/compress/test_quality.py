"""Figures of quality against numbers worked out by hand or in another way."""

import math

import pytest
import torch

from cenote.backbones.embedded_language import load_embedded_language
from cenote.compress.methods import ReadyDense
from cenote.compress.quality import decoded_logits, grid_mean, retrieval, share_kept, text_quality
from cenote.worlds.planted_facts import PlantedFacts, answer_accuracy


def test_distributions_are_compared_as_defined():
    dense = torch.log(torch.tensor([[[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [1, 1, 1]]]))
    own = torch.log(torch.tensor([[[0.25, 0.5, 0.25], [0.1, 0.8, 0.1], [1, 1, 1]]]))
    found = text_quality(own, dense, torch.tensor([[2, 0, 1]]))
    assert found.agreement == pytest.approx(2 / 3)
    assert found.kl == pytest.approx((0.5 * math.log(2) - 0.25 * math.log(2)) / 3, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(-(math.log(0.25) + math.log(0.8)) / 2), rel=1e-5)


def test_the_dense_model_decoded_step_by_step_is_the_model():
    model, tokenizer = load_embedded_language()
    ids = torch.tensor([tokenizer.encode("The data set holds a number of measurements of flowers and their kinds.")])
    with torch.no_grad():
        plain = model(ids).logits
    found = decoded_logits(ReadyDense(model), ids, 6)
    torch.testing.assert_close(found, plain[:, -7:], atol=1e-3, rtol=1e-3)
    quality = text_quality(found, plain[:, -7:], ids)
    assert quality.agreement == 1.0
    assert quality.kl < 1e-5


def test_retrieval_is_that_of_one_pass_for_the_dense_model():
    model, tokenizer = load_embedded_language()
    depths = (0.0, 0.5, 1.0)
    batch = PlantedFacts(tokenizer).batch(6, 128, 3, list(depths) * 2)
    grid = retrieval(ReadyDense(model), {128: batch}, depths, torch.device("cpu"), rows=4)
    with torch.no_grad():
        right = answer_accuracy(model(batch.input_ids).logits, batch)[:, -1].float()
    expected = {f"{depth:g}": float(right[n::3].mean()) for n, depth in enumerate(depths)}
    assert grid == {"128": pytest.approx(expected)}
    assert grid_mean(grid) == pytest.approx(float(right.mean()))


def test_quality_is_the_lower_of_two_shares():
    assert share_kept(20.0, 10.0, 0.8, 0.8) == pytest.approx(0.5)
    assert share_kept(10.0, 10.0, 0.2, 0.8) == pytest.approx(0.25)
    assert share_kept(10.0, 10.0, 0.0, 0.1) == 1.0  # the dense model finds too few to judge by
    assert share_kept(10.0, 10.0, None, None) == 1.0
    assert grid_mean({}) is None
