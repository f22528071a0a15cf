"""Frames of a clip: a mask from lengths, and the dropping of spans."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor


def length_mask(lengths: Int[Tensor, "batch"], frames: int) -> Bool[Tensor, "batch {frames}"]:
    """``True`` for the first ``lengths[b]`` frames of row b.

    Raises:
        ValueError: a length below 1 or above ``frames``. Lengths in samples where frames are meant end here.
    """
    if not torch.compiler.is_compiling() and not bool(((lengths >= 1) & (lengths <= frames)).all()):
        raise ValueError(f"lengths must lie in 1..{frames} (frames, not samples), got {lengths.tolist()[:10]}")
    return torch.arange(frames, device=lengths.device) < lengths[:, None]


def kept_frames(mask: Bool[Tensor, "batch frames"], drop: float) -> Bool[Tensor, "batch frames"]:
    """The real frames less a share ``drop`` of them chosen by chance; a row that would lose all keeps all."""
    kept = mask & (F.dropout(torch.ones_like(mask, dtype=torch.float32), drop) > 0)
    return torch.where(kept.any(dim=1, keepdim=True), kept, mask)


def span_out(
    hidden: Float[Tensor, "batch layers frames dim"],
    mask: Bool[Tensor, "batch frames"] | None = None,
    *,
    probability: float = 0.3,
    start: float = 0.05,
    length: int = 3,
    generator: torch.Generator | None = None,
) -> tuple[Float[Tensor, "batch layers frames dim"], Bool[Tensor, "batch frames"]]:
    """Training augmentation: drop spans of frames and close the gaps ("SpanOut" of L-TDNN, off there by default).

    With ``probability`` an item is changed: every frame starts a span with chance ``start``, and the ``length``
    frames from there on are dropped (about 14 % of all at the defaults). What is left moves to the front in its old
    order and the rest becomes padding, so the result needs its mask. An item that would lose everything is kept whole.

    Args:
        hidden: hidden states.
        mask: real frames.
        probability: chance that an item is changed at all; 0 changes none.
        start: chance that a span starts at a frame.
        length: frames in a span.
        generator: source of randomness, on the device of ``hidden``.

    Raises:
        ValueError: a probability outside [0, 1], or a span shorter than one frame.
    """
    if not (0 <= probability <= 1 and 0 <= start <= 1 and length >= 1):
        raise ValueError(
            f"expected chances in [0, 1] and a span of at least 1 frame, got probability={probability}, "
            f"start={start}, length={length}"
        )
    batch, _, frames, _ = hidden.shape
    real = torch.ones(batch, frames, dtype=torch.bool, device=hidden.device) if mask is None else mask
    draw = torch.rand(batch, frames + 1, generator=generator, device=hidden.device)
    starts = (draw[:, 1:] < start) & (draw[:, :1] < probability)
    dropped = F.max_pool1d(F.pad(starts[:, None].float(), (length - 1, 0)), length, stride=1)[:, 0] > 0
    kept = real & ~dropped
    kept = torch.where(kept.any(dim=1, keepdim=True), kept, real)
    order = (~kept).to(torch.uint8).argsort(dim=1, stable=True)
    return hidden.take_along_dim(order[:, None, :, None], dim=2), kept.gather(1, order)
