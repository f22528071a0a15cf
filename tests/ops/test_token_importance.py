"""Token importance: each rule against its plain form, and the way from scores to weights."""

import pytest
import torch

from cenote.ops.hadamard import random_orthogonal
from cenote.ops.token_importance import (
    activation_difference,
    activation_norm,
    attention_concentration,
    attention_received,
    chunk_weights,
    expand_sequences,
    scale_importance,
    token_distance,
    token_rarity,
)


def _plain_received(query, key, visible):
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    logits = (query @ key.mT * query.shape[-1] ** -0.5).masked_fill(~visible, -torch.inf)
    return logits.softmax(-1).nan_to_num().sum(dim=(1, 2))


@pytest.mark.parametrize("block", [1, 5, 64, None])
def test_attention_received_is_the_column_sum_of_the_maps(block):
    query, key = torch.randn(2, 4, 23, 8), torch.randn(2, 2, 23, 8)
    causal = torch.ones(23, 23, dtype=torch.bool).tril()
    received = attention_received(query, key, block=block)
    torch.testing.assert_close(received, _plain_received(query, key, causal))
    torch.testing.assert_close(received.sum(1), torch.full((2,), 4.0 * 23))
    window = causal & ~causal.tril(-6)
    seen = attention_received(query, key, visible=lambda a, b: window[None, None, a:b], block=block)
    torch.testing.assert_close(seen, _plain_received(query, key, window))


def test_padding_neither_asks_nor_receives():
    query, key = torch.randn(2, 4, 12, 8), torch.randn(2, 4, 12, 8)
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[0, :5], mask[1, 9:] = False, False
    received = attention_received(query, key, mask, block=4)
    for row, real in enumerate(mask):
        alone = attention_received(query[row : row + 1, :, real], key[row : row + 1, :, real])
        torch.testing.assert_close(received[row, real], alone[0])
        assert bool((received[row, ~real] == 0).all())


def test_concentration_variants():
    received, mask = torch.tensor([[4.0, 2.0, 1.0, 9.0]]), torch.tensor([[True, True, True, False]])
    assert attention_concentration(received, mask, "square").tolist() == [[16.0, 4.0, 1.0, 81.0]]
    by_count = attention_concentration(received, mask, position="count")
    torch.testing.assert_close(by_count[0, :3], torch.tensor([4 / 3, 1.0, 1.0]))
    by_root = attention_concentration(received, None, "sqrt", "sqrt")
    torch.testing.assert_close(by_root, received.sqrt() / torch.tensor([4.0, 3.0, 2.0, 1.0]).sqrt())


def test_rules_of_activations_are_their_plain_forms_and_do_not_see_a_rotation():
    x, y = torch.randn(2, 15, 8) + 30, torch.randn(2, 15, 8)
    q = random_orthogonal(8, torch.Generator().manual_seed(0)).float()
    plain = torch.stack([((each[:, None] - each) ** 2).sum(-1).mean(1) for each in x])
    torch.testing.assert_close(token_distance(x), plain, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(token_distance(x @ q), plain, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(activation_norm(x @ q), activation_norm(x))
    torch.testing.assert_close(activation_difference(x @ q, y @ q), activation_difference(x, y))
    mask = torch.ones(2, 15, dtype=torch.bool)
    mask[:, 11:] = False
    torch.testing.assert_close(token_distance(x, mask)[:, :11], token_distance(x[:, :11]), rtol=1e-4, atol=1e-4)


def test_rare_tokens_score_higher():
    assert token_rarity(torch.tensor([[0, 2]]), torch.tensor([7, 1, 3])).tolist() == [[-7.0, -3.0]]


def test_chunk_rules():
    assert chunk_weights("0_3_4", 10).nonzero().flatten().tolist() == [0, 1, 6, 7]  # the tail has no chunk
    assert chunk_weights("first_half", 4).tolist() == [0, 0, 1, 1]
    assert chunk_weights("second_half", 4).tolist() == [1, 1, 0, 0]
    assert chunk_weights("first_3", 5).tolist() == [1, 1, 1, 0, 0]
    for rule in ("4_4", "0_0", "half", "first_x", "7", "0_8_8"):
        with pytest.raises(ValueError, match="rule"):
            chunk_weights(rule, 16)
    with pytest.raises(ValueError, match="leaves none"):
        chunk_weights("0_8", 7)


def test_scores_to_weights():
    scores = torch.tensor([[0.0, 1.0, 4.0, 100.0], [3.0, 3.0, 3.0, 7.0]])
    mask = torch.tensor([[True, True, True, False], [True, True, True, False]])
    weights = scale_importance(scores, mask, 0.2, 1.0)
    torch.testing.assert_close(weights, torch.tensor([[0.2, 0.4, 1.0, 0.0], [1.0, 1.0, 1.0, 0.0]]))
    binned = scale_importance(torch.tensor([[0.0, 0.3, 0.6, 1.0]]), r_min=0.0, bins=3)
    assert binned.tolist() == [[0.0, 0.5, 0.5, 1.0]]
    cut = scale_importance(torch.tensor([[4.0, 1.0, 3.0, 2.0]]), r_min=0.1, truncate=0.5)
    assert (cut == 0).tolist() == [[False, True, False, True]]
    sink = torch.cat([torch.full((1, 1), 1000.0), torch.linspace(0, 1, 99)[None]], dim=1)
    spread = scale_importance(sink, quantile=0.9)
    assert spread.max() == 1
    assert spread.median() > 0.4 > 0.1 > scale_importance(sink).median()


@pytest.mark.parametrize(
    "settings",
    [
        {"r_min": -0.1},
        {"r_min": 0.5, "r_max": 0.1},
        {"r_min": 0.0, "r_max": 0.0},
        {"quantile": 0.5},
        {"bins": 1},
        {"truncate": 1.0},
    ],
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        scale_importance(torch.rand(1, 4), **settings)


def test_scores_that_are_no_numbers_are_refused():
    with pytest.raises(ValueError, match="finite"):
        scale_importance(torch.tensor([[1.0, float("nan")]]))


def test_expansion_rolls_the_real_tokens():
    ids = torch.tensor([[1, 2, 3, 4, 5, 6, 0, 0], [1, 2, 3, 4, 5, 6, 7, 8]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 0, 0], [1] * 8]).bool()
    rolled = expand_sequences(ids, 3, mask)
    assert rolled[:3].tolist() == [[1, 2, 3, 4, 5, 6, 0, 0], [5, 6, 1, 2, 3, 4, 0, 0], [3, 4, 5, 6, 1, 2, 0, 0]]
    assert rolled[4].tolist() == [7, 8, 1, 2, 3, 4, 5, 6]
    with pytest.raises(ValueError, match="copies"):
        expand_sequences(ids, 7, mask)
