"""The generalised Hilbert curve with corners and sides as vectors in space."""

import numpy as np


def curve_cells(shape, axis_order):
    """Cell numbers ``(z height + y) width + x`` in the order of the curve, for boxes whose leading side is above 1."""
    frames, height, width = shape
    sides = {"w": (width, 0, 0), "h": (0, height, 0), "t": (0, 0, frames)}
    cells = []

    def length(v):
        return int(abs(v).sum())

    def cut(v):
        first = v // 2
        if length(first) % 2 and length(v) > 2:
            first = first + np.sign(v)
        return first, v - first

    def walk(p, a, b, c):
        lengths = w, h, d = length(a), length(b), length(c)
        if 0 in lengths:
            return
        if sorted(lengths)[1] == 1:
            side = (a, b, c)[int(np.argmax(lengths))]
            cells.extend(p + i * np.sign(side) for i in range(length(side)))
            return
        (a2, a1), (b2, b1), (c2, c1) = cut(a), cut(b), cut(c)
        end_a, one_b, one_c = a - np.sign(a), np.sign(b), np.sign(c)
        if 2 * w > 3 * h and 2 * w > 3 * d:
            parts = [(p, a2, b, c), (p + a2, a1, b, c)]
        elif 3 * h > 4 * d:
            parts = [(p, b2, c, a2), (p + b2, a, b1, c), (p + end_a + b2 - one_b, -b2, c, -a1)]
        elif 3 * d > 4 * h:
            parts = [(p, c2, a2, b), (p + c2, a, b, c1), (p + end_a + c2 - one_c, -c2, -a1, b)]
        else:
            parts = [
                (p, b2, c2, a2),
                (p + b2, c, a2, b1),
                (p + b2 - one_b + c - one_c, a, -b2, -c1),
                (p + end_a + b2 + c - one_c, -c, -a1, b1),
                (p + end_a + b2 - one_b, -b2, c2, -a1),
            ]
        for part in parts:
            walk(*part)

    walk(np.zeros(3, int), *(np.array(sides[axis]) for axis in axis_order))
    return [int((z * height + y) * width + x) for x, y, z in cells]
