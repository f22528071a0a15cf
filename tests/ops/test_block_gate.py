"""Scores of block pairs and what they choose, against plain loops."""

import math

import pytest
import torch
import torch.nn.functional as F

from cenote.ops.attention_statistics import block_maxima
from cenote.ops.block_gate import (
    block_target,
    choose_blocks,
    distillation_loss,
    kept_columns,
    parse_gate_type,
    pool_kinds,
    quest_bounds,
)


def causal_map(query, key, scale):
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    logits = query @ key.transpose(-1, -2) * scale
    return logits.masked_fill(torch.ones_like(logits, dtype=torch.bool).triu(1), float("-inf")).softmax(-1)


@pytest.mark.parametrize("tokens", [1, 7, 16, 37])
def test_target_is_the_pooled_dense_map(tokens):
    query, key = torch.randn(2, 4, tokens, 8), torch.randn(2, 2, tokens, 8)
    target = block_target(query, key, 8, scale=0.7)
    dense = causal_map(query, key, 0.7)
    blocks = -(-tokens // 8)
    for i in range(blocks):
        for j in range(blocks):
            part = dense[:, :, 8 * i : 8 * i + 8, 8 * j : 8 * j + 8].amax(dim=(2, 3))
            torch.testing.assert_close(block_maxima(query, key, 8, scale=0.7)[:, :, i, j], part)
    torch.testing.assert_close(target.sum(-1), torch.ones(2, 4, blocks))
    assert not target.triu(1).any()


def test_gate_types():
    assert parse_gate_type("Qavg_Kmaxminavg") == (("avg",), ("max", "min", "avg"))
    assert parse_gate_type("Qavgmax_Kavgminmax") == (("max", "avg"), ("max", "min", "avg"))
    for wrong in ("avg_Kavg", "Qavg-Kavg", "Qavg_Kavg_", "Qavg_K", "Qavgmean_Kavg", ""):
        with pytest.raises(ValueError, match=r"expected|gate type"):
            parse_gate_type(wrong)


def test_poolings_stand_in_the_order_max_min_avg_and_divide_by_true_lengths():
    x = torch.randn(1, 2, 10, 3)
    pooled = pool_kinds(x, 4, ("max", "min", "avg"))
    last = x[:, :, 8:]
    torch.testing.assert_close(pooled[:, :, 2], torch.cat([last.amax(2), last.amin(2), last.mean(2)], dim=-1))


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5, 0.9, 1.0])
def test_a_ratio_keeps_that_share_of_the_triangle(ratio):
    chosen = choose_blocks(torch.randn(1, 2, 200, 200), nz_ratio=ratio, last_block_dense=False)
    share = float(chosen.sum()) / (2 * 200 * 201 / 2)
    assert abs(share - ratio) < 0.02
    assert not chosen.triu(1).any()
    k = kept_columns(ratio, 200)
    assert torch.equal(chosen.sum(-1)[0, 0], torch.arange(1, 201).clamp(max=k))


def test_thresholds_are_strict_and_leave_every_row_its_best():
    scores = torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0], [0.2, 0.3, 0.5]])
    logits = scores.clamp(min=1e-30).log().expand(1, 1, 3, 3)
    chosen = choose_blocks(logits, threshold=0.5, last_block_dense=False)
    assert chosen[0, 0].tolist()[1].count(True) == 1
    assert chosen[0, 0, 2].tolist() == [False, False, True]
    assert choose_blocks(logits, threshold=0.25, last_block_dense=False)[0, 0, 2].tolist() == [False, True, True]
    many = choose_blocks(torch.zeros(1, 1, 50, 50), threshold=0.1, last_block_dense=False)
    assert torch.equal(many.sum(-1)[0, 0], torch.cat([torch.arange(1, 10), torch.ones(41, dtype=torch.long)]))
    steep = torch.full((1, 1, 4, 4), -1000.0)
    steep[..., 0] = 0
    assert choose_blocks(steep, threshold=0.0)[0, 0].sum() == 10
    both = choose_blocks(torch.zeros(1, 1, 50, 50), threshold=0.1, last_block_dense=True)
    assert both[0, 0, -2:].sum(-1).tolist() == [49, 50]


def test_loss_is_torchs_and_its_row_mean():
    logits, target = torch.randn(2, 3, 9, 9), torch.rand(2, 3, 9, 9).softmax(-1)
    seen = torch.ones(9, 9, dtype=torch.bool).tril()
    logits = logits.masked_fill(~seen, -1e30)
    target = (target * seen) / (target * seen).sum(-1, keepdim=True)
    kept = slice(9 // 4, None)
    expected = F.kl_div(F.log_softmax(logits[:, :, kept], dim=-1), target[:, :, kept], reduction="none").mean()
    torch.testing.assert_close(distillation_loss(logits, target), expected)
    torch.testing.assert_close(distillation_loss(logits, target, "row"), expected * 9)
    torch.testing.assert_close(distillation_loss(target.clamp(min=1e-30).log(), target, "row"), torch.tensor(0.0))
    with pytest.raises(ValueError, match="reduction"):
        distillation_loss(logits, target, "sum")


def test_quest_bounds_hold_and_are_met():
    query, key = torch.randn(1, 4, 21, 6), torch.randn(1, 2, 21, 6)
    bounds = quest_bounds(query, key, 4)
    products = query @ key.repeat_interleave(2, dim=1).transpose(-1, -2)
    for i in range(6):
        for j in range(6):
            part = products[:, :, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4]
            assert (part.amax(dim=(2, 3)) <= bounds[:, :, i, j] + 1e-5).all()
    torch.testing.assert_close(quest_bounds(query, key, 1), products)


def test_kept_columns_never_fall_to_none():
    assert kept_columns(1e-6, 10) == 1
    assert kept_columns(1.0, 10) == 10
    assert kept_columns(0.5, 100) == math.floor((1 - math.sqrt(0.5)) * 100)
