"""Where on the image the cells of a feature map look."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple


class ReceptiveField(NamedTuple):
    """Geometry of a feature map, in pixels.

    Attributes:
        stride: distance between the centres of neighbouring cells.
        first_centre: 0-based coordinate of the first cell's centre; pixel centres are whole numbers.
        size: side of the square that one cell sees.
    """

    stride: float
    first_centre: float
    size: float


def receptive_field(layers: Iterable[tuple[int, int, int]]) -> ReceptiveField:
    """Geometry after a stack of convolutions and poolings ``(kernel, stride, padding)``, first to last.

    ``stride = prod s_i``, ``first_centre = sum_i ((k_i - 1)/2 - pad_i) prod_{j<i} s_j``,
    ``size = 1 + sum_i (k_i - 1) prod_{j<i} s_j``.

    Raises:
        ValueError: no layers, kernel or stride below 1, negative padding.
    """
    jump, centre, size, count = 1, 0.0, 1, 0
    for kernel, stride, padding in layers:
        if kernel < 1 or stride < 1 or padding < 0:
            raise ValueError(f"a layer is (kernel >= 1, stride >= 1, padding >= 0), got {(kernel, stride, padding)}")
        centre += ((kernel - 1) / 2 - padding) * jump
        size += (kernel - 1) * jump
        jump *= stride
        count += 1
    if not count:
        raise ValueError("at least one layer is needed")
    return ReceptiveField(jump, centre, size)


def patch_field(patch: int) -> ReceptiveField:
    """Geometry of a vision transformer's grid of square patches: stride ``patch``, first centre ``(patch - 1)/2``."""
    return receptive_field([(patch, patch, 0)])


def check_field(field: ReceptiveField) -> None:
    """``ValueError`` unless the stride is positive and both numbers finite."""
    if not (math.isfinite(field.stride) and field.stride > 0 and math.isfinite(field.first_centre)):
        raise ValueError(f"the stride must be positive and the first centre finite, got {field}")
