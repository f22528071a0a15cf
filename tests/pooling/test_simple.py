"""Poolings of few or no parameters against their definitions, row by row."""

import pytest
import torch

from cenote.pooling import create_pooling
from cenote.pooling.attentive_statistics import AttentiveStatistics


@pytest.fixture
def ragged():
    """Tokens padded on the left, on the right and in the middle, and their mask."""
    mask = torch.ones(4, 6, dtype=torch.bool)
    mask[1, :2] = mask[2, 3:] = mask[3, 2:4] = False
    return torch.randn(4, 6, 8), mask


DEFINITIONS = {
    "mean": lambda x: x.mean(0),
    "max": lambda x: x.amax(0),
    "cls": lambda x: x[0],
    "last_token": lambda x: x[-1],
    "weighted_mean": lambda x: sum(i * x[i - 1] for i in range(1, len(x) + 1)) / sum(range(1, len(x) + 1)),
    "gem": lambda x: x.clamp(min=1e-6).pow(3).mean(0).pow(1 / 3),
    "ggem": lambda x: x.clamp(min=1e-6).pow(3).mean(0).pow(1 / 3),
}


@pytest.mark.parametrize("name", DEFINITIONS)
def test_each_row_is_the_definition_on_its_real_tokens(name, ragged):
    tokens, mask = ragged
    pool = create_pooling(name, dim=8)
    expected = torch.stack([DEFINITIONS[name](tokens[b, mask[b]]) for b in range(4)])
    torch.testing.assert_close(pool(tokens, mask), expected)
    torch.testing.assert_close(pool(tokens), torch.stack([DEFINITIONS[name](row) for row in tokens]))
    assert not list(pool.parameters()) or name in ("gem", "ggem")


def test_attentive_statistics_is_the_paper_formula(ragged):
    tokens, mask = ragged
    pool = AttentiveStatistics(8, hidden_dim=5, variance_floor=1e-9)
    pooled, weights = pool(tokens, mask, return_weights=True)
    assert pool.out_dim == 16
    for b in range(4):
        x = tokens[b, mask[b]]
        scores = (x @ pool.hidden.weight.T + pool.hidden.bias).tanh() @ pool.score.weight[0]
        a = scores.softmax(0).unsqueeze(1)
        torch.testing.assert_close(weights[b, 0, mask[b]], a.squeeze(1))
        mean = (a * x).sum(0)
        variance = (a * x * x).sum(0) - mean * mean
        torch.testing.assert_close(pooled[b], torch.cat([mean, variance.clamp(min=1e-9).sqrt()]), rtol=1e-4, atol=1e-4)


def test_attentive_statistics_refuses_bad_settings():
    with pytest.raises(ValueError, match="hidden_dim"):
        AttentiveStatistics(8, hidden_dim=0)
    with pytest.raises(ValueError, match="variance_floor"):
        AttentiveStatistics(8, variance_floor=0.0)
