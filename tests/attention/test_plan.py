"""Layer plans."""

import pytest

from cenote.attention.plan import LayerPlan


def test_reuse_takes_the_nearest_selecting_layer():
    plan = LayerPlan.from_selectors(8, full=[0, 4], select=[1, 5])
    assert plan.roles == ("full", "select", 1, 1, "full", "select", 5, 5)
    assert plan.layers("reuse") == (2, 3, 6, 7)
    assert plan.followers(1) == (2, 3)
    assert [plan.source(layer) for layer in range(8)] == [0, 1, 1, 1, 4, 5, 5, 5]


def test_shared_layers_copy_the_nearest_that_computes():
    plan = LayerPlan.from_shared(6, [2, 3, 5])
    assert plan.roles == ("full", "full", 1, 1, "full", 4)
    plan.check(6, sources=("full",))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LayerPlan(("full", "dense")), "a role is"),
        (lambda: LayerPlan((0, "full")), "no earlier layer"),
        (lambda: LayerPlan(("select", 2, "full")), "no earlier layer"),
        (lambda: LayerPlan(("select", 0, 1)), "itself reuses"),
        (lambda: LayerPlan.from_selectors(3, [], [1]), "no layer before it selects"),
        (lambda: LayerPlan.from_selectors(3, [0], [0]), "different layers"),
        (lambda: LayerPlan.from_selectors(3, [0], [3]), "different layers"),
        (lambda: LayerPlan.from_shared(3, [0]), "1 to 2"),
        (lambda: LayerPlan.from_shared(3, [1, 1]), "different"),
        (lambda: LayerPlan(("full", "select", 1)).check(4), "for 3 layers"),
        (lambda: LayerPlan(("full", 0)).check(2), "not a select layer"),
    ],
)
def test_plans_that_cannot_be_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
