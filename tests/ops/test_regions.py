"""Boxes to windows against the rule written out in the official 1-based convention, and regions against crops."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import adaptive_max_pool2d

from cenote.ops.pyramid import spatial_pyramid_pool
from cenote.ops.receptive_field import ReceptiveField, patch_field, receptive_field
from cenote.ops.regions import (
    boxes_to_windows,
    expected_scale,
    from_one_based,
    nearest_scale,
    scale_boxes,
    spp_regions,
    to_one_based,
)

ZF5 = [(7, 2, 1), (3, 2, 0), (5, 2, 0), (3, 2, 0), (3, 1, 1), (3, 1, 1), (3, 1, 1)]


def one_based_window(box, side, shorter, map_size, offset0, offset, stride):
    """The rule box by box in Python floats: 1-based inclusive box in, 0-based half-open cells out."""
    left, top, right, bottom = ((v - 1) * (side - 1) / (shorter - 1) + 1 for v in box)
    cells = []
    for low, high, length in ((left, right, map_size[1]), (top, bottom, map_size[0])):
        first = math.floor((low - offset0 + offset) / stride + 0.5) + 1
        last = math.ceil((high - offset0 - offset) / stride - 0.5) + 1
        if first > last:
            first = last = math.trunc((first + last) / 2)
        cells.append((min(max(first, 1), length) - 1, min(max(last, 1), length)))
    (x0, x1), (y0, y1) = cells
    return [x0, y0, x1, y1]


boxes_in = st.lists(
    st.tuples(st.integers(1, 500), st.integers(1, 375), st.integers(1, 500), st.integers(1, 375)).map(
        lambda b: (min(b[0], b[2]), min(b[1], b[3]), max(b[0], b[2]), max(b[1], b[3]))
    ),
    min_size=1,
    max_size=20,
)


@settings(deadline=None, max_examples=60)
@given(
    boxes=boxes_in,
    side=st.sampled_from([375, 480, 749, 864, 1200]),
    geometry=st.sampled_from([(21.0, 6.5, 16.0), (15.0, 5.0, 12.0), (1.0, 8.0, 16.0), (8.5, 0.0, 16.0)]),
)
def test_mapping_is_the_official_rule(boxes, side, geometry):
    offset0, offset, stride = geometry
    half_open = from_one_based(torch.tensor(boxes))
    scaled = scale_boxes(half_open, (375, 500), side)
    map_size = (int(side / stride), int(side * 500 / 375 / stride))
    windows = boxes_to_windows(scaled, map_size, ReceptiveField(stride, offset0 - 1, 0), offset)
    assert windows.tolist() == [one_based_window(b, side, 375, map_size, offset0, offset, stride) for b in boxes]


def test_conventions_convert_there_and_back():
    official = torch.tensor([[1.0, 1.0, 1.0, 1.0], [3.0, 4.0, 10.0, 9.0]])
    assert from_one_based(official).tolist() == [[0, 0, 1, 1], [2, 3, 10, 9]]
    assert torch.equal(to_one_based(from_one_based(official)), official.double())


def test_scale_of_a_box():
    boxes = torch.tensor([[0.0, 0.0, 208.0, 208.0], [0.0, 0.0, 96.0, 96.0]], dtype=torch.float64)
    # A box of 13 cells of 16 pixels asks for the image as it is; 812.5 rounds up.
    assert expected_scale(boxes, (375, 500), 16).tolist() == [375, 813]
    assert nearest_scale(torch.tensor([375.0, 528.0, 9999.0]), [480, 576, 688]).tolist() == [0, 0, 2]
    with pytest.raises(ValueError, match="scales must be"):
        nearest_scale(torch.tensor([1.0]), [])


def test_receptive_field_of_the_paper_networks():
    assert receptive_field(ZF5)[:2] == (16, 20.0)  # 21 in 1-based coordinates
    assert patch_field(14) == (14, 6.5, 14)


@pytest.mark.parametrize("layers", [ZF5, [(3, 2, 1), (4, 3, 1), (3, 1, 0)], [(16, 16, 0)]])
def test_receptive_field_is_where_the_gradient_arrives(layers):
    stride, centre, size = receptive_field(layers)
    net = nn.Sequential(*(nn.AvgPool2d(k, s, p) for k, s, p in layers))
    image = torch.zeros(1, 1, 400, 400, requires_grad=True)
    cells = net(image)
    cell = cells.shape[-1] // 2
    (grad,) = torch.autograd.grad(cells[0, 0, cell, cell], image)
    seen = grad[0, 0].sum(0).nonzero().flatten()
    assert len(seen) == size
    assert (seen[0] + seen[-1]).item() / 2 == centre + cell * stride


def test_bad_geometry_is_refused():
    for layers in ([], [(0, 1, 0)], [(3, 0, 1)], [(3, 1, -1)]):
        with pytest.raises(ValueError):
            receptive_field(layers)
    box = torch.tensor([[0.0, 0.0, 9.0, 9.0]])
    with pytest.raises(ValueError, match="stride must be positive"):
        boxes_to_windows(box, (3, 3), ReceptiveField(0, 0, 1))
    with pytest.raises(ValueError, match="margin must be"):
        boxes_to_windows(box, (3, 3), ReceptiveField(4, 0, 1), margin=-1)


def test_the_whole_image_is_the_whole_map():
    maps = torch.randn(5, 14, 16)
    result = spp_regions([maps], torch.tensor([[0, 0, 256, 224]]), (224, 256), scales=[224], field=patch_field(16))
    assert result.windows.tolist() == [[0, 0, 16, 14]]
    assert torch.equal(result.pooled, spatial_pyramid_pool(maps.unsqueeze(0), (6, 3, 2, 1)))


def some_regions():
    generator = torch.Generator().manual_seed(3)
    corners = torch.rand(40, 2, 2, generator=generator).sort(dim=1).values * torch.tensor([500.0, 375.0])
    boxes = corners.flatten(1) + torch.tensor([0.0, 0.0, 1.0, 1.0])
    scales = [480, 688, 1200]
    maps = [torch.randn(3, s // 16, s * 500 // 375 // 16, generator=generator) for s in scales]
    return maps, boxes, (375, 500), {"scales": scales, "field": receptive_field(ZF5), "margin": 6.5}


def test_regions_equal_crops_of_their_maps():
    maps, boxes, image_size, options = some_regions()
    result = spp_regions(maps, boxes, image_size, **options)
    assert set(result.scale_index.tolist()) == {0, 1, 2}
    for r, (x0, y0, x1, y1) in enumerate(result.windows.tolist()):
        crop = maps[result.scale_index[r]][:, y0:y1, x0:x1]
        assert torch.equal(result.pooled[r], torch.cat([adaptive_max_pool2d(crop, n).flatten() for n in (6, 3, 2, 1)]))
    order = torch.randperm(len(boxes))
    again = spp_regions(maps, boxes[order], image_size, **options)
    assert torch.equal(again.pooled, result.pooled[order])
    floored = spp_regions(maps, boxes, image_size, floor_at_zero=True, **options)
    assert torch.equal(floored.pooled, result.pooled.clamp(min=0))


def test_a_given_scale_takes_the_place_of_the_nearest():
    maps, boxes, image_size, options = some_regions()
    index = torch.full((len(boxes),), 1)
    result = spp_regions({1: maps[1]}, boxes, image_size, scale_index=index, **options)
    assert torch.equal(result.scale_index, index)
    with pytest.raises(ValueError, match=r"maps only for \[1\]"):
        spp_regions({1: maps[1]}, boxes, image_size, **options)
    with pytest.raises(ValueError, match="scale_index must lie in 0"):
        spp_regions(maps, boxes, image_size, scale_index=index + 2, **options)


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ([10.0, 10.0, 5.0, 20.0], "x1 > x0"),
        ([10.0, float("nan"), 15.0, 20.0], "finite"),
        ([600.0, 10.0, 700.0, 20.0], "outside the 375 x 500 image"),
    ],
)
def test_bad_boxes_are_refused(box, message):
    maps, _, image_size, options = some_regions()
    with pytest.raises(ValueError, match=message):
        spp_regions(maps, torch.tensor([box]), image_size, **options)


def test_a_box_outside_can_be_clamped():
    maps, _, image_size, options = some_regions()
    result = spp_regions(maps, torch.tensor([[600.0, 10.0, 700.0, 20.0]]), image_size, clamp=True, **options)
    width = maps[result.scale_index[0]].shape[2]
    assert result.windows[0, [0, 2]].tolist() == [width - 1, width]
