"""Halo attention pixel by pixel, and dense attention with two-dimensional relative positions."""

import torch
import torch.nn.functional as F


def by_pixel(q, kv, height_rel, width_rel, block, halo, *, keep=None, mask_padding=False, border="zeros",
             scale_positions=False, pixel_offsets=False):  # fmt: skip
    """Arguments and result as of :func:`cenote.ops.halo.halo_attention`."""
    batch, rows, columns, heads, dim = q.shape
    height, width = kv.shape[1:3]
    stride, window = height // rows, block + 2 * halo
    step = stride if pixel_offsets else 1
    items = []
    for b in range(batch):
        cells = []
        for row in range(rows):
            for column in range(columns):
                top, u = divmod(row, block // stride)
                left, v = divmod(column, block // stride)
                by_head = []
                for head in range(heads):
                    query = q[b, row, column, head]
                    logits, values = [], []
                    for t in range(window):
                        for s in range(window):
                            i, j = top * block - halo + t, left * block - halo + s
                            inside = 0 <= i < height and 0 <= j < width
                            if not inside and border == "reflect":
                                i, j = (mirrored(x, n) for x, n in ((i, height), (j, width)))
                                inside = True
                            if (not inside and mask_padding) or (inside and keep is not None and not keep[b, i, j]):
                                continue
                            cell = kv[b, i, j, head] if inside else torch.zeros_like(kv[0, 0, 0, 0])
                            position = query @ (
                                height_rel[window - 1 + t - step * u] + width_rel[window - 1 + s - step * v]
                            )
                            scale = dim**-0.5
                            logits.append(scale * (query @ cell[:dim]) + (scale if scale_positions else 1.0) * position)
                            values.append(cell[dim:])
                    if logits:
                        by_head.append(torch.stack(logits).softmax(0) @ torch.stack(values))
                    else:
                        by_head.append(torch.full_like(kv[0, 0, 0, 0, dim:], float("nan")))
                cells.append(torch.stack(by_head))
        items.append(torch.stack(cells).unflatten(0, (rows, columns)))
    return torch.stack(items)


def mirrored(place, length):
    return abs(place) if place < length else 2 * (length - 1) - place


def dense(q, kv, height_rel, width_rel):
    """Attention among all cells of a square map, offsets counted from ``side - 1``."""
    _, height, width, _, dim = q.shape
    key, value = kv[..., :dim], kv[..., dim:]
    query, key, value = (x.flatten(1, 2).transpose(1, 2) for x in (q, key, value))
    place = torch.arange(height)
    offset = place[None] - place[:, None] + height - 1
    positions = torch.einsum("buvhd,utd->bhuvt", q, height_rel[offset])[..., :, None]
    positions = positions + torch.einsum("buvhd,vsd->bhuvs", q, width_rel[offset])[..., None, :]
    bias = positions.flatten(2, 3).flatten(3, 4)
    mixed = F.scaled_dot_product_attention(query, key, value, bias)
    return mixed.transpose(1, 2).unflatten(1, (height, width))
