"""The convolutional block attention module (CBAM) as a pooling."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cenote.ops.masked import masked_max, masked_mean, zero_padding
from cenote.ops.token_grid import from_map, locate, to_map
from cenote.pooling.base import Pooling
from cenote.pooling.blocks import MaskedBatchNorm, rename


class CBAM(Pooling):
    """Channel gate, spatial gate, residual, ReLU, mean.

    ``y = x * sigmoid(f(mean_n x) + f(max_n x))`` with ``f = W_2 relu(W_1 .)``;
    ``z = y * sigmoid(BN(conv([mean_c y; max_c y])))`` on the grid of tokens; ``out = mean_n relu(z_n + x_n)``.
    Source: CBAM (arXiv 1807.06521), in the form that "Attention, Please!" (arXiv 2506.10178) benchmarks. Parameters
    of the defaults: ``dim^2 / 8 + 100``.

    The tokens must fill a grid, see :func:`cenote.ops.token_grid.locate`: without ``grid`` the real tokens of each
    item form a square of their own (the official code knows only this, unmasked). Empty cells and everything beyond
    the grid are 0 to the convolution and absent from means, maxima and batch statistics, so padding does not matter.

    Args:
        dim: token width.
        grid: rows and columns of the token grid, ``None`` for squares.
        spatial_kernel_size: odd width of the convolution.
        rd_ratio: hidden width of the channel gate over ``dim``.

    Raises:
        ValueError: the tokens do not fill the grid or are no square number.
    """

    name = "cbam"
    needs_grid = True
    paper = "efficient-probing"
    permutation_invariant = False

    def __init__(
        self,
        dim: int,
        grid: tuple[int, int] | None = None,
        spatial_kernel_size: int = 7,
        rd_ratio: float = 1 / 16,
    ) -> None:
        if spatial_kernel_size < 1 or spatial_kernel_size % 2 == 0:
            raise ValueError(f"spatial_kernel_size must be odd, got {spatial_kernel_size}")
        super().__init__(dim)
        self.grid = grid
        hidden = max(1, int(dim * rd_ratio + 0.5))
        self.fc1, self.fc2 = nn.Linear(dim, hidden, bias=False), nn.Linear(hidden, dim, bias=False)
        self.conv = nn.Conv2d(2, 1, spatial_kernel_size, padding=spatial_kernel_size // 2, bias=False)
        self.batch_norm = MaskedBatchNorm(1)

    def _gate(self, channels: Tensor) -> Tensor:
        return self.fc2(self.fc1(channels).relu())

    def _pool(self, tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, None]:
        cells = locate(tokens.shape[1], mask, self.grid)
        tokens = zero_padding(tokens, mask)
        channel = self._gate(masked_mean(tokens, mask)) + self._gate(masked_max(tokens, mask))
        gated = tokens * channel.sigmoid()[:, None]
        summary = torch.stack([gated.mean(dim=2), gated.amax(dim=2)], dim=2)
        spatial = from_map(self.conv(to_map(summary, cells, mask)), cells)
        gated = gated * self.batch_norm(spatial, mask).sigmoid()
        return masked_mean((gated + tokens).relu(), mask), None

    @classmethod
    def from_reference(cls, state_dict: dict[str, Tensor], **config: Any) -> CBAM:
        """From official keys ``channel.fc1``, ``channel.fc2`` (1x1 convolutions), ``spatial.conv.conv`` and
        ``spatial.conv.bn``.
        """
        if "channels" in config:
            config["dim"] = config.pop("channels")
        state = {key: value.flatten(1) if key.startswith("channel.") else value for key, value in state_dict.items()}
        pool = cls(**{"dim": state["channel.fc1.weight"].shape[1], **config})
        names = {
            "channel.fc1": "fc1", "channel.fc2": "fc2", "spatial.conv.conv": "conv", "spatial.conv.bn": "batch_norm"
        }  # fmt: skip
        pool.load_state_dict(rename(state, names))
        return pool
