"""Block-sparse attention against masked dense attention, for every kind of mask."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from cenote.ops.block_sparse import _fits_tiles, block_sparse_attention
from cenote.ops.blocks import block_mask_to_tokens, num_blocks


def dense(query, key, value, block_mask, block_size, causal, key_mask, scale=None):
    queries, keys = query.shape[2], key.shape[2]
    seen = block_mask_to_tokens(block_mask, block_size, queries, keys)
    if causal:
        seen = seen & torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    if key_mask is not None:
        seen = seen & key_mask[:, None, None]
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    out = F.scaled_dot_product_attention(query, key, value, seen, scale=scale)
    return out.masked_fill(~seen.any(-1, keepdim=True), 0.0)


def case(seed, queries, keys, block_size, heads=4, kv_heads=2, batch=2, share=0.4, masked=False):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, heads, queries, 8, generator=generator)
    key, value = (torch.randn(batch, kv_heads, keys, width, generator=generator) for width in (8, 8))
    rows, columns = num_blocks(queries, block_size), num_blocks(keys, block_size)
    mask = torch.rand(batch, heads, rows, columns, generator=generator) < share
    mask[..., 0] = True  # so that every row of blocks sees something
    real = None
    if masked:
        lengths = torch.randint(1, keys + 1, (batch,), generator=generator)
        real = torch.arange(keys) < lengths[:, None]
    return query, key, value, mask, real


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6), st.integers(1, 40), st.integers(0, 12), st.sampled_from([1, 3, 8]), st.booleans(),
    st.booleans(), st.sampled_from([(4, 2), (3, 3), (4, 1)]),
)  # fmt: skip
def test_equals_masked_dense_attention(seed, queries, before, block_size, causal, masked, heads):
    query, key, value, mask, real = case(seed, queries, queries + before, block_size, *heads, masked=masked)
    found = block_sparse_attention(
        query, key, value, mask, block_size, causal=causal, key_mask=real, scale=0.3, backend="torch"
    )
    torch.testing.assert_close(
        found, dense(query, key, value, mask, block_size, causal, real, 0.3), rtol=1e-5, atol=1e-5
    )


def test_a_mask_is_shared_by_items_and_heads():
    query, key, value, mask, _ = case(0, 20, 20, 4)
    shared = mask[:1, :1]
    found = block_sparse_attention(query, key, value, shared, 4, backend="torch")
    torch.testing.assert_close(found, dense(query, key, value, shared.expand_as(mask), 4, True, None))


def test_gradients_are_those_of_dense_attention():
    query, key, value, mask, real = case(1, 13, 13, 4, masked=True)
    inputs = [x.double().requires_grad_() for x in (query, key, value)]
    ours = block_sparse_attention(*inputs, mask, 4, key_mask=real)
    theirs = dense(*inputs, mask, 4, True, real)
    weight = torch.randn_like(ours)
    for a, b in zip(*(torch.autograd.grad((out * weight).sum(), inputs) for out in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b)


def test_half_precision_stays_close():
    query, key, value, mask, _ = case(2, 24, 24, 8)
    found = block_sparse_attention(*(x.bfloat16() for x in (query, key, value)), mask, 8, backend="torch")
    torch.testing.assert_close(found.float(), dense(query, key, value, mask, 8, True, None), rtol=0.05, atol=0.05)


def test_refusals():
    query, key, value, mask, _ = case(3, 16, 16, 4)
    with pytest.raises(ValueError, match=r"mask of \(4, 4\) blocks"):
        block_sparse_attention(query, key, value, mask[..., :3], 4)
    with pytest.raises(ValueError, match="nothing chosen"):
        block_sparse_attention(query, key, value, torch.zeros_like(mask), 4)
    late = torch.zeros_like(mask)
    late[..., -1] = True  # chosen, but later than all rows but the last
    with pytest.raises(ValueError, match="nothing chosen"):
        block_sparse_attention(query, key, value, late, 4)
    with pytest.raises(ValueError, match="backend"):
        block_sparse_attention(query, key, value, mask, 4, backend="cuda")
    with pytest.raises(ValueError, match="do not share"):
        block_sparse_attention(query[:, :3], key, value, mask[:, :3], 4)


def test_values_may_be_wider_than_keys():
    query, key, value, mask, _ = case(5, 21, 21, 4)
    wide = torch.cat([value, value.flip(2), value], dim=-1)
    found = block_sparse_attention(query, key, wide, mask, 4, backend="torch")
    torch.testing.assert_close(found, dense(query, key, wide, mask, 4, True, None), rtol=1e-5, atol=1e-5)


def test_a_gpu_compiles_only_sizes_that_its_kernels_take():
    assert all(_fits_tiles(size, 64, 64) for size in (16, 64, 128))
    assert not any(_fits_tiles(size, 64, 64) for size in (8, 24, 100))
    assert not _fits_tiles(64, 8, 64)


@pytest.mark.compiled
@pytest.mark.parametrize(
    ("causal", "masked", "queries", "keys"),
    [(True, False, 37, 37), (True, False, 21, 37), (True, True, 40, 40), (False, False, 40, 40), (False, True, 37, 37)],
)
def test_flex_equals_masked_dense_attention(causal, masked, queries, keys):
    query, key, value, mask, real = case(4, queries, keys, 16, masked=masked)
    found = block_sparse_attention(query, key, value, mask, 16, causal=causal, key_mask=real, backend="flex")
    torch.testing.assert_close(found, dense(query, key, value, mask, 16, causal, real), rtol=1e-5, atol=1e-5)
