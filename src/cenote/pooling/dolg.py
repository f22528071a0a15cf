"""The spatial attention of DOLG and DELF as a pooling."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, softplus

from cenote.ops.masked import masked_mean, widen, zero_padding
from cenote.ops.token_grid import Cells, from_map, locate, to_map
from cenote.pooling.base import Pooling
from cenote.pooling.blocks import MaskedBatchNorm, rename


class AtrousPyramid(nn.Module):
    """Context of several sizes for each cell: a 1x1 and three dilated 3x3 convolutions and the mean of the map, mixed.

    ``relu(W [relu(W_0 mean); conv_1; conv_6; conv_12; conv_18])``, each branch ``width`` channels, on the grid of the
    tokens.
    """

    def __init__(self, dim: int, width: int = 512) -> None:
        super().__init__()
        self.branches = nn.ModuleList([nn.Conv2d(dim, width, 1)])
        self.branches.extend(nn.Conv2d(dim, width, 3, padding=rate, dilation=rate) for rate in (6, 12, 18))
        self.image = nn.Linear(dim, width)
        self.mix = nn.Linear(5 * width, dim)
        _initialise(self)

    def forward(self, tokens: Tensor, cells: Cells, mask: Tensor | None) -> Tensor:
        image = self.image(masked_mean(tokens, mask)).relu()[:, None].expand(-1, tokens.shape[1], -1)
        grid = to_map(tokens, cells, mask)
        return self.mix(torch.cat([image, *(from_map(branch(grid), cells) for branch in self.branches)], dim=2)).relu()


class DOLG(Pooling):
    """Mean of normalised local features, each weighted by how much it should count.

    ``f_n = BN(W_1 x_n + b_1)``, ``a_n = softplus(w_2^T act(f_n) + b_2)``, ``out = mean_n a_n f_n / |f_n|``. Source:
    DOLG (arXiv 2108.02927), after DELF, in the form that "Attention, Please!" (arXiv 2506.10178) benchmarks.
    Parameters of the defaults: ``dim^2 + 4 dim + 1``. The weights returned are the ``a_n``: positive, 0 on padding,
    and not normalised over tokens.

    As for CBAM the tokens must fill a grid or, without ``grid``, each item's real tokens a square
    (:func:`cenote.ops.token_grid.locate`); where they lie matters only ``with_aspp``. Padding stays out of batch
    statistics and mean.

    Args:
        dim: token width.
        grid: rows and columns of the token grid, ``None`` for squares.
        hidden_dim: width of the local features and of the output, ``dim`` unless given.
        act_fn: ``"relu"`` or ``"leakyrelu"`` (slope 0.01).
        with_aspp: put an atrous spatial pyramid in front.

    Raises:
        ValueError: the tokens do not fill the grid or are no square number.
    """

    name = "dolg"
    needs_grid = True
    paper = "efficient-probing"
    attends = True

    def __init__(
        self,
        dim: int,
        grid: tuple[int, int] | None = None,
        hidden_dim: int | None = None,
        act_fn: str = "relu",
        with_aspp: bool = False,
    ) -> None:
        if act_fn not in ("relu", "leakyrelu"):
            raise ValueError(f"act_fn must be 'relu' or 'leakyrelu', got {act_fn!r}")
        hidden_dim = dim if hidden_dim is None else hidden_dim
        super().__init__(dim, hidden_dim)
        self.grid = grid
        self.slope = 0.0 if act_fn == "relu" else 0.01
        self.local, self.score = nn.Linear(dim, hidden_dim), nn.Linear(hidden_dim, 1)
        self.batch_norm = MaskedBatchNorm(hidden_dim)
        _initialise(self)
        self.pyramid = AtrousPyramid(dim) if with_aspp else None
        if with_aspp:
            self.permutation_invariant = False  # type: ignore[misc]

    def _pool(self, tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        cells = locate(tokens.shape[1], mask, self.grid)
        tokens = zero_padding(tokens, mask)
        if self.pyramid is not None:
            tokens = self.pyramid(tokens, cells, mask)
        local = self.batch_norm(self.local(tokens), mask)
        weights = softplus(self.score(nn.functional.leaky_relu(local, self.slope)))
        out = masked_mean(weights * normalize(widen(local), dim=2), mask)
        return out.to(local.dtype), zero_padding(weights, mask).transpose(1, 2)

    @classmethod
    def from_reference(cls, state_dict: dict[str, Tensor], **config: Any) -> DOLG:
        """From official keys ``conv1``, ``bn``, ``conv2`` and, ``with_aspp``, ``aspp``.

        ``ValueError`` when ``s3_dim`` is not the token width: the official code then mixes channels with positions.
        """
        config = {{"in_c": "dim", "s3_dim": "hidden_dim"}.get(key, key): value for key, value in config.items()}
        if config.get("act_fn", "").lower().startswith("leaky"):
            config["act_fn"] = "leakyrelu"
        pool = cls(**{"dim": state_dict["conv1.weight"].shape[1], **config})
        if pool.out_dim != pool.dim:
            raise ValueError(f"the official layer needs s3_dim equal to in_c={pool.dim}, got {pool.out_dim}")
        names = {
            "conv1": "local", "conv2": "score", "bn": "batch_norm", "aspp.aspp": "pyramid.branches",
            "aspp.im_pool.1": "pyramid.image", "aspp.conv_after.0": "pyramid.mix",
        }  # fmt: skip
        state = rename(state_dict, names)
        pool.load_state_dict({key: value.reshape(pool.state_dict()[key].shape) for key, value in state.items()})
        return pool


def _initialise(module: nn.Module) -> None:
    """He's normal initialisation over the fan-out, as for residual networks."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
