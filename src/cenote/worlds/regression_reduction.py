"""Trained heads of in-context regression reduced to two numbers each, and how well the two numbers describe them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cenote.ops.circuits import HeadCircuits
from cenote.worlds.linear_regression import check_supports

ACTIVE = 0.02
"""A head takes part if its ``mu omega`` is at least this share of the effective step."""


@dataclass(frozen=True)
class HeadReduction:
    """What is left of heads whose key-query matrix is ``omega I`` on x and whose output-value matrix reads y alone.

    Leading axes (runs) are free. omega and mu are not identified one by one (all omega times c with all mu divided by c
    is nearly the same function): compare :attr:`step`, :attr:`matrix` and the patterns.

    Attributes:
        omega: mean diagonal of KQ on x, by support, ``(*runs, heads, blocks)``; one block without supports.
        mu: ``OV[y_n, y_n]``, ``(*runs, heads, outputs)``.
        matrix: ``sum_h mu_hn KQ_h`` on x: to first order the model is a debiased gradient step with this matrix,
            ``(*runs, outputs, features, features)``.
        step: the effective step eta, mean diagonal of each output's matrix on the support it reads,
            ``(*runs, outputs)``.
        zero_sum: ``|sum_h mu_hn| / sum_h |mu_hn|``, ``(*runs, outputs)``.
        active: heads that take part, ``(*runs, heads)``.
        diagonal_energy: share of KQ's squared norm on x that lies on the diagonal, ``(*runs, heads)``.
        homogeneity: standard deviation of the diagonal over its mean's size, ``(*runs, heads)``; 0 is homogeneous.
        label_row: norm of KQ's rows for the key's y over that of all, ``(*runs, heads)``.
        other_entries: largest entry of the rows of OV that are read, ``mu`` apart, over the largest ``|mu|``,
            ``(*runs, heads)``.
    """

    omega: Float[Tensor, "*runs heads blocks"]
    mu: Float[Tensor, "*runs heads outputs"]
    matrix: Float[Tensor, "*runs outputs features features"]
    step: Float[Tensor, "*runs outputs"]
    zero_sum: Float[Tensor, "*runs outputs"]
    active: Bool[Tensor, "*runs heads"]
    diagonal_energy: Float[Tensor, "*runs heads"]
    homogeneity: Float[Tensor, "*runs heads"]
    label_row: Float[Tensor, "*runs heads"]
    other_entries: Float[Tensor, "*runs heads"]

    @property
    def signs_match(self) -> Bool[Tensor, "*runs heads"]:
        """Whether omega and mu have one sign; for a single output and block."""
        return (self.omega[..., 0] * self.mu[..., 0]) > 0


def reduce_heads(
    circuits: HeadCircuits, features: int, supports: Sequence[Sequence[int]] | None = None
) -> HeadReduction:
    """Two numbers a head, and pattern scores, of heads on tokens ``[x; y]``.

    Args:
        circuits: of a :class:`cenote.worlds.regression_attention.RegressionAttention`, or of any one-layer attention on
            such tokens (:func:`cenote.inspection.circuits.attention_circuits`, which refuses projections that do not
            split by heads). The host's scale is taken into KQ.
        features: width of x; what is left of the token's width is y.
        supports: the features that each output reads, where the tasks have their own.

    Raises:
        ValueError: circuits of a token without y, or supports that overlap or are not one an output.
    """
    kq, ov = circuits.kq * circuits.scale, circuits.ov
    outputs = kq.shape[-1] - features
    if features < 1 or outputs < 1 or ov.shape[-2:] != kq.shape[-2:]:
        raise ValueError(
            f"expected square circuits wider than {features} features, got KQ {tuple(kq.shape)}, OV {tuple(ov.shape)}"
        )
    blocks = [list(range(features))] if supports is None else [list(support) for support in supports]
    if supports is not None:
        check_supports(tuple(map(tuple, supports)), features, outputs)
    on_x, read = kq[..., :features, :features], ov[..., features:, :]
    diagonal = on_x.diagonal(dim1=-2, dim2=-1)
    omega = torch.stack([diagonal[..., block].mean(dim=-1) for block in blocks], dim=-1)
    mu = read[..., features:].diagonal(dim1=-2, dim2=-1)
    matrix = torch.einsum("...hn,...hij->...nij", mu, on_x)
    own = blocks if supports is not None else blocks * outputs
    across = matrix.diagonal(dim1=-2, dim2=-1)
    step = torch.stack([across[..., n, block].mean(dim=-1) for n, block in enumerate(own)], dim=-1)
    share = (mu * omega).abs() / step.abs().clamp_min(1e-30)[..., None, :]
    others = read.clone()
    others[..., features:].diagonal(dim1=-2, dim2=-1).zero_()
    return HeadReduction(
        omega,
        mu,
        matrix,
        step,
        mu.sum(dim=-2).abs() / mu.abs().sum(dim=-2).clamp_min(1e-30),
        share.amax(dim=-1) > ACTIVE,
        diagonal.square().sum(dim=-1) / on_x.square().sum(dim=(-1, -2)),
        diagonal.std(dim=-1, correction=0) / diagonal.mean(dim=-1).abs(),
        kq[..., features:, :features].square().sum(dim=(-1, -2)).sqrt()
        / kq[..., :features].square().sum(dim=(-1, -2)).sqrt(),
        others.abs().amax(dim=(-1, -2)) / mu.abs().amax(dim=-1),
    )
