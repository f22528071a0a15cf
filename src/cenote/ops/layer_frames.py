"""Convolution, normalisation and gated maximum over a stack of hidden states, ``(batch, layers, frames, dim)``.

Layers and frames are the two axes of an image whose pixels have ``dim`` channels. Channels stay innermost, so that
convolutions get the channels-last layout, pointwise maps are matrix products, and nothing is copied in between.
``mask`` ``(batch, frames)`` is ``True`` for a real frame, ``None`` if all are. Padding must be finite: set it to 0
where it may not be.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from cenote.ops.masked import track_statistics, widen


def same_convolution(
    x: Float[Tensor, "batch layers frames dim"],
    weight: Float[Tensor, "out dim height width"],
    bias: Float[Tensor, "out"],
    dilation: int = 1,
) -> Float[Tensor, "batch layers frames out"]:
    """2-D convolution with a kernel of odd sides (layers, frames) and zeros around, so that the size stays."""
    padding = [dilation * (side // 2) for side in weight.shape[2:]]
    return F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=padding, dilation=dilation).permute(0, 2, 3, 1)


def frame_batch_norm(
    x: Float[Tensor, "batch *layers frames dim"],
    running_mean: Float[Tensor, "dim"],
    running_var: Float[Tensor, "dim"],
    weight: Float[Tensor, "dim"],
    bias: Float[Tensor, "dim"],
    mask: Bool[Tensor, "batch frames"] | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Float[Tensor, "batch *layers frames dim"]:
    """Batch normalisation of channels with statistics over the real frames of all layers; padding comes out as 0.

    In training, mean and biased variance are those of the batch and the running statistics move towards mean and
    unbiased variance by ``momentum``, in place; otherwise the running statistics are used. As
    ``torch.nn.functional.batch_norm`` of the real frames laid end to end.
    """
    if mask is None:
        # Four axes with channels innermost are a layout that the kernel reads as it is.
        image = (x if x.ndim == 4 else x.unsqueeze(1)).to(weight.dtype)
        statistics = running_mean, running_var
        out = F.batch_norm(image.permute(0, 3, 1, 2), *statistics, weight, bias, training, momentum, eps)
        return out.permute(0, 2, 3, 1).reshape(x.shape).to(x.dtype)
    wide = widen(x)
    real = mask.reshape(mask.shape[0], *(1,) * (x.ndim - 3), mask.shape[1], 1).to(wide.dtype)
    if not training:
        # Scale, shift and masking in one pass over x.
        scale = weight * (running_var + eps).rsqrt()
        return torch.addcmul((bias - running_mean * scale) * real, x, scale * real).to(x.dtype)
    axes = tuple(range(x.ndim - 1))
    count = real.sum() * math.prod(x.shape[1:-2])
    wide = wide * real
    mean = wide.sum(axes) / count
    centred = torch.addcmul(wide, mean, real, value=-1)
    variance = centred.square().sum(axes) / count
    track_statistics(running_mean, running_var, mean, variance, count, momentum)
    return torch.addcmul(bias * real, centred, weight * (variance + eps).rsqrt()).to(x.dtype)


def layer_gate(
    x: Float[Tensor, "batch layers frames heads width"],
    w1: Float[Tensor, "heads layers hidden"],
    b1: Float[Tensor, "heads hidden"],
    w2: Float[Tensor, "heads hidden layers"],
    b2: Float[Tensor, "heads layers"],
) -> Float[Tensor, "batch heads layers frames"]:
    """How much each head takes of each layer at each frame, between 0 and 1.

    ``sigmoid(f(mean_k x) + f(max_k x))``, with mean and maximum over the head's channels and one two-layer map
    ``f(v) = w2 relu(w1 v + b1) + b2`` from layers to layers for both.
    """
    summary = torch.stack([x.mean(dim=-1), x.amax(dim=-1)])
    hidden = F.relu(torch.einsum("sblth,hlm->sbthm", summary, w1) + b1)
    # The second map is linear, so it is applied once to the sum.
    return torch.einsum("bthm,hml->bhlt", hidden.sum(dim=0), w2).add(2 * b2[..., None]).sigmoid()


def gated_layer_max(
    x: Float[Tensor, "batch layers frames heads width"], gate: Float[Tensor, "batch heads layers frames"]
) -> Float[Tensor, "batch frames heads width"]:
    """``max_l gate_l x_l`` of each channel: small gates shrink negative values, so that these win over strongly
    negative ones."""
    return (x * gate.permute(0, 2, 3, 1).unsqueeze(-1)).amax(dim=1)
