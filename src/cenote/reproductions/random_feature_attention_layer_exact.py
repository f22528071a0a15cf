"""What holds of the frozen attention layer whatever the data."""

from __future__ import annotations

import math

import torch

from cenote.mixing.random_feature_attention_layer import RandomFeatureAttentionLayer
from cenote.ops.random_features import rectified_covariance
from cenote.ops.ridge import ridge_path
from cenote.reproductions.base import Finding, finding
from cenote.reproductions.golden import golden_findings


def exact_findings() -> list[Finding]:
    """Reference files, order and padding of keys, linearity, both ridge systems, the kernel and its limit."""
    g = torch.Generator().manual_seed(0)
    query, keys = torch.randn(12, 4, generator=g).double(), torch.randn(12, 5, 4, generator=g).double()
    query, keys = query / query.norm(dim=-1, keepdim=True), keys / keys.norm(dim=-1, keepdim=True)
    layer = RandomFeatureAttentionLayer(4, 7).double()
    with torch.no_grad():
        layer.value.copy_(torch.randn(7, 5, generator=g))
        answer = layer(query, keys)
        order = torch.randperm(5, generator=g)
        mask = torch.arange(8).expand(12, 8) < 5
        padded = torch.cat([keys, torch.full((12, 3, 4), 9.0).double()], dim=1)
        changes = max(
            (layer(query, other, real) - answer).abs().max().item()
            for other, real in ((keys[:, order], None), (torch.cat([keys, keys], dim=1), None), (padded, mask))
        )
    trainable = sum(p.numel() for p in layer.parameters() if p.requires_grad)
    phi, targets = layer.features(query, keys), torch.randn(12, 1, generator=g).double()
    gram = phi.T @ phi / 12 + 0.01 * torch.eye(phi.shape[1], dtype=torch.float64)
    primal = torch.linalg.solve(gram, phi.T @ targets / 12)
    systems = (ridge_path(phi, targets).coefficients(0.01) - primal).abs().max().item()
    u = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64)
    constants = (rectified_covariance(u) - torch.tensor([0.5, 1 / (2 * math.pi), 0.0])).abs().max().item()
    kernel = layer.kernel(query, keys)
    gaps = {heads: _gap(heads, query, keys, kernel) for heads in (1000, 10000, 50000)}
    slope = math.log(gaps[1000] / gaps[50000]) / math.log(50)
    return [
        *golden_findings("random-feature-attention-layer"),
        _at_most("Order of the keys, padding, or all keys twice do not change the answer.", changes, 1e-12),
        finding("Only M (d + 1) numbers are trained, 35 for 7 heads and d = 4.", "35", trainable, lambda v: v == 35),
        _at_most("The two ridge systems, over items and over features, have one solution.", systems, 1e-8),
        _at_most("The kernel's angular part is 1/2, 1/(2 pi) and 0 at correlations 1, 0 and -1.", constants, 1e-8),
        finding(
            "The kernel is positive semi-definite.",
            "smallest eigenvalue above -1e-10",
            torch.linalg.eigvalsh(kernel).min().item(),
            lambda v: v > -1e-10,
        ),
        finding(
            "The features' Gram matrix over the heads tends to the kernel.",
            "below 0.04 (largest gap over the largest entry) at 50 000 heads",
            gaps[50000],
            lambda v: v < 0.04,
            note="Gap by heads: "
            + ", ".join(f"{heads} {gap:.3f}" for heads, gap in gaps.items())
            + f"; it falls with exponent {slope:.2f} (1/2 in theory).",
        ),
    ]


def _gap(heads: int, query: torch.Tensor, keys: torch.Tensor, kernel: torch.Tensor) -> float:
    phi = RandomFeatureAttentionLayer(query.shape[1], heads).double().features(query, keys)
    return ((phi @ phi.T / heads - kernel).abs().max() / kernel.max()).item()


def _at_most(claim: str, value: float, limit: float) -> Finding:
    return finding(claim, f"within {limit:g}", value, lambda v: v <= limit, unit="max abs difference")
