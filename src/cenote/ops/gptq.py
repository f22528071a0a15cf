"""GPTQ with a Hessian in which every token has its own weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cenote.ops.quantizer import Grid, GridSettings, QuantizedWeight, fit_grid

_TRIES = 50


def normalize_importance(
    importance: Float[Tensor, "batch tokens"],
    mask: Bool[Tensor, "batch tokens"] | None = None,
    *,
    dtype: torch.dtype = torch.float64,
) -> Float[Tensor, "batch tokens"]:
    """Weights of mean 1 over the real tokens of each sequence, 0 on padding; float32.

    The default computes in float64 and rounds once, so that equal weights give exactly 1 and a common factor changes
    nothing; ``torch.float32`` rounds as the official code does.

    Raises:
        ValueError: a mask or weights of another shape, a weight that is negative or no number, or none above 0.
    """
    if mask is not None and mask.shape != importance.shape:
        raise ValueError(f"expected importance of the mask's shape {tuple(mask.shape)}, got {tuple(importance.shape)}")
    real = importance if mask is None else importance.masked_fill(~mask, 0)
    if not bool(real.isfinite().all()) or bool((real < 0).any()):
        raise ValueError("importance must be finite and not negative, got NaN, infinite or negative weights")
    total = real.to(dtype).sum(1, keepdim=True)
    if not bool((total > 0).all()):
        row = int((total[:, 0] <= 0).nonzero()[0])
        raise ValueError(f"importance must be above 0 for a token of every sequence, got only zeros in sequence {row}")
    count = real.shape[1] if mask is None else mask.sum(1, keepdim=True)
    return (real.to(dtype) / total * count).float()


class WeightedHessian:
    """The running average ``H = (2 / n) sum_i sum_t w_t X_t^T X_t`` over ``n`` sequences.

    Args:
        columns: width of the inputs.

    Attributes:
        value: ``(columns, columns)``, float32.
        sequences: how many went in.
    """

    def __init__(self, columns: int, device: torch.device | None = None) -> None:
        self.value = torch.zeros(columns, columns, device=device)
        self.sequences = 0

    def add(self, inputs: Float[Tensor, "tokens columns"], weights: Float[Tensor, "tokens"] | None = None) -> None:
        """One sequence: its real tokens and their weights (of mean 1; ``None`` for all equal)."""
        self.value *= self.sequences / (self.sequences + 1)
        self.sequences += 1
        scaled = (2 / self.sequences) ** 0.5 * inputs.float()
        if weights is not None:
            scaled = scaled * weights.sqrt()[:, None]
        self.value += scaled.T @ scaled


def inverse_factor(
    hessian: Float[Tensor, "columns columns"], damping: float = 0.01
) -> tuple[Float[Tensor, "columns columns"], int]:
    """Upper Cholesky factor ``U`` of the inverse of ``H + k d I``, ``H^-1 = U^T U``, and the number ``k`` it took.

    ``d = damping * mean(diag H)``; ``k`` grows from 1 until the factors exist.

    Raises:
        ValueError: 50 tries were not enough.
    """
    step = damping * hessian.diagonal().mean()
    damped = hessian.clone()
    for tries in range(1, _TRIES + 1):
        damped.diagonal().add_(step)
        lower, wrong = torch.linalg.cholesky_ex(damped)
        if not bool(wrong):
            factor, wrong = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not bool(wrong) and bool(factor.isfinite().all()):
                return factor, tries
    raise ValueError(
        f"the Hessian has no Cholesky factor after adding {damping:g} of its mean diagonal {_TRIES} times: "
        "use more calibration text or a larger damping"
    )


@dataclass(frozen=True)
class GptqResult:
    """What GPTQ made of one weight matrix.

    Attributes:
        quantized: codes, scales and zero points.
        error: ``tr(E H E^T) / tr(W H W^T)`` with ``E`` the change of the weights and ``H`` before damping.
        damping_steps: how often the damping was added.
    """

    quantized: QuantizedWeight
    error: float
    damping_steps: int


def gptq(
    weight: Float[Tensor, "rows columns"],
    hessian: Float[Tensor, "columns columns"],
    settings: GridSettings,
    *,
    block_size: int = 128,
    damping: float = 0.01,
    act_order: bool = False,
    static_groups: bool = False,
) -> GptqResult:
    """Quantise column by column, each time moving the error to the columns that are still free.

    For column ``i``: ``q = grid(w_i)``, ``e = (w_i - q) / U_ii``, ``W[:, i:] -= e U[i, i:]`` inside a block of columns,
    and behind each block ``W[:, rest] -= Err U[block, rest]``, in float32 and in the official order of operations.
    Columns whose inputs were always 0 become 0. Groups get their grid when their first column comes up, from weights
    that hold the updates of earlier blocks but not those inside the current one; ``static_groups`` fits them before.

    Args:
        weight: in any floating type; computed in float32.
        hessian: before damping; not changed.
        settings: the grid.
        block_size: columns updated together.
        damping: share of the mean diagonal added to the diagonal.
        act_order: start with the columns of the largest diagonal.
        static_groups: with ``act_order``, keeps groups of neighbouring columns; without it the groups follow the order
            in which columns are taken.

    Raises:
        ValueError: sizes that do not fit, or a Hessian that damping does not make positive definite.
    """
    original, columns = weight.float(), weight.shape[1]
    settings.check_columns(columns)
    if hessian.shape != (columns, columns):
        raise ValueError(f"expected a Hessian of shape {(columns, columns)}, got {tuple(hessian.shape)}")
    if block_size < 1 or damping <= 0:
        raise ValueError(f"block_size must be at least 1 and damping above 0, got {block_size} and {damping}")
    size = settings.group_size or columns
    w, h = original.clone(), hessian.clone()
    # As in the official code, grids of whole rows are fitted before dead columns are emptied, those of groups after.
    grids: list[Grid] = [fit_grid(w, settings)] if settings.group_size is None else []
    dead = h.diagonal() == 0
    h.diagonal()[dead] = 1
    w[:, dead] = 0
    if static_groups and not grids:
        grids = [fit_grid(w[:, first : first + size], settings) for first in range(0, columns, size)]
    order = torch.argsort(h.diagonal(), descending=True) if act_order else torch.arange(columns, device=w.device)
    if act_order:
        w, h = w[:, order], h[order][:, order]
    group = (order if grids else torch.arange(columns, device=w.device)) // size
    factor, tries = inverse_factor(h, damping)
    codes, places = torch.empty_like(w), group.tolist()
    for first in range(0, columns, block_size):
        last = min(first + block_size, columns)
        # Transposed, so that a column is one stretch of memory.
        part, upper = w[:, first:last].T.contiguous(), factor[first:last, first:last]
        errors, scaled = torch.empty_like(part), torch.empty_like(part)
        pivots = upper.diagonal().tolist()
        for i in range(last - first):
            if len(grids) <= places[first + i]:
                grids.append(fit_grid(w[:, first + i : first + i + size], settings))
            grid = grids[places[first + i]]
            scale, zero = grid.scale[:, 0], grid.zero[:, 0]
            scaled[i] = (torch.round(part[i] / scale) + zero).clamp_(0, 2**grid.bits - 1)
            errors[i] = (part[i] - scale * (scaled[i] - zero)) / pivots[i]
            part[i:] -= upper[i, i:, None] * errors[i]
        codes[:, first:last] = scaled.T
        w[:, last:] -= errors.T.contiguous() @ factor[first:last, last:]
    if act_order:
        back = torch.argsort(order)
        codes, group = codes[:, back], group[back]
    scale, zero = (torch.cat([getattr(grid, name) for grid in grids], dim=1) for name in ("scale", "zero"))
    quantized = QuantizedWeight(codes.to(torch.uint8), scale, zero, group, settings.bits)
    return GptqResult(quantized, relative_error(original, quantized.dequantize(), hessian), tries)


def relative_error(
    weight: Float[Tensor, "rows columns"],
    changed: Float[Tensor, "rows columns"],
    hessian: Float[Tensor, "columns columns"],
) -> float:
    """``tr(E H E^T) / tr(W H W^T)`` with ``E = weight - changed``: the share of the output's energy that is wrong."""
    error = weight - changed
    whole = float(((weight @ hessian) * weight).sum())
    return float(((error @ hessian) * error).sum()) / whole if whole > 0 else 0.0
