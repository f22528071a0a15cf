"""The share of key positions that is attended to, read off gradients."""

import pytest
import torch
from transformers import DynamicCache

from attention_hosts import decoder, padded
from cenote.attention import H2O, BlockHeuristic, Quest, TidalDecode, Window
from cenote.attention.host import cache_argument
from cenote.compress.density import watched

PROMPT, BUDGET = 31, 8


def density(model, recipe, new):
    ids, _ = padded((PROMPT + 1,))
    with torch.no_grad(), recipe(model):
        cache = DynamicCache(config=model.config)
        if new.start:
            model(ids[:, : new.start], **cache_argument(cache))
        with watched(model) as count:
            logits = model(ids[:, new], **cache_argument(cache)).logits
        return count.share, logits[:, -1]


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        (Window(budget=BUDGET), BUDGET / 32),
        (Window(budget=BUDGET, dense_layers=(0, 2)), (2 * BUDGET + 2 * 32) / (4 * 32)),
        (Quest(budget=BUDGET, page_size=4, dense_layers=(0,)), (3 * BUDGET + 32) / (4 * 32)),
        (H2O(budget=BUDGET), (BUDGET + 1) / 32),
        (TidalDecode(budget=BUDGET, sparse_layer_start=1, correction_layer=()), (2 * BUDGET + 2 * 32) / (4 * 32)),
        (Window(budget=64), 1.0),
    ],
)
def test_it_is_what_the_settings_say(recipe, expected):
    assert density(decoder(initializer_range=0.1), recipe, slice(PROMPT, PROMPT + 1))[0] == pytest.approx(expected)


def test_prompts_are_sampled():
    """Every fourth block row of a causal mask of which each query block sees its own block alone."""
    model = decoder(initializer_range=0.1, num_attention_heads=2, num_key_value_heads=2, head_dim=32)
    recipe = BlockHeuristic(block_size=8, nz_ratio=0.01, rule="local", last_block_dense=False)
    found, _ = density(model, recipe, slice(0, PROMPT + 1))
    visible = torch.arange(1, 33)
    assert found == pytest.approx(float(((visible - 1) % 8 + 1).sum() / visible.sum()))


def test_watching_changes_nothing():
    model = decoder()
    recipe = Quest(budget=BUDGET, page_size=4)
    ids, _ = padded((PROMPT + 1,))
    with torch.no_grad(), recipe(model):
        cache = DynamicCache(config=model.config)
        model(ids[:, :PROMPT], **cache_argument(cache))
        plain = model(ids[:, PROMPT:], **cache_argument(cache)).logits[:, -1]
    watched_logits = density(model, recipe, slice(PROMPT, PROMPT + 1))[1]
    torch.testing.assert_close(watched_logits, plain)
