"""Which layers choose keys and which take over an earlier layer's choice: a dynamic program over overlaps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class LayerPolicy(NamedTuple):
    """A source for every layer.

    Attributes:
        sources: for each layer the layer whose choice it uses, itself where it chooses.
        changes: layers after the first that are their own source.
        max_changes: how many were allowed.
        minimum: the smallest overlap of a layer with its source.
        total: the sum of those overlaps (over all matrices).
    """

    sources: tuple[int, ...]
    changes: int
    max_changes: int
    minimum: float
    total: float


def allowed_changes(num_layers: int, num_full: int, sparsity: float, compute_ratio: float) -> int:
    """``ceil(layers * sparsity * compute_ratio) + full layers``: how often the source may change.

    Raises:
        ValueError: a sparsity outside (0, 1) or a compute_ratio outside (0, 1].
    """
    check_sparsity(sparsity)
    if not 0 < compute_ratio <= 1:
        raise ValueError(f"compute_ratio must lie in (0, 1], got {compute_ratio}")
    return math.ceil(num_layers * sparsity * compute_ratio) + num_full


def check_sparsity(sparsity: float) -> None:
    """Raise ``ValueError`` for a share of sparse layers outside (0, 1)."""
    if not 0 < sparsity < 1:
        raise ValueError(f"sparsity must lie in (0, 1), got {sparsity}")


def choose_full_layers(
    ratio: Float[Tensor, "series steps layers"], sparsity: float, forced: Iterable[int] = ()
) -> tuple[int, ...]:
    """The ``ceil(layers * (1 - sparsity))`` layers whose attention is the most spread out, in order.

    Each series over steps is clipped to its quartiles widened by 1.5 times their distance, then averaged over steps and
    series. Of equals the earlier layer comes first.

    Args:
        ratio: share of the chunks that holds most of the attention; a series is one head of one text.
        sparsity: share of the layers that need not be full.
        forced: layers that are full whatever they measure; they count.

    Raises:
        ValueError: no steps, or a sparsity outside (0, 1).
    """
    check_sparsity(sparsity)
    if not ratio.numel():
        raise ValueError("no calibration steps: nothing was measured")
    ratio = ratio.double()
    low, high = torch.quantile(ratio, ratio.new_tensor([0.25, 0.75]), dim=1, keepdim=True)
    reach = 1.5 * (high - low)
    mean = ratio.clamp(low - reach, high + reach).mean(dim=1).mean(dim=0)
    layers = mean.shape[0]
    first = list(dict.fromkeys(forced))
    order = first + [n for n in mean.argsort(descending=True, stable=True).tolist() if n not in first]
    return tuple(sorted(order[: max(len(first), math.ceil(layers * (1 - sparsity)))]))


def merge_overlap(
    overlap: Float[Tensor, "heads layers layers"], full: Sequence[int], how: str = "min"
) -> Float[Tensor, "layers layers"]:
    """One matrix of all key and value heads: their minimum (or mean), full layers overlapping with themselves only.

    Raises:
        ValueError: ``how`` other than ``"min"`` and ``"mean"``.
    """
    if how not in ("min", "mean"):
        raise ValueError(f"how must be 'min' or 'mean', got {how!r}")
    merged = overlap.clone()
    merged[:, list(full)] = 0.0
    merged[:, :, list(full)] = 0.0
    merged.diagonal(dim1=1, dim2=2).fill_(1.0)
    return merged.amin(dim=0) if how == "min" else merged.mean(dim=0)


def plan_sources(overlap: Float[Tensor, "sets layers layers"], max_changes: int) -> LayerPolicy:
    """Sources with the best pair (smallest overlap, sum of overlaps), compared in this order.

    From layer to layer the source stays or becomes the layer itself, which costs a change. With ``dp[j][i][c]`` the
    best pair up to layer ``j`` with source ``i`` after ``c`` changes, ``dp[j][i][c]`` extends ``dp[j-1][i][c]`` by
    ``overlap[i, j]`` and ``dp[j][j][c]`` the best of ``dp[j-1][k][c-1]`` by ``overlap[j, j]``; of equals the first one
    in ascending order is kept. The minimum is the best there is. The sum need not be: a path with a smaller minimum so
    far may end at the same minimum with a larger sum. With several matrices both are taken over all of them. Time is
    of order ``layers^2 * max_changes``.

    Args:
        overlap: ``[:, i, j]``, how much of layer ``j``'s choice layer ``i`` finds; one matrix a calibration set.
        max_changes: at least 0.

    Raises:
        ValueError: no matrix, no layers, or a negative number of changes.
    """
    if not overlap.numel():
        raise ValueError("no overlap matrix: calibration is empty")
    if max_changes < 0:
        raise ValueError(f"max_changes must be at least 0, got {max_changes}")
    smallest = overlap.double().amin(dim=0).tolist()
    sums = overlap.double().sum(dim=0).tolist()
    layers = len(sums)

    def extend(value: tuple[float, float], source: int, layer: int) -> tuple[float, float]:
        return min(value[0], smallest[source][layer]), value[1] + sums[source][layer]

    best = {(0, 0): (smallest[0][0], sums[0][0])}
    came: list[dict[tuple[int, int], tuple[int, int]]] = [{}]
    for layer in range(1, layers):
        following, before = {}, {}
        for (source, changes), value in sorted(best.items()):
            following[source, changes] = extend(value, source, layer)
            before[source, changes] = source, changes
            if changes < max_changes:
                changed = extend(value, layer, layer)
                if (layer, changes + 1) not in following or changed > following[layer, changes + 1]:
                    following[layer, changes + 1] = changed
                    before[layer, changes + 1] = source, changes
        best = following
        came.append(before)
    state = max(sorted(best), key=best.__getitem__)
    minimum, total = best[state]
    changes = state[1]
    sources = [0] * layers
    for layer in range(layers - 1, -1, -1):
        sources[layer] = state[0]
        state = came[layer].get(state, state)
    return LayerPolicy(tuple(sources), changes, max_changes, minimum, total)


def plan_sources_with_overlap(overlap: Float[Tensor, "sets layers layers"], max_changes: int) -> LayerPolicy:
    """As :func:`plan_sources`, with as many more changes as it takes for every layer to overlap with its source.

    A full layer between others takes two changes, and where they run out some layer would reuse a full one, which
    chooses nothing. ``policy.max_changes`` says how many were needed; ``layers - 1`` always do.
    """
    policy = plan_sources(overlap, max_changes)
    while policy.minimum <= 0 and policy.max_changes < overlap.shape[1] - 1:
        policy = plan_sources(overlap, policy.max_changes + 1)
    return policy
