"""The convolutional networks of L-TDNN: hidden states ``(batch, layers, frames, dim)`` to the same with other channels.

Every convolution reads zeros where a frame is padding, because the normalisation in front of it puts them there.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cenote.ops.layer_frames import frame_batch_norm, same_convolution
from cenote.ops.masked import masked_mean


class FrameNorm(nn.Module):
    """Batch normalisation over layers and real frames; see :func:`cenote.ops.layer_frames.frame_batch_norm`."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))
        self.register_buffer("running_mean", torch.zeros(dim))
        self.register_buffer("running_var", torch.ones(dim))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return frame_batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, mask, self.training)


class Conv(nn.Module):
    """Convolution that keeps the size, ReLU, batch norm ("CRB")."""

    def __init__(self, dim: int, out_dim: int, kernel: tuple[int, int], dilation: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_dim, dim, *kernel))
        self.bias = nn.Parameter(torch.zeros(out_dim))
        self.norm = FrameNorm(out_dim)
        self.dilation = dilation
        nn.init.xavier_uniform_(self.weight)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return self.norm(same_convolution(x, self.weight, self.bias, self.dilation).relu_(), mask)


class SqueezeExcitation(nn.Module):
    """The factor of each channel, ``sigmoid(W2 relu(W1 mean(x)))``, from its mean over layers and real frames."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.squeeze, self.excite = pointwise(dim, hidden), pointwise(hidden, dim)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        mean = masked_mean(x.mean(dim=1), mask)
        return self.excite(self.squeeze(mean).relu()).sigmoid()[:, None, None]


class SERes2Block(nn.Module):
    """``x + SE(conv(res2(conv(x))))``: one group of channels after the other is convolved and added to the next."""

    def __init__(self, dim: int, dilation: int, scale: int, se_channels: int) -> None:
        super().__init__()
        self.width = dim // scale
        self.reduce, self.expand = Conv(dim, dim, (1, 1)), Conv(dim, dim, (1, 1))
        convs = max(scale - 1, 1)
        self.convs = nn.ModuleList(Conv(self.width, self.width, (3, 3), dilation) for _ in range(convs))
        self.se = SqueezeExcitation(dim, se_channels)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        groups = self.reduce(x, mask).split(self.width, dim=-1)
        state = groups[0]
        done = []
        for number, conv in enumerate(self.convs):
            state = conv(state if number == 0 else state + groups[number], mask)
            done.append(state)
        y = self.expand(torch.cat([*done, *groups[len(done) :]], dim=-1), mask)
        return torch.addcmul(x, y, self.se(y, mask))


class SED2Block(nn.Module):
    """Dense convolutions of doubling dilation that shed channels as they go: ``x = x + conv(x)``, of which the last
    ``dim / depth`` channels are done and leave; the result lists them as they left, times SE."""

    def __init__(self, dim: int, depth: int, se_channels: int) -> None:
        super().__init__()
        self.shed = dim // depth
        widths = [dim - step * self.shed for step in range(depth)]
        self.convs = nn.ModuleList(Conv(width, width, (3, 3), 2**step) for step, width in enumerate(widths))
        self.se = SqueezeExcitation(dim, se_channels)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        done = []
        for conv in self.convs:
            x = x + conv(x, mask)
            x, leaving = x.split([x.shape[-1] - self.shed, self.shed], dim=-1)
            done.append(leaving)
        y = torch.cat(done, dim=-1)
        return y * self.se(y, mask)


class LayerFrameNet(nn.Module):
    """Batch norm, an input convolution, blocks in sequence, and a pointwise map with ReLU of all their outputs.

    Args:
        dim: width of the hidden states.
        net: ``"ecapa"``: 5 x 3 input kernel, SE-Res2 blocks of dilation 2, 3, 4, ...; ``"d3net"``: 1 x 5 input kernel,
            SE-D2 blocks (kernels are layers x frames).
        conv_dim: channels of the blocks.
        num_blocks: number of blocks.
        depth: convolutions in an SE-D2 block; must divide ``conv_dim``.
        res2_scale: channel groups in an SE-Res2 block; must divide ``conv_dim``.
        se_channels: hidden width of squeeze-excitation.
    """

    def __init__(
        self,
        dim: int,
        net: Literal["ecapa", "d3net"],
        conv_dim: int,
        num_blocks: int,
        depth: int,
        res2_scale: int,
        se_channels: int,
    ) -> None:
        super().__init__()
        groups, word = (res2_scale, "res2_scale") if net == "ecapa" else (depth, "depth")
        if conv_dim % groups:
            raise ValueError(f"{word} must divide conv_dim, got {word}={groups} for conv_dim={conv_dim}")
        self.out_dim = conv_dim * num_blocks
        self.in_norm = FrameNorm(dim)
        self.in_conv = Conv(dim, conv_dim, (5, 3) if net == "ecapa" else (1, 5))
        self.blocks = nn.ModuleList(
            SERes2Block(conv_dim, number + 2, res2_scale, se_channels)
            if net == "ecapa"
            else SED2Block(conv_dim, depth, se_channels)
            for number in range(num_blocks)
        )
        self.fusion = pointwise(self.out_dim, self.out_dim)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """``(batch, layers, frames, dim)``, finite in padding too, to ``(batch, layers, frames, num_blocks *
        conv_dim)``, arbitrary in padding."""
        x = self.in_conv(self.in_norm(x, mask), mask)
        outputs = []
        for block in self.blocks:
            x = block(x, mask)
            outputs.append(x)
        return F.relu(self.fusion(torch.cat(outputs, dim=-1)), inplace=True)


def pointwise(dim: int, out_dim: int, bias: bool = True) -> nn.Linear:
    """A 1 x 1 convolution, started Xavier-uniform with zero bias."""
    layer = nn.Linear(dim, out_dim, bias=bias)
    nn.init.xavier_uniform_(layer.weight)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer
