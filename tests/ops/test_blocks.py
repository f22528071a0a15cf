"""Block pooling with ragged tails, against loops."""

import pytest
import torch

from cenote.ops.blocks import block_mask_to_tokens, causal_blocks, density, num_blocks, pool_blocks


@pytest.mark.parametrize("kind", ["mean", "max", "min"])
@pytest.mark.parametrize("tokens", [1, 4, 5, 11])
def test_pools_what_each_block_has(kind, tokens):
    x = torch.randn(2, 3, tokens, 5)
    parts = [x[:, :, first : first + 4] for first in range(0, tokens, 4)]
    reduce = {"mean": lambda p: p.mean(2), "max": lambda p: p.amax(2), "min": lambda p: p.amin(2)}[kind]
    torch.testing.assert_close(pool_blocks(x, 4, kind), torch.stack([reduce(part) for part in parts], dim=2))


@pytest.mark.parametrize("kind", ["mean", "max", "min"])
def test_leaves_padding_out_and_gives_zero_for_empty_blocks(kind):
    x = torch.randn(1, 2, 11, 5)
    mask = torch.ones(1, 11, dtype=torch.bool)
    mask[0, :6] = False
    pooled = pool_blocks(x, 4, kind, mask)
    assert not pooled[:, :, 0].any()
    alone = pool_blocks(x[:, :, 6:8], 4, kind)
    torch.testing.assert_close(pooled[:, :, 1:2], alone)


def test_unknown_kinds_and_sizes_are_refused():
    x = torch.randn(1, 1, 4, 2)
    with pytest.raises(ValueError, match="'mean', 'max' or 'min'"):
        pool_blocks(x, 2, "avg")
    with pytest.raises(ValueError, match="at least 1"):
        num_blocks(4, 0)


def test_causal_blocks_end_in_the_last_corner():
    expected = torch.tensor([[1, 1, 0], [1, 1, 1]], dtype=torch.bool)
    assert torch.equal(causal_blocks(2, 3), expected)


def test_density_counts_the_causal_part_only():
    mask = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    mask[0, 0, :, 0] = True
    mask[0, 0, 0, 3] = True  # beyond the triangle
    assert density(mask) == pytest.approx(4 / 10)
    assert density(mask, causal=False) == pytest.approx(5 / 16)


def test_tokens_of_a_block_share_its_entry():
    mask = torch.tensor([[True, False], [False, True]])
    tokens = block_mask_to_tokens(mask, 3, 5, 4)
    assert tokens.shape == (5, 4)
    assert tokens[:3, :3].all()
    assert tokens[3:, 3:].all()
    assert tokens.sum() == 9 + 2
