"""One budget in every method's settings."""

import pytest

from cenote.attention.registry import create_recipe, list_recipes, recipe_class
from cenote.compress.budgets import SETTINGS, follows_budget, settings
from cenote.compress.methods import WEIGHTS, parse_methods


@pytest.mark.parametrize("tokens", [64, 256, 1024, 16384])
@pytest.mark.parametrize("budget", [0.01, 0.125, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("name", sorted(set(SETTINGS) & set(list_recipes())))
def test_every_recipe_takes_what_the_table_gives(name, budget, tokens):
    create_recipe(name, **settings(name, budget, tokens, max(tokens, 1024)))


@pytest.mark.parametrize(
    ("name", "key"),
    [("window", "budget"), ("h2o", "budget"), ("quest", "budget"), ("tidal_decode", "budget"), ("hylra", "top_k")],
)
def test_tokens_are_that_share_of_the_row(name, key):
    assert settings(name, 0.25, 4096, 4096)[key] == 1024


def test_seer_decode_counts_the_two_blocks_it_always_adds():
    found = settings("seer_decode", 0.25, 4096, 4096)
    assert found["token_budget"] + 2 * found["block_size"] == 1024


@pytest.mark.parametrize(("budget", "bits"), [(0.125, 2), (0.1875, 3), (0.25, 4), (0.5, 8), (0.01, 2), (0.9, 8)])
def test_weights_keep_that_share_of_sixteen_bits(budget, bits):
    assert all(settings(name, budget, 1, 1) == {"bits": bits} for name in WEIGHTS)


def test_a_setting_of_the_users_own_stands_above_the_budget():
    assert follows_budget("window", {})
    assert not follows_budget("window", {"budget": 64})
    assert follows_budget("window", {"sinks": 2})
    assert not follows_budget("a recipe that the table does not know", {})


def test_methods_are_checked_before_anything_runs():
    names = [method.name for method in parse_methods("all")]
    assert set(names) == {*list_recipes(), *WEIGHTS}
    assert parse_methods(["quest(page_size=8)"])[0].options == {"page_size": 8}
    with pytest.raises(ValueError, match="did you mean quest"):
        parse_methods(["qest"])
    with pytest.raises(ValueError, match="takes no option"):
        parse_methods(["window(pages=2)"])
    with pytest.raises(ValueError, match="takes no option"):
        parse_methods(["rsq(byte=2)"])
    with pytest.raises(ValueError, match="no methods given"):
        parse_methods([])
    assert recipe_class("quest").name == "quest"
