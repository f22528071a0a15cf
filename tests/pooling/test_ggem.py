"""GGeM: groups, parametrisations and the offset."""

import pytest
import torch

from cenote.ops.power import power_mean
from cenote.pooling.gem import GeM
from cenote.pooling.ggem import GGeM


def with_exponents(values, **options):
    pool = GGeM(24, num_groups=len(values), **options)
    pool.set_exponents(torch.tensor(values))
    return pool


def test_groups_are_contiguous_blocks_of_channels():
    x, values = torch.randn(3, 10, 24), [1.0, 2.0, 5.0]
    pooled = with_exponents(values)(x)
    for g, p in enumerate(values):
        block = slice(8 * g, 8 * (g + 1))
        torch.testing.assert_close(pooled[:, block], power_mean(x[..., block], torch.tensor([p])))


def test_one_group_or_equal_exponents_is_gem():
    x = torch.randn(3, 10, 24)
    gem = GeM(24, p=2.5)(x)
    for groups in (1, 6, 24):
        torch.testing.assert_close(GGeM(24, num_groups=groups, p=2.5)(x), gem)


def test_mean_and_nearly_maximum():
    x = torch.rand(3, 10, 24) + 0.1
    torch.testing.assert_close(GGeM(24, p=1.0)(x), x.mean(1))
    torch.testing.assert_close(GGeM(24, p=1000.0)(x), x.amax(1), rtol=3e-3, atol=0)


@pytest.mark.parametrize("parametrisation", ["plain", "softplus"])
def test_gradcheck(parametrisation):
    pool = with_exponents([0.5, 3.0, 9.0], parametrisation=parametrisation).double()
    x = torch.rand(2, 5, 24, dtype=torch.float64).add(0.1).requires_grad_()
    (parameter,) = pool.parameters()

    def run(x, parameter):
        return torch.func.functional_call(pool, {"p" if parametrisation == "plain" else "raw_p": parameter}, (x,))

    assert torch.autograd.gradcheck(run, (x, parameter.detach().requires_grad_()))


def test_both_parametrisations_hold_the_same_exponents():
    values = [0.02, 0.5, 3.0, 64.0]
    for parametrisation in ("plain", "softplus"):
        pool = GGeM.from_reference({"p": torch.tensor(values)}, dim=24, num_groups=4, parametrisation=parametrisation)
        torch.testing.assert_close(pool.exponents.detach(), torch.tensor(values))


def test_softplus_learns_where_the_plain_exponent_is_stuck_at_the_clamp():
    x = torch.rand(2, 5, 24) + 0.1
    for parametrisation, stuck in (("plain", True), ("softplus", False)):
        pool = with_exponents([0.02, 0.02, 0.02], parametrisation=parametrisation)
        (parameter,) = pool.parameters()
        with torch.no_grad():
            parameter.sub_(0.015 if stuck else 1.0)  # down to the clamp, or further down the softplus
        (grad,) = torch.autograd.grad(pool(x).sum(), parameter)
        assert bool((grad == 0).all()) == stuck


def test_exponents_take_part_clamped():
    x = torch.rand(2, 5, 24) + 0.1
    pool = GGeM(24, 3)
    with torch.no_grad():
        pool.p.copy_(torch.tensor([-5.0, 1e-9, 1e9]))
    torch.testing.assert_close(pool(x), with_exponents([0.01, 0.01, 1000.0])(x))


def test_offset_keeps_signed_tokens():
    x = torch.randn(8, 10, 24)
    mask = torch.ones(8, 10, dtype=torch.bool)
    mask[:, 7:] = False
    x[~mask] = -1e6
    pool = GGeM(24, offset=True)
    assert 0.4 < pool.clamped_fraction(x, mask).item() < 0.6
    for half in (slice(0, 4), slice(4, 8)):
        pool.fit_offset(x[half], mask[half], extend=half.start > 0)
    torch.testing.assert_close(pool.offset, x[:, :7].amin((0, 1)))
    assert pool.clamped_fraction(x, mask).item() == pytest.approx(24 / (8 * 7 * 24))  # the minima themselves
    torch.testing.assert_close(pool(x, mask), GGeM(24)(x - pool.offset, mask))
    assert "offset" in pool.state_dict()
    assert "offset" not in GGeM(24).state_dict()
    with pytest.raises(ValueError, match="offset=True"):
        GGeM(24).fit_offset(x)


def test_untrainable_exponents_have_no_gradient():
    assert not GGeM(24, trainable=False).p.requires_grad


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_groups": 7}, r"one of \[1, 2, 3, 4, 6, 8, 12, 24\]"),
        ({"num_groups": 0}, "num_groups"),
        ({"p": 0.0}, "initial p"),
        ({"p": float("nan")}, "initial p"),
        ({"p": float("inf")}, "initial p"),
        ({"eps": 0.0}, "eps"),
        ({"parametrisation": "square"}, "parametrisation"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        GGeM(24, **options)


@pytest.mark.parametrize(
    ("p", "message"),
    [([3.0, 3.0], r"shape \(3,\), got \(2,\)"), ([1.0, -1.0, 2.0], "positive"), ([1.0, float("inf"), 2.0], "finite")],
)
def test_bad_exponents_are_refused(p, message):
    with pytest.raises(ValueError, match=message):
        GGeM.from_reference({"p": torch.tensor(p)}, dim=24, num_groups=3)
