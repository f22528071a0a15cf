"""Streamed statistics against those of full maps."""

import pytest
import torch
import torch.nn.functional as F

from cenote.ops.attention_statistics import (
    attention_entropy,
    attention_mass,
    attention_received,
    block_maxima,
    map_rows,
    map_similarity,
)


def full(query, key, mask, causal, scale=None):
    keys, queries = key.shape[2], query.shape[2]
    logits = query @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).mT
    logits = logits * (query.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        logits = logits.masked_fill(~torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries), -torch.inf)
    if mask is None:
        return logits.softmax(-1)
    maps = logits.masked_fill(~mask[:, None, None], -torch.inf).softmax(-1)
    return maps.masked_fill(~mask[:, None, keys - queries :, None], 0.0)


@pytest.fixture(params=[(True, True, 17), (True, False, 17), (False, True, 17), (True, True, 9)])
def maps(request):
    causal, masked, queries = request.param
    torch.manual_seed(0)
    query, key = torch.randn(2, 4, queries, 8), torch.randn(2, 2, 17, 8)
    mask = torch.ones(2, 17, dtype=torch.bool)
    mask[1, :5] = False
    options = {"causal": causal, "scale": 0.5}
    mask = mask if masked else None
    return query, key, mask, options, full(query, key, mask, causal, 0.5)


def test_rows_are_those_of_the_map(maps):
    query, key, mask, options, expected = maps
    rows = [part for _, part in map_rows(query, key, mask, chunk=5, **options)]
    torch.testing.assert_close(torch.cat(rows, dim=2), expected)


def test_received_is_the_sum_over_queries(maps):
    query, key, mask, options, expected = maps
    torch.testing.assert_close(attention_received(query, key, mask, chunk=5, **options), expected.sum(2))


def test_entropy_is_that_of_the_rows(maps):
    query, key, mask, options, expected = maps
    entropy = -(expected * expected.clamp(min=1e-30).log()).sum(-1)
    torch.testing.assert_close(attention_entropy(query, key, mask, chunk=5, **options), entropy, atol=1e-5, rtol=1e-5)


def test_mass_is_the_share_of_the_set(maps):
    query, key, mask, options, expected = maps
    chosen = torch.rand(2, 17) < 0.4
    found = attention_mass(query, key, chosen, mask, chunk=5, **options)
    torch.testing.assert_close(found, (expected * chosen[:, None, None]).sum(-1))


def test_block_maxima_are_max_pooled_maps(maps):
    query, key, mask, options, expected = maps
    found = block_maxima(query, key, 4, mask, **options)
    wide = F.pad(expected, (0, -17 % 4, 0, -query.shape[2] % 4))
    torch.testing.assert_close(found, F.max_pool2d(wide, 4))


@pytest.mark.parametrize("head_mean", [False, True])
def test_similarity_is_the_cosine_of_flattened_maps(maps, head_mean):
    query, key, mask, options, _ = maps
    pairs = [(query, key), (query.flip(1), key.flip(1)), (query * 2, key)]
    wholes = [full(q, k, mask, options["causal"], 0.5) for q, k in pairs]
    flat = torch.stack([(w.mean(1) if head_mean else w).flatten(1) for w in wholes], dim=1)
    expected = F.cosine_similarity(flat[:, :, None], flat[:, None], dim=-1)
    found = map_similarity(pairs, mask, head_mean=head_mean, chunk=5, **options)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.diagonal(dim1=1, dim2=2), torch.ones(2, 3))
