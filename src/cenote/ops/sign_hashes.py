"""Vectors as the signs of their random projections: 64 bits a word, compared by the number of bits that differ."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

WORD = 64


def random_orthogonal(dim: int, seed: int) -> Float[Tensor, "dim dim"]:
    """An orthogonal matrix drawn uniformly, the same for the same seed."""
    gaussian = torch.randn(dim, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    return (q * r.diagonal().sign()).float()


def sign_codes(x: Float[Tensor, "*rows dim"], projection: Float[Tensor, "dim dim"]) -> Int[Tensor, "*rows words"]:
    """Bits ``x P > 0``, packed into 64-bit words; bits beyond ``dim`` are 0."""
    bits = (x.float() @ projection.to(x.device)) > 0
    bits = F.pad(bits, (0, -bits.shape[-1] % WORD)).unflatten(-1, (-1, WORD))
    return (bits.long() << torch.arange(WORD, device=x.device)).sum(dim=-1)


def hamming_distance(a: Int[Tensor, "*#rows words"], b: Int[Tensor, "*#rows words"]) -> Int[Tensor, "*#rows"]:
    """Bits that differ. Shapes broadcast."""
    x = a ^ b
    # Counts of bits in pairs, then in fours, then in bytes; the product sums the bytes into the highest one.
    x = x - ((x >> 1) & 0x5555555555555555)
    x = (x & 0x3333333333333333) + ((x >> 2) & 0x3333333333333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F0F0F0F0F
    return ((x * 0x0101010101010101) >> 56).sum(dim=-1)
