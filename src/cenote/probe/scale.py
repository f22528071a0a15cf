"""What a probe of many items takes: bytes to keep, time to move them, time to compute them. Arithmetic only."""

from __future__ import annotations

import math
from dataclasses import dataclass

from cenote.probe.extract import SHARD_BYTES

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
OFFSET_BYTES = 8
"""A store keeps the end of each item as one int64."""


def stored_bytes(tokens: int, dim: int, layers: int = 1, dtype: str = "float32", pooled_dim: int = 0) -> int:
    """Bytes of one item in a feature store: ``size (layers tokens dim + pooled_dim) + 8``.

    Args:
        tokens: real tokens that are kept; 1 where the backbone reduces them.
        dim: width of a token.
        layers: hidden states that are kept.
        dtype: stored type.
        pooled_dim: width of the encoder's own pooled output, where it has one.
    """
    if dtype not in DTYPE_BYTES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPE_BYTES)}, got {dtype!r}")
    return DTYPE_BYTES[dtype] * (layers * tokens * dim + pooled_dim) + OFFSET_BYTES


def transformer_macs(tokens: int, dim: int, depth: int, mlp_ratio: float = 4.0) -> int:
    """Multiply-accumulates of a transformer's blocks on one item, ``depth (tokens dim^2 (4 + 2 mlp_ratio) + 2 tokens^2
    dim)``: projections and MLP, scores and mixing."""
    return depth * (round(tokens * dim * dim * (4 + 2 * mlp_ratio)) + 2 * tokens * tokens * dim)


def vit_macs(
    image_size: int, patch_size: int, dim: int, depth: int, prefix: int = 1, channels: int = 3, mlp_ratio: float = 4.0
) -> int:
    """Multiply-accumulates of a vision transformer on one image: the patch projection and the blocks."""
    patches = (image_size // patch_size) ** 2
    return patches * dim * channels * patch_size**2 + transformer_macs(patches + prefix, dim, depth, mlp_ratio)


@dataclass(frozen=True)
class Footprint:
    """What a store and a readout on it take.

    Attributes:
        items: how many.
        item_bytes: stored of one item and view.
        bytes: stored of all, all views.
        shards: files of that store.
        backbone_seconds: the backbone's computation.
        write_seconds, read_seconds: moving the store once.
        extract_seconds: filling it: the slower of computing and writing, which go on together.
        epoch_seconds: one epoch of one readout: the slower of reading and computing.
        train_seconds: all epochs.
    """

    items: int
    item_bytes: int
    bytes: int
    shards: int
    backbone_seconds: float
    write_seconds: float
    read_seconds: float
    extract_seconds: float
    epoch_seconds: float
    train_seconds: float


def footprint(
    items: int,
    tokens: int,
    dim: int,
    layers: int = 1,
    dtype: str = "float32",
    *,
    views: int = 1,
    pooled_dim: int = 0,
    backbone_rate: float,
    readout_rate: float = math.inf,
    bandwidth: float = 3e9,
    machines: int = 1,
    epochs: int = 8,
) -> Footprint:
    """The cost of extracting a data set once and training one readout on it.

    Args:
        items, tokens, dim, layers, dtype, pooled_dim: what is stored, as in :func:`stored_bytes`.
        views: copies with other augmentations; a training epoch reads one of them.
        backbone_rate: items a second that one machine extracts, reading and transforming them included.
        readout_rate: items a second that one machine trains on, forward and backward, all learning rates and seeds.
        bandwidth: bytes a second that each machine reads or writes.
        machines: that share the extraction evenly (``engine="ray"``, a task a shard). Training is a readout a machine.
        epochs: passes over the training part.

    Raises:
        ValueError: counts or rates that are not positive, an unknown dtype.
    """
    positive = {
        "items": items, "tokens": tokens, "dim": dim, "layers": layers, "views": views, "backbone_rate": backbone_rate,
        "readout_rate": readout_rate, "bandwidth": bandwidth, "machines": machines, "epochs": epochs,
    }  # fmt: skip
    for name, value in positive.items():
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")
    item = stored_bytes(tokens, dim, layers, dtype, pooled_dim)
    total = items * views * item
    compute = items * views / backbone_rate / machines
    write = total / bandwidth / machines
    read = items * item / bandwidth
    epoch = max(read, items / readout_rate)
    shards = views * math.ceil(items * item / SHARD_BYTES)
    return Footprint(items, item, total, shards, compute, write, read, max(compute, write), epoch, epochs * epoch)


def amount(value: float, unit: str = "B") -> str:
    """A number with a decimal prefix: ``1_572_872`` to ``"1.6 MB"``."""
    for prefix in ("", "k", "M", "G", "T", "P"):
        if abs(value) < 999.5 or prefix == "P":
            break
        value /= 1000
    return f"{value:.{0 if value >= 99.5 or not prefix else 1}f} {prefix}{unit}"


def duration(seconds: float) -> str:
    """Seconds in the unit a person would use: ``5400`` to ``"1.5 h"``."""
    units = ((99.5, 1, "s"), (5970, 60, "min"), (172_800, 3600, "h"), (math.inf, 86_400, "days"))
    size, unit = next((size, unit) for limit, size, unit in units if seconds < limit)
    value = seconds / size
    return f"{value:.{0 if value >= 9.95 else 1 if value >= 0.095 else 2}f} {unit}"
