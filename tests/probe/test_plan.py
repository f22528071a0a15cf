"""What a probe compares, and with which settings."""

import pytest

from cenote.pooling import list_poolings
from cenote.pooling.registry import pooling_class
from cenote.probe.plan import COMPOSED, Host, default_options, largest_divisor, plan, split_specs
from cenote.types import Grid

IMAGES = Host(64, (1, 2), Grid(4, 4), 1, "image", True)
TEXTS = Host(384, (1, 2), None, 1, "text", False)


def planned(readouts, host=IMAGES, layers=(2,), tokens="auto", seeds=2, lrs=None, query_factors=None):
    return plan(readouts, host, 2, layers, tokens, seeds, lrs, query_factors)


def made_for(modality):
    return {name for name in list_poolings() if modality in (pooling_class(name).modalities or (modality,))}


def test_all_means_every_registered_pooling_and_the_compositions():
    assert {c.readout for c in planned("all")} == {*made_for("image"), *COMPOSED}


def test_sequences_get_all_but_the_readouts_that_need_a_grid():
    left_out = made_for("text") - {c.readout for c in planned("all", TEXTS)}
    assert left_out == {"cbam", "clip", "dolg", "spp"}
    with pytest.raises(ValueError, match=r"spp: it needs a patch grid"):
        planned("spp", TEXTS)


@pytest.mark.parametrize("dim", [48, 384, 1024])
@pytest.mark.parametrize("name", list_poolings())
def test_defaults_fit_every_usual_width(dim, name):
    host = Host(dim, (1, 2), Grid(4, 4), 1, "image", True)
    (candidate,) = planned(name, host)
    assert candidate.options is not None


def test_published_defaults_where_they_divide():
    assert default_options("efficient_probing", 768) == {"num_queries": 32}
    assert default_options("jepa", 768)["num_heads"] == 16
    assert default_options("esimpool", 1024)["num_heads"] == 8
    assert largest_divisor(1152, 32) == 32


def test_grid_of_members():
    (candidate,) = planned("ep", lrs=(0.1, 0.2, 0.3), query_factors=(1, 5), seeds=2)
    assert len(candidate.members) == 12
    (candidate,) = planned("gem", lrs=(0.1, 0.2), query_factors=(1, 5), seeds=2)
    assert {(m.lr, m.query_factor, m.seed) for m in candidate.members} == {
        (lr, 1, s) for lr in (0.1, 0.2) for s in (0, 1)
    }
    assert planned("mean")[0].members == ()
    assert planned("weighted_layers > mean")[0].members != ()
    assert all(c.members == () for c in planned("free"))


def test_options_in_the_name_win():
    (candidate,) = planned("efficient_probing(num_queries=4)")
    assert candidate.make(64).queries.shape == (4, 64)


def test_names_are_split_outside_parentheses():
    assert split_specs("mean, ep(num_queries=4,d_out=2),weighted_layers > gem") == [
        "mean",
        "ep(num_queries=4,d_out=2)",
        "weighted_layers > gem",
    ]


def test_layers_and_tokens_multiply_one_layer_readouts_only():
    keys = {c.key for c in planned("gem,weighted_layers > gem,cls", layers=(1, 2), tokens=["patches", "both"])}
    assert keys == {
        *(f"gem | {layer} | {tokens}" for layer in (1, 2) for tokens in ("patches", "both")),
        *(f"weighted_layers > gem | 1,2 | {tokens}" for tokens in ("patches", "both")),
        *(f"cls | {layer} | class" for layer in (1, 2)),
    }


def test_what_a_backbone_cannot_feed_is_refused_by_name():
    decoder = Host(64, (2,), None, 0, "text", False)
    with pytest.raises(ValueError, match=r"cls: the backbone has no class token"):
        planned("cls", decoder)
    with pytest.raises(ValueError, match=r"only one is extracted"):
        planned("weighted_layers > mean", decoder)
    with pytest.raises(ValueError, match=r"no class token"):
        planned("mean", decoder, tokens="class")
