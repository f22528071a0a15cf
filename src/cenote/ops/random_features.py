"""Random features of a query and a set of keys: of one attention layer, of a two-layer network, and their limit."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from cenote.ops.masked import masked_softmax, require_real_tokens, zero_padding

Activation = str | Callable[[Tensor], Tensor]
"""``"relu"``, ``"softmax"`` over the keys, or a function of the scores."""


def augment(x: Float[Tensor, "*axes dim"]) -> Float[Tensor, "*axes dim+1"]:
    """A constant 1 behind the last coordinate."""
    return F.pad(x, (0, 1), value=1.0)


def attention_scores(
    query: Float[Tensor, "items dim"],
    keys: Float[Tensor, "items keys dim"],
    weight: Float[Tensor, "heads dim+1 dim+1"],
) -> Float[Tensor, "items heads keys"]:
    """``[x_0; 1]^T W_m [x_i; 1]`` for every head m and key i."""
    rotated = torch.einsum("nd,mde->nme", augment(query), weight)
    return rotated @ augment(keys).transpose(1, 2)


def attention_features(
    query: Float[Tensor, "items dim"],
    keys: Float[Tensor, "items keys dim"],
    weight: Float[Tensor, "heads dim+1 dim+1"],
    mask: Bool[Tensor, "items keys"] | None = None,
    activation: Activation = "relu",
) -> Float[Tensor, "items heads dim+1"]:
    """``mean_i act(score_mi) [x_i; 1]`` over the real keys; with softmax the weighted mean instead."""
    require_real_tokens(mask)
    keys = zero_padding(keys, mask)
    scores = attention_scores(query, keys, weight)
    if activation == "softmax":
        gates = masked_softmax(scores, mask)
    else:
        gates = scores.relu() if activation == "relu" else activation(scores)  # type: ignore[operator]
        if mask is None:
            gates = gates / keys.shape[1]
        else:
            gates = gates.masked_fill(~mask[:, None], 0.0) / mask.sum(dim=1)[:, None, None]
    return gates @ augment(keys)


def mlp_features(
    query: Float[Tensor, "items dim"],
    keys: Float[Tensor, "items keys dim"],
    weight: Float[Tensor, "features inputs"],
    mask: Bool[Tensor, "items keys"] | None = None,
) -> Float[Tensor, "items features"]:
    """``relu(W [x_0; x_1; ...; x_N; 1])``: all vectors end to end, masked keys as zeros.

    Raises:
        ValueError: weights for another number of keys.
    """
    whole = augment(torch.cat([query, zero_padding(keys, mask).flatten(1)], dim=1))
    if whole.shape[1] != weight.shape[1]:
        raise ValueError(f"the weights take {weight.shape[1]} inputs, query and keys give {whole.shape[1]}")
    return (whole @ weight.T).relu()


def rectified_covariance(correlation: Float[Tensor, "*axes"]) -> Float[Tensor, "*axes"]:
    """``E[relu(a) relu(b)]`` of standard normal a and b: ``(sqrt(1-u^2) + u (pi - arccos u)) / (2 pi)``."""
    u = correlation.clamp(-1, 1)
    return ((1 - u.square()).clamp(min=0).sqrt() + u * (math.pi - u.arccos())) / (2 * math.pi)


def infinite_width_kernel(
    query: Float[Tensor, "items dim"],
    keys: Float[Tensor, "items keys dim"],
    other_query: Float[Tensor, "others dim"],
    other_keys: Float[Tensor, "others other_keys dim"],
    mask: Bool[Tensor, "items keys"] | None = None,
    other_mask: Bool[Tensor, "others other_keys"] | None = None,
) -> Float[Tensor, "items others"]:
    """Limit of ``Phi Phi^T / heads`` for unbiased ReLU heads: the mean over pairs of keys of
    ``s_i s'_j kappa(u_ij) <[x_i; 1], [x'_j; 1]>``, with ``s`` the standard deviations of the two scores and ``u`` their
    correlation. Exact for vectors of any norm.
    """
    first, second = augment(query), augment(other_query)
    ours, theirs = augment(keys), augment(other_keys)
    inner = torch.einsum("nid,mjd->nmij", ours, theirs)
    own = first.norm(dim=1)[:, None] * ours.norm(dim=2) / 2
    other = second.norm(dim=1)[:, None] * theirs.norm(dim=2) / 2
    deviations = own[:, None, :, None] * other[None, :, None, :]
    covariance = (first @ second.T)[:, :, None, None] * inner / 4
    terms = deviations * rectified_covariance(covariance / deviations) * inner
    weights = [_mean_weights(x, m) for x, m in ((keys, mask), (other_keys, other_mask))]
    return torch.einsum("nmij,ni,mj->nm", terms, *weights)


def _mean_weights(keys: Tensor, mask: Tensor | None) -> Tensor:
    """What each key weighs in a mean over the real ones."""
    require_real_tokens(mask)
    real = keys.new_ones(keys.shape[:2]) if mask is None else mask.to(keys.dtype)
    return real / real.sum(dim=1, keepdim=True)
