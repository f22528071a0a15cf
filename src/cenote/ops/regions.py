"""Boxes on an image to windows of its feature maps, and their spatial pyramids.

Boxes are ``x0, y0, x1, y1`` in pixels, 0-based and half-open as elsewhere in Python; the 1-based inclusive boxes of
SPP-net's code are converted once, by :func:`from_one_based`. All of the mapping is float64. Source: "Spatial
Pyramid Pooling in Deep Convolutional Networks for Visual Recognition" (arXiv 1406.4729).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from cenote.ops.pyramid import check_levels, pyramid_pool_windows
from cenote.ops.receptive_field import ReceptiveField, check_field

Boxes = Float[Tensor, "regions 4"]


def from_one_based(boxes: Shaped[Tensor, "regions 4"]) -> Boxes:
    """1-based inclusive ``left, top, right, bottom`` to 0-based half-open."""
    return boxes.double() - boxes.new_tensor([1, 1, 0, 0]).double()


def to_one_based(boxes: Shaped[Tensor, "regions 4"]) -> Boxes:
    """0-based half-open boxes to 1-based inclusive ``left, top, right, bottom``."""
    return boxes.double() + boxes.new_tensor([1, 1, 0, 0]).double()


def expected_scale(
    boxes: Boxes, image_size: tuple[int, int], stride: float, standard_size: float = 13
) -> Float[Tensor, "regions"]:
    """Shorter image side at which a box would fill the network's usual input.

    ``round(standard_size * stride * min(image_size) / sqrt(area))``, halves up: the box then covers about
    ``standard_size`` cells a side.
    """
    boxes = _check_boxes(boxes)
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    return (standard_size * stride * min(image_size) / area.sqrt() + 0.5).floor()


def nearest_scale(expected: Float[Tensor, "regions"], scales: Sequence[int]) -> Int[Tensor, "regions"]:
    """Number of the scale nearest to each expected one, the first of two equally near."""
    if not len(scales) or min(scales) < 1:
        raise ValueError(f"scales must be one or more positive numbers, got {list(scales)}")
    available = torch.tensor(list(scales), dtype=torch.float64, device=expected.device)
    return (expected.double().unsqueeze(1) - available).abs().argmin(dim=1)


def scale_boxes(boxes: Boxes, image_size: tuple[int, int], side: Shaped[Tensor, "regions"] | int) -> Boxes:
    """Boxes on the image resized so that its shorter side is ``side`` pixels.

    First and last pixel map to first and last pixel: a pixel coordinate ``v`` goes to
    ``v (side - 1) / (min(image_size) - 1)``.
    """
    shorter = min(image_size)
    if shorter < 2:
        raise ValueError(f"boxes can be scaled on images of at least 2 x 2 pixels, got {tuple(image_size)}")
    side = torch.as_tensor(side, dtype=torch.float64, device=boxes.device).reshape(-1, 1)
    # Multiply before dividing: whole coordinates that land on the border between two cells then do so exactly.
    last = boxes.new_tensor([0, 0, 1, 1]).double()
    return (boxes.double() - last) * (side - 1) / (shorter - 1) + last


def boxes_to_windows(
    boxes: Boxes, map_size: tuple[int, int], field: ReceptiveField, margin: float | None = None
) -> Int[Tensor, "regions 4"]:
    """The cells that a box on the network's input takes in, ``x0, y0, x1, y1``, 0-based and half-open.

    Each side of the box is moved inward by ``margin`` and goes to the cell with the nearest centre:
    ``first = floor((v - c + margin) / stride + 1/2)``, ``last = ceil((v - c - margin) / stride - 1/2)``, ``c`` the
    first cell's centre. Where ``first > last`` both become their mean, rounded down; then both are clamped to the
    map, so that every box has a cell.

    Args:
        boxes: on the image as the network saw it.
        map_size: height and width of the feature map in cells.
        field: geometry of the map.
        margin: pixels, usually 0 to ``stride / 2``. The default ``stride / 2`` takes the cells whose centres lie
            strictly inside the box.
    """
    check_field(field)
    margin = field.stride / 2 if margin is None else margin
    if not 0 <= margin < math.inf:
        raise ValueError(f"margin must be a number of pixels from 0, got {margin}")
    height, width = map_size
    if height < 1 or width < 1:
        raise ValueError(f"the feature map must have at least one cell, got {height} x {width}")
    boxes = _check_boxes(boxes)
    centred = boxes - field.first_centre
    first = ((centred[:, :2] + margin) / field.stride + 0.5).floor().long()
    last = ((centred[:, 2:] - 1 - margin) / field.stride - 0.5).ceil().long()
    crossed = first > last
    middle = (first + last).div(2, rounding_mode="floor")
    most = first.new_tensor([width - 1, height - 1])
    first = torch.where(crossed, middle, first).clamp(min=0).minimum(most)
    last = torch.where(crossed, middle, last).clamp(min=0).minimum(most)
    return torch.cat([first, last + 1], dim=1)


class Regions(NamedTuple):
    """What :func:`spp_regions` pooled and how it got there.

    Attributes:
        pooled: ``(regions, dim * sum n^2)``, laid out ``[level][channel][row][column]``.
        expected_scale: the scale each box asks for, in pixels of the shorter side.
        scale_index: number of the scale it was given.
        boxes: on the image resized to that scale, 0-based and half-open.
        windows: cells ``x0, y0, x1, y1`` of that scale's map, 0-based and half-open.
    """

    pooled: Float[Tensor, "regions features"]
    expected_scale: Float[Tensor, "regions"]
    scale_index: Int[Tensor, "regions"]
    boxes: Boxes
    windows: Int[Tensor, "regions 4"]


def spp_regions(
    maps: Sequence[Float[Tensor, "dim _ _"]] | Mapping[int, Float[Tensor, "dim _ _"]],
    boxes: Shaped[Tensor, "regions 4"],
    image_size: tuple[int, int],
    *,
    scales: Sequence[int],
    field: ReceptiveField,
    levels: Sequence[int] = (6, 3, 2, 1),
    margin: float | None = None,
    standard_size: float = 13,
    scale_index: Int[Tensor, "regions"] | None = None,
    clamp: bool = False,
    floor_at_zero: bool = False,
) -> Regions:
    """Pool many boxes of one image from feature maps that were computed once for each scale.

    Args:
        maps: for each scale the map ``(dim, height, width)`` of the image resized so that its shorter side is
            ``scales[i]``, or a mapping from scale numbers to those that are needed.
        boxes: on the original image, 0-based and half-open; see :func:`from_one_based`.
        image_size: height and width of the original image in pixels.
        scales: shorter sides in pixels (the paper: 480, 576, 688, 864, 1200).
        field: geometry of the maps.
        levels: grid sides of the pyramid.
        margin: see :func:`boxes_to_windows`.
        standard_size: cells a side that the network is used to.
        scale_index: scale of each box, in place of the nearest to the expected one;
            ``torch.randint(len(scales), (regions,))`` while training.
        clamp: move boxes that lie wholly outside the image to its border instead of refusing them.
        floor_at_zero: as the official kernel, which assumes non-negative maps.

    Raises:
        ValueError: a box that is empty, not finite or outside the image; no scales; a scale number without a map;
            stride not positive.
    """
    levels = check_levels(levels)
    boxes = _check_boxes(boxes.double())
    height, width = image_size
    outside = (boxes[:, 0] >= width) | (boxes[:, 1] >= height) | (boxes[:, 2] <= 0) | (boxes[:, 3] <= 0)
    if not clamp and bool(outside.any()):
        raise ValueError(
            f"box {boxes[outside][0].tolist()} lies outside the {height} x {width} image; clamp=True would allow it"
        )
    check_field(field)
    expected = expected_scale(boxes, image_size, field.stride, standard_size)
    nearest = nearest_scale(expected, scales)
    index = nearest if scale_index is None else scale_index
    if len(index) and not 0 <= int(index.min()) <= int(index.max()) < len(scales):
        raise ValueError(f"scale_index must lie in 0..{len(scales) - 1}, got {index.tolist()[:10]}")
    available = maps if isinstance(maps, Mapping) else dict(enumerate(maps))
    if not available:
        raise ValueError("at least one feature map is needed")
    scaled = scale_boxes(boxes, image_size, torch.tensor(list(scales), device=boxes.device)[index])
    windows = torch.zeros(len(boxes), 4, dtype=torch.long, device=boxes.device)
    some = next(iter(available.values()))
    parts = [some.new_zeros(0, some.shape[0] * sum(n * n for n in levels))]
    order = [index.new_zeros(0)]
    for i in sorted(set(index.tolist())):
        if i not in available:
            raise ValueError(
                f"boxes need scale {i} ({scales[i]} pixels), but there are maps only for {sorted(available)}"
            )
        feature_map = available[i]
        map_height, map_width = feature_map.shape[1:]
        rows = (index == i).nonzero().flatten()
        windows[rows] = boxes_to_windows(scaled[rows], (map_height, map_width), field, margin)
        on_map = windows[rows].to(feature_map.device)
        batch_index = torch.zeros_like(on_map[:, 0])
        parts.append(pyramid_pool_windows(feature_map.unsqueeze(0), on_map, batch_index, levels, floor_at_zero))
        order.append(rows)
    pooled = torch.cat(parts)[torch.cat(order).argsort().to(some.device)]
    return Regions(pooled, expected, index, scaled, windows)


def _check_boxes(boxes: Tensor) -> Tensor:
    """The boxes in float64; ``ValueError`` if one is empty or not finite."""
    boxes = boxes.double()
    good = boxes.isfinite().all(dim=1) & (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    if not bool(good.all()):
        raise ValueError(f"boxes must be finite with x1 > x0 and y1 > y0, got {boxes[~good][0].tolist()}")
    return boxes
