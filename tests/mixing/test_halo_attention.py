"""Halo attention: both forms against the loop over pixels, what it equals, what it may see, what it refuses."""

import pytest
import torch
import torch.nn.functional as F
from jaxtyping import TypeCheckError
from timm.layers.halo_attn import HaloAttn

from cenote.mixing import MetaFormer, MixerContext, create_mixer
from cenote.mixing.halo_attention import HaloAttention
from cenote.mixing.halo_timm import replace_halo
from cenote.ops.halo import halo_attention, relative_rows
from cenote.ops.halo_rows import attend_blocks, attend_windows
from cenote.types import Grid
from reference.halo import by_pixel, dense


def draw(block, halo, height, width, stride=1, batch=2, heads=2, dim=3, values=4, dtype=torch.float64):
    """Queries, keys with values, and the two tables."""
    table = 2 * (block + 2 * halo) - 1
    shapes = ((batch, height // stride, width // stride, heads, dim), (batch, height, width, heads, dim + values),
              (table, dim), (table, dim))  # fmt: skip
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


CASES = {
    "plain": (4, 1, 8, 4, 1, {}),
    "no halo": (2, 0, 4, 6, 1, {}),
    "halo wider than the block": (2, 3, 4, 6, 1, {}),
    "block of odd side": (3, 1, 3, 6, 1, {}),
    "border masked": (4, 1, 4, 8, 1, {"mask_padding": True}),
    "cells missing": (4, 1, 8, 4, 1, {"keep": "some"}),
    "cells missing, border masked": (2, 1, 4, 6, 1, {"keep": "some", "mask_padding": True}),
    "mirrored": (2, 2, 4, 6, 1, {"border": "reflect"}),
    "mirrored, cells missing": (2, 1, 4, 4, 1, {"border": "reflect", "keep": "some"}),
    "strided": (4, 1, 8, 4, 2, {}),
    "strided by four, offsets in pixels": (4, 1, 8, 4, 4, {"pixel_offsets": True}),
    "strided, offsets in pixels, positions scaled": (
        4, 2, 4, 8, 2, {"pixel_offsets": True, "scale_positions": True},
    ),
}  # fmt: skip


def options_of(name):
    block, halo, height, width, stride, options = CASES[name]
    options = dict(options)
    if "keep" in options:
        options["keep"] = torch.rand(2, height, width) < 0.7
        options["keep"][:, ::stride, ::stride][:, 0] = True
    return block, halo, height, width, stride, options


@pytest.mark.parametrize("form", [attend_blocks, attend_windows])
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_a_loop_over_pixels(name, form):
    block, halo, height, width, stride, options = options_of(name)
    inputs = draw(block, halo, height, width, stride)
    mixed = halo_attention(*inputs, block=block, halo=halo, attend=form, **options)
    expected = by_pixel(*inputs, block, halo, **options)
    seen = ~expected.isnan()
    if "keep" in options:
        assert bool(seen[options["keep"]].all())
    torch.testing.assert_close(mixed[seen], expected[seen], rtol=1e-10, atol=1e-10)
    weight = torch.randn_like(expected).masked_fill(~seen, 0.0)
    got = torch.autograd.grad((mixed * weight).sum(), inputs)
    wanted = torch.autograd.grad((expected.nan_to_num(0.0) * weight).sum(), inputs)
    for actual, right in zip(got, wanted, strict=True):
        torch.testing.assert_close(actual, right, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("items", [1, 5])
def test_pieces_of_rows_are_put_back_where_they_were(items, monkeypatch):
    monkeypatch.setattr("cenote.ops.halo_rows._PIECE", 2 * 3 * 4 * 16 * items)
    inputs = draw(2, 1, 8, 6, batch=7, dtype=torch.float32)
    mixed = halo_attention(*inputs, block=2, halo=1)
    expected = halo_attention(*inputs, block=2, halo=1, attend=attend_windows)
    torch.testing.assert_close(mixed, expected, rtol=1e-5, atol=1e-5)
    weight = torch.randn_like(expected)
    grads = [torch.autograd.grad((out * weight).sum(), inputs) for out in (mixed, expected)]
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["plain", "cells missing, border masked", "strided by four, offsets in pixels"])
def test_gradients_of_first_and_second_order(name):
    block, halo, height, width, stride, options = options_of(name)
    if "keep" in options:
        options["keep"] = options["keep"][:1]
    inputs = draw(block, halo, height, width, stride, batch=1, heads=1, dim=2, values=1)

    def call(*tensors):
        return halo_attention(*tensors, block=block, halo=halo, **options)[..., ::2, :, :, :]

    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


def test_frozen_inputs_get_no_gradient():
    inputs = draw(2, 1, 4, 4)
    inputs[1] = inputs[1].detach()
    mixed = halo_attention(*inputs, block=2, halo=1)
    assert all(g is not None for g in torch.autograd.grad(mixed.sum(), [inputs[0], *inputs[2:]]))
    with torch.no_grad():
        assert torch.equal(halo_attention(*inputs, block=2, halo=1), mixed)


def test_without_a_halo_it_is_attention_in_separate_windows():
    inputs = draw(4, 0, 8, 12)
    mixed = halo_attention(*inputs, block=4, halo=0)
    for top in (0, 4):
        for left in (0, 4, 8):
            part = (slice(None), slice(top, top + 4), slice(left, left + 4))
            expected = dense(inputs[0][part], inputs[1][part], *inputs[2:])
            torch.testing.assert_close(mixed[part], expected)


def test_one_block_is_dense_attention():
    inputs = draw(8, 0, 8, 8)
    torch.testing.assert_close(halo_attention(*inputs, block=8, halo=0), dense(*inputs))


def test_a_constant_map_stays_constant_where_the_border_is_masked():
    layer = HaloAttention(6, num_heads=2, block_size=2, halo_size=1, mask_padding=True, qkv_bias=True).double()
    torch.nn.init.zeros_(layer.pos_embed.height_rel)
    torch.nn.init.zeros_(layer.pos_embed.width_rel)
    x = torch.randn(1, 6, 1, 1, dtype=torch.float64).expand(1, 6, 4, 8)
    value = F.conv2d(x, layer.kv.weight, layer.kv.bias).unflatten(1, (2, -1))[:, :, layer.dim_head :].flatten(1, 2)
    torch.testing.assert_close(layer(x), value)
    shrunk = HaloAttention(6, num_heads=2, block_size=2, halo_size=1, qkv_bias=True).double()
    shrunk.load_state_dict(layer.state_dict())
    assert (shrunk(x) - value)[..., 0, :].abs().max() > 0.01


def test_a_pixel_changes_the_blocks_whose_window_holds_it_and_no_others():
    block, halo = 4, 1
    layer = HaloAttention(8, num_heads=2, block_size=block, halo_size=halo).eval()
    x = torch.randn(1, 8, 12, 12)
    for row, column in ((5, 6), (4, 7), (3, 3), (0, 11)):
        changed = x.clone()
        changed[..., row, column] += 1.0
        moved = (layer(changed) - layer(x)).abs().amax(dim=(0, 1)) > 1e-6
        blocks = moved.unflatten(1, (3, 4)).unflatten(0, (3, 4)).any(dim=3).any(dim=1)

        def near(place):
            return torch.tensor([b * block - halo <= place < (b + 1) * block + halo for b in range(3)])

        assert torch.equal(blocks, near(row)[:, None] & near(column))


def test_shifts_by_a_block_shift_interior_blocks_and_others_do_not():
    layer = HaloAttention(8, num_heads=2, block_size=4, halo_size=2).eval()
    x = torch.randn(1, 8, 20, 20)
    for shift, holds in ((4, True), (3, False)):
        mixed, shifted = layer(x), layer(x.roll((shift, shift), dims=(2, 3)))
        inner = (mixed.roll((shift, shift), dims=(2, 3)) - shifted)[..., 8:16, 8:16]
        assert (inner.abs().max() < 1e-5) == holds


def test_a_query_counts_its_offset_in_its_own_rows_or_in_pixels():
    assert relative_rows(4, 1, 2).tolist()[1] == [4, 5, 6, 7, 8, 9]
    assert relative_rows(4, 1, 2, pixel_offsets=True).tolist()[1] == [3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize(
    "options",
    [
        {"num_heads": 4, "block_size": 4, "halo_size": 1},
        {"dim_out": 24, "num_heads": 3, "block_size": 2, "halo_size": 2, "qkv_bias": True},
        {"dim_out": 12, "num_heads": 3, "block_size": 4, "halo_size": 1},
        {"stride": 2, "num_heads": 2, "dim_head": 5, "block_size": 4, "halo_size": 0, "scale_pos_embed": True},
        {"stride": 2, "num_heads": 2, "block_size": 4, "halo_size": 1, "avg_down": True},
        {"stride": 2, "dim_out": 8, "num_heads": 2, "block_size": 5, "halo_size": 1, "qk_ratio": 0.33},
    ],
)
def test_takes_the_place_of_timms_layer(options):
    theirs = HaloAttn(16, **options).eval()
    ours = HaloAttention.from_reference(theirs.state_dict(), dim=16, **options)
    swapped = replace_halo(theirs)
    x = torch.randn(2, 16, 20, 20)
    expected = theirs(x)
    torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(swapped(x), expected, rtol=1e-4, atol=1e-5)
    assert list(swapped.state_dict()) == list(theirs.state_dict())
    assert {id(p) for p in swapped.parameters()} == {id(p) for p in theirs.parameters()}


@pytest.mark.parametrize("stride", [1, 2])
def test_a_padded_map_is_a_masked_one(stride):
    """Nobody sees the cells that are added, whatever the biases make of them."""
    settings = {"stride": stride, "num_heads": 2, "block_size": 4, "halo_size": 2, "qkv_bias": True}
    layer = HaloAttention(8, **settings, auto_pad=True, mask_padding=True).double()
    x = torch.randn(2, 8, 7, 10, dtype=torch.float64)
    keep = F.pad(torch.ones(2, 7, 10, dtype=torch.bool), (0, 2, 0, 1))
    garbage = F.pad(x, (0, 2, 0, 1), value=float("nan"))
    whole = layer.mix_map(garbage, keep=keep)
    rows, columns = -(-7 // stride), -(-10 // stride)
    mixed = layer(x)
    assert mixed.shape == (2, 8, rows, columns)
    torch.testing.assert_close(mixed, whole[..., :rows, :columns])


def test_averaging_rounds_sides_up_where_it_pads():
    layer = HaloAttention(8, stride=2, num_heads=2, block_size=5, halo_size=1, auto_pad=True)
    assert layer(torch.randn(1, 8, 7, 10)).shape == (1, 8, 4, 5)


def test_masked_tokens_are_missing_cells():
    mixer = create_mixer("halo_attention", dim=8, num_heads=2, block_size=2, halo_size=1).double()
    tokens, mask = torch.randn(2, 24, 8, dtype=torch.float64), torch.rand(2, 24) < 0.6
    mixed = mixer(tokens, mask, MixerContext(grid=Grid(4, 6)))
    x = tokens.transpose(1, 2).unflatten(2, (4, 6))
    q, kv = (F.conv2d(x, w.weight).unflatten(1, (2, -1)).permute(0, 3, 4, 1, 2) for w in (mixer.q, mixer.kv))
    expected = by_pixel(q, kv, *mixer.pos_embed.parameters(), 2, 1, keep=mask.unflatten(1, (4, 6)))
    torch.testing.assert_close(mixed[mask], expected.flatten(3).flatten(1, 2)[mask])
    assert bool((mixed[~mask] == 0).all())


def test_stacks_by_name():
    stack = MetaFormer(16, 2, "halo_attention(num_heads=2, block_size=2), softmax_attention(num_heads=2)")
    assert stack(torch.randn(1, 16, 16), None, MixerContext(grid=Grid(4, 4))).shape == (1, 16, 16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim_out": 10, "num_heads": 4}, "dim_out=10 is not divisible into num_heads=4"),
        ({"halo_size": -1}, "halo_size=-1"),
        ({"block_size": 0}, "block_size=0"),
        ({"stride": 3}, "stride 3 must divide block_size=8"),
        ({"border": "reflect", "mask_padding": True}, "mirrored border"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        HaloAttention(16, **options)


def test_bad_maps_are_refused():
    layer = HaloAttention(16, num_heads=2, block_size=4, halo_size=1)
    with pytest.raises(ValueError, match=r"30 x 32 is not divisible into blocks of 4 x 4.*auto_pad"):
        layer(torch.randn(1, 16, 30, 32))
    with pytest.raises(ValueError, match=r"maps \(batch, 16, height, width\), got \(1, 8, 4, 4\)"):
        layer(torch.randn(1, 8, 4, 4))
    with pytest.raises(ValueError, match="expects tokens"):
        layer(torch.randn(16, 4))
    mirror = HaloAttention(16, num_heads=2, block_size=4, halo_size=5, border="reflect")
    with pytest.raises(ValueError, match="4 x 8 cannot be mirrored 5 cells wide"):
        mirror(torch.randn(1, 16, 4, 8))
    with pytest.raises(ValueError, match="takes maps"):
        HaloAttention(16, stride=2, num_heads=2)(torch.randn(1, 64, 16), None, MixerContext(grid=Grid(8, 8)))
    with pytest.raises(ValueError, match="no keep with avg_down"):
        HaloAttention(16, stride=2, num_heads=2, avg_down=True).mix_map(
            torch.randn(1, 16, 8, 8), keep=torch.ones(1, 8, 8, dtype=torch.bool)
        )
    for wrong in (torch.ones(1, 4, 8, dtype=torch.bool), torch.ones(1, 8, 8)):
        with pytest.raises((ValueError, TypeCheckError)):
            layer.mix_map(torch.randn(1, 16, 8, 8), keep=wrong)
    with pytest.raises(ValueError, match="every s-th cell"):
        halo_attention(*draw(4, 1, 8, 8)[:1], *draw(4, 1, 12, 8)[1:], block=4, halo=1)


def test_tables_of_another_window_are_refused():
    state = HaloAttention(16, num_heads=2, block_size=4, halo_size=1).state_dict()
    with pytest.raises(ValueError, match=r"need tables \(15, 8\), but pos_embed.height_rel is \(11, 8\)"):
        HaloAttention.from_reference(state, dim=16, num_heads=2, block_size=4, halo_size=2)
    q, kv, _, table = draw(4, 1, 8, 8)
    with pytest.raises(ValueError, match="height_rel must be"):
        halo_attention(q, kv, table[1:], table[1:], block=4, halo=1)
