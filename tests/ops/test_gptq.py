"""Grids, bit packing, round-to-nearest and GPTQ."""

from dataclasses import replace

import pytest
import torch

from cenote.ops.bit_packing import pack_codes, unpack_codes
from cenote.ops.gptq import WeightedHessian, gptq, inverse_factor, normalize_importance, relative_error
from cenote.ops.quantizer import GridSettings, fit_grid, round_to_nearest


def _layer(rows=16, columns=48, tokens=200, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(3, tokens, columns, generator=g) @ torch.randn(columns, columns, generator=g) / columns**0.5
    return torch.randn(rows, columns, generator=g), x, torch.rand(3, tokens, generator=g)


def _hessian(x, weights=None):
    hessian = WeightedHessian(x.shape[-1])
    for row in range(len(x)):
        hessian.add(x[row], None if weights is None else weights[row])
    return hessian.value


def _plain_gptq(weight, hessian, settings, damping=0.01):
    """Column after column without blocks, in float64, whole rows."""
    w, h = weight.double(), hessian.double()
    grid = fit_grid(weight, settings)
    h = h + damping * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    out = torch.empty_like(w)
    for i in range(w.shape[1]):
        scale, zero = grid.scale.double(), grid.zero.double()
        out[:, i : i + 1] = scale * (
            (torch.round(w[:, i : i + 1] / scale) + zero).clamp(0, 2**settings.bits - 1) - zero
        )
        w[:, i:] -= ((w[:, i] - out[:, i]) / upper[i, i])[:, None] * upper[i, i:]
    return out.float()


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("clip", [True, False])
def test_nearest_level_of_the_grid(bits, symmetric, clip):
    weight, _, _ = _layer()
    settings = GridSettings(bits, symmetric, clip)
    quantized = round_to_nearest(weight, settings)
    levels = quantized.scale[:, :, None] * (torch.arange(2**bits) - quantized.zero[:, :, None])
    nearest = (weight[:, :, None] - levels).abs().amin(-1)
    torch.testing.assert_close((quantized.dequantize() - weight).abs(), nearest, rtol=0, atol=1e-5)
    assert bool((levels.abs().amin(-1) == 0).all()), "zero is a level"


def test_ranges_of_both_grids():
    weight = torch.tensor([[-3.0, 1.0, 7.0], [0.5, 1.0, 2.0], [0.0, 0.0, 0.0]])
    symmetric = fit_grid(weight, GridSettings(4, True, False))
    torch.testing.assert_close(symmetric.scale[:, 0], torch.tensor([1.0, 2 / 7, 1e-5 / 7]))
    asymmetric = fit_grid(weight, GridSettings(4, False, False))
    torch.testing.assert_close(asymmetric.scale[:, 0], torch.tensor([10 / 15, 2 / 15, 2 / 15]))
    assert asymmetric.zero[:2, 0].tolist() == [4.0, 0.0]  # 4.5 rounds to even
    assert bool((asymmetric.decode(asymmetric.encode(weight))[2] == 0).all())


def test_clip_search_never_loses_and_helps_with_an_outlier():
    weight = torch.cat([torch.randn(8, 63), torch.full((8, 1), 12.0)], dim=1)

    def error(clip):
        return (round_to_nearest(weight, GridSettings(3, True, clip)).dequantize() - weight).abs().pow(2.4).sum(1)

    assert bool((error(True) <= error(False)).all())
    assert bool((error(True) < 0.9 * error(False)).any())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_of_the_model_type_make_weights_exact_in_it(dtype):
    quantized = round_to_nearest(torch.randn(4, 32), GridSettings(3, dtype=dtype))
    assert torch.equal(quantized.scale, quantized.scale.to(dtype).float())


@pytest.mark.parametrize("bits", range(1, 9))
def test_packing_round_trip_and_size(bits):
    codes = torch.randint(0, 2**bits, (5, 37))
    packed = pack_codes(codes, bits)
    assert packed.shape == (5, 5 * bits)
    assert torch.equal(unpack_codes(packed, bits, 37).long(), codes)
    stream = [int(byte) >> b & 1 for byte in packed[2] for b in range(8)]
    assert [sum(stream[c * bits + b] << b for b in range(bits)) for c in range(37)] == codes[2].tolist()


def test_packing_refuses():
    with pytest.raises(ValueError, match=r"0\.\.3"):
        pack_codes(torch.tensor([[4]]), 2)
    with pytest.raises(ValueError, match="bytes a row"):
        unpack_codes(torch.zeros(1, 2, dtype=torch.uint8), 3, 8)


def test_weighted_hessian_is_the_brute_force_sum():
    _, x, w = _layer()
    weights = normalize_importance(w)
    expected = sum(
        2 / 3 * weights[i, t].double() * torch.outer(x[i, t].double(), x[i, t].double())
        for i in range(3)
        for t in range(x.shape[1])
    )
    torch.testing.assert_close(_hessian(x, weights).double(), expected, rtol=1e-4, atol=1e-4)


def test_equal_weights_are_plain_gptq_and_a_common_factor_changes_nothing():
    weight, x, w = _layer()
    plain, equal = _hessian(x), _hessian(x, normalize_importance(torch.full_like(w, 0.37)))
    assert torch.equal(plain, equal)
    for factor in (3.0, 0.011, 1e6):  # in float64: in float32 the product itself would be rounded
        same = normalize_importance(factor * w.double())
        assert torch.equal(same, normalize_importance(w.double()))
        assert torch.equal(_hessian(x, same), _hessian(x, normalize_importance(w)))
    settings = GridSettings(3)
    assert torch.equal(gptq(weight, plain, settings).quantized.codes, gptq(weight, equal, settings).quantized.codes)


def test_padding_has_no_weight_and_leaves_the_mean():
    mask = torch.tensor([[True, True, False], [False, True, True]])
    weights = normalize_importance(torch.tensor([[1.0, 3.0, float("nan")], [9.0, 2.0, 2.0]]), mask)
    torch.testing.assert_close(weights, torch.tensor([[0.5, 1.5, 0.0], [0.0, 1.0, 1.0]]))


@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_is_the_unblocked_form(symmetric):
    weight, x, _ = _layer()
    hessian, settings = _hessian(x), GridSettings(4, symmetric)
    plain = _plain_gptq(weight, hessian, settings)
    for block in (1, 7, 48, 128):
        blocked = gptq(weight, hessian, settings, block_size=block).quantized.dequantize()
        assert (blocked - plain).abs().gt(1e-4).float().mean() < 0.01, "a rounding tie may fall the other way"


@pytest.mark.parametrize("options", [{}, {"act_order": True}, {"act_order": True, "static_groups": True}])
@pytest.mark.parametrize("group_size", [None, 16])
def test_gptq_beats_rounding_where_it_is_judged(options, group_size):
    weight, x, w = _layer()
    hessian, settings = _hessian(x, normalize_importance(w)), GridSettings(3, group_size=group_size)
    result = gptq(weight, hessian, settings, **options)
    rounded = relative_error(weight, round_to_nearest(weight, settings).dequantize(), hessian)
    assert result.error == pytest.approx(relative_error(weight, result.quantized.dequantize(), hessian), rel=1e-4)
    assert result.error < 0.7 * rounded


def test_groups_are_refitted_on_weights_updated_by_earlier_blocks():
    weight, x, _ = _layer(columns=64)
    hessian = _hessian(x)
    settings = GridSettings(3, clip_search=False, group_size=32)
    whole, halves = (gptq(weight, hessian, settings, block_size=size).quantized for size in (64, 32))
    torch.testing.assert_close(whole.scale[:, 1], weight[:, 32:].abs().amax(1) / 3)  # no update inside a block
    assert not torch.equal(whole.scale[:, 1], halves.scale[:, 1])
    assert torch.equal(whole.scale[:, 0], halves.scale[:, 0])


def test_columns_without_input_become_zero():
    weight, x, _ = _layer()
    x[..., [3, 20]] = 0
    result = gptq(weight, _hessian(x), GridSettings(3)).quantized.dequantize()
    assert bool((result[:, [3, 20]] == 0).all())
    assert bool((result[:, 4] != 0).any())


def test_damping_is_added_until_a_factor_exists():
    g = torch.Generator().manual_seed(0)
    low = torch.randn(40, 3, generator=g)
    hessian = low @ low.T - 0.05 * torch.eye(40)  # not positive semi-definite
    before = hessian.clone()
    factor, tries = inverse_factor(hessian, 0.01)
    assert tries > 1
    assert torch.equal(hessian, before)
    damped = hessian + tries * 0.01 * hessian.diagonal().mean() * torch.eye(40)
    torch.testing.assert_close(factor.T @ factor @ damped, torch.eye(40), rtol=0, atol=2e-2)
    with pytest.raises(ValueError, match="more calibration text"):
        inverse_factor(-torch.eye(4), 0.01)


@pytest.mark.parametrize(
    ("importance", "message"),
    [
        ([[1.0, -0.1]], "negative"),
        ([[0.0, 0.0]], "only zeros in sequence 0"),
        ([[1.0, float("nan")]], "NaN"),
        ([[1.0, float("inf")]], "infinite"),
    ],
)
def test_bad_importance_is_refused(importance, message):
    with pytest.raises(ValueError, match=message):
        normalize_importance(torch.tensor(importance))


def test_bad_settings_are_refused():
    for bits in (1, 9, True):
        with pytest.raises(ValueError, match="2 to 8"):
            GridSettings(bits)
    weight, x, _ = _layer()
    with pytest.raises(ValueError, match="divide the 48 columns"):
        round_to_nearest(weight, GridSettings(3, group_size=20))
    with pytest.raises(ValueError, match="damping above 0"):
        gptq(weight, _hessian(x), GridSettings(3), damping=0.0)


def test_columns_without_input_shape_the_grid_of_whole_rows_only():
    weight, inputs = torch.randn(4, 32), torch.randn(50, 32)
    weight[:, 5], inputs[:, 5] = 40.0, 0
    hessian = WeightedHessian(32)
    hessian.add(inputs)
    plain = GridSettings(4, clip_search=False)
    widest = weight.abs().amax(1) / 7
    torch.testing.assert_close(gptq(weight, hessian.value, plain).quantized.scale[:, 0], widest)
    weight[:, 5] = 0
    for static in (True, False):
        groups = gptq(weight.index_fill(1, torch.tensor(5), 40.0), hessian.value, replace(plain, group_size=32),
                      static_groups=static)  # fmt: skip
        torch.testing.assert_close(groups.quantized.scale[:, 0], weight.abs().amax(1) / 7)
