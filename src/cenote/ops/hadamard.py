"""Hadamard matrices of the orders that networks have, and their fast transform.

A Hadamard matrix has entries 1 and -1 and orthogonal rows, ``H H^T = n I``; divided by ``sqrt(n)`` it is a rotation
that spreads every channel over all others. Orders are built, not stored: Sylvester's doubling, both constructions of
Paley over fields of ``p`` and ``p^2`` elements, and Goethals and Seidel's array of four circulants (156 and 172).
"""

from __future__ import annotations

from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

_CIRCULANTS: dict[int, tuple[int, tuple[tuple[int, ...], ...]]] = {
    39: (
        16,
        (
            (1, 3, 6, 9, 10, 12, 13, 14),
            (1, 2, 6, 8, 9, 13, 14),
            (3, 4, 5, 6, 7, 11, 12, 13, 14),
            (1, 2, 5, 11, 12, 13),
        ),
    ),
    43: (4, ((2, 3, 6), (2, 4, 6), (4, 5, 6), (1, 3, 4, 6))),
}
"""Length to (multiplier, for each of four circulants the orbits of that multiplier that are -1)."""


def hadamard_matrix(order: int) -> Float[Tensor, "order order"]:
    """A Hadamard matrix with entries 1 and -1 in float64; Sylvester's (symmetric) for powers of two.

    Other orders are ``K 2^m`` with the smallest factor ``K`` that a construction gives, as the Kronecker product of the
    factor's matrix with Sylvester's, in this order.

    Raises:
        ValueError: no construction here gives the order.
    """
    return _matrix(order).clone()


def has_hadamard(order: int) -> bool:
    """Whether :func:`hadamard_matrix` knows the order."""
    return order >= 1 and _split(order) is not None


def hadamard_transform(x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
    """``x H / sqrt(dim)`` with ``H = hadamard_matrix(dim)``, in ``dim log dim`` steps apart from the odd factor.

    Raises:
        ValueError: no Hadamard matrix of that order is known.
    """
    order = x.shape[-1]
    factor = _factor(order)
    wide = x if x.dtype == torch.float64 else x.float()
    parts = wide.unflatten(-1, (factor, order // factor))
    if factor > 1:
        small = _matrix(factor).to(parts.device, parts.dtype)
        parts = torch.einsum("...kp,kl->...lp", parts, small)
    step = 1
    while step < order // factor:
        pairs = parts.unflatten(-1, (-1, 2, step))
        even, odd = pairs.unbind(-2)
        parts = torch.stack([even + odd, even - odd], dim=-2).flatten(-3)
        step *= 2
    return (parts.flatten(-2) * order**-0.5).to(x.dtype)


def random_hadamard(order: int, generator: torch.Generator) -> Float[Tensor, "order order"]:
    """``diag(random signs) H / sqrt(n)`` in float64.

    Raises:
        ValueError: no Hadamard matrix of that order is known.
    """
    signs = torch.randint(0, 2, (order, 1), generator=generator).double() * 2 - 1
    return signs * _matrix(order) * order**-0.5


def random_orthogonal(order: int, generator: torch.Generator) -> Float[Tensor, "order order"]:
    """An orthogonal matrix drawn uniformly (QR of normal numbers with signs fixed), in float64."""
    q, r = torch.linalg.qr(torch.randn(order, order, generator=generator, dtype=torch.float64))
    return q * r.diagonal().sign()


@lru_cache(maxsize=16)
def _matrix(order: int) -> Tensor:
    factor = _factor(order)
    matrix = _built(factor)
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    while len(matrix) < order:
        matrix = torch.kron(matrix, two)
    return matrix


def _factor(order: int) -> int:
    factor = _split(order) if order >= 1 else None
    if factor is None:
        raise ValueError(f"no Hadamard matrix of order {order} is known here: use transform='orthogonal' instead")
    return factor


def _split(order: int) -> int | None:
    """The smallest constructible factor ``K`` with ``order = K 2^m``."""
    odd, power = order, 0
    while odd % 2 == 0:
        odd, power = odd // 2, power + 1
    if odd == 1:
        return 1
    return next((odd << m for m in range(2, power + 1) if _known(odd << m)), None)


def _known(order: int) -> bool:
    return order // 4 in _CIRCULANTS or _field(order - 1, 3) is not None or _field(order // 2 - 1, 1) is not None


def _built(order: int) -> Tensor:
    if order == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if (field := _field(order - 1, 3)) is not None:  # Paley I: q = 3 mod 4
        return torch.eye(order, dtype=torch.float64) + _bordered(field, -1)
    if (field := _field(order // 2 - 1, 1)) is not None:  # Paley II: q = 1 mod 4
        core, eye = _bordered(field, 1), torch.eye(order // 2, dtype=torch.float64)
        one = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        zero = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(core, one) + torch.kron(eye, zero)
    return _goethals_seidel(order // 4)


def _field(size: int, residue: int) -> tuple[int, int] | None:
    """``(p, 1 or 2)`` where size is that power of an odd prime and ``size % 4 == residue``."""
    if size < 3 or size % 4 != residue:
        return None
    root = round(size**0.5)
    if root * root == size and _prime(root):
        return root, 2
    return (size, 1) if _prime(size) else None


def _prime(number: int) -> bool:
    return number > 1 and all(number % d for d in range(2, int(number**0.5) + 1))


def _bordered(field: tuple[int, int], sign: int) -> Tensor:
    """Characters of differences, ``chi(i - j)``, with a border of ``sign`` above and 1 at the left."""
    p, degree = field
    size = p**degree
    square = torch.full((size,), -1.0, dtype=torch.float64)
    square[0] = 0
    if degree == 1:
        square[[i * i % p for i in range(1, p)]] = 1
        numbers = torch.arange(p)
        differences = (numbers[:, None] - numbers) % p
    else:  # pairs a + b s with s^2 a number that is no square
        s = next(g for g in range(2, p) if all(i * i % p != g for i in range(p)))
        for a in range(p):
            for b in range(p):
                if a or b:
                    square[(a * a + s * b * b) % p * p + 2 * a * b % p] = 1
        high, low = torch.arange(size) // p, torch.arange(size) % p
        differences = (high[:, None] - high) % p * p + (low[:, None] - low) % p
    matrix = torch.zeros(size + 1, size + 1, dtype=torch.float64)
    matrix[0, 1:], matrix[1:, 0] = sign, 1
    matrix[1:, 1:] = square[differences]
    return matrix


def _goethals_seidel(length: int) -> Tensor:
    multiplier, negative = _CIRCULANTS[length]
    orbit, count = [-1] * length, 0
    for start in range(length):
        if orbit[start] < 0:
            place = start
            while orbit[place] < 0:
                orbit[place] = count
                place = place * multiplier % length
            count += 1
    shifts = (torch.arange(length) - torch.arange(length)[:, None]) % length
    a, b, c, d = (
        torch.tensor([-1.0 if o in orbits else 1.0 for o in orbit], dtype=torch.float64)[shifts] for orbits in negative
    )
    rb, rc, rd = b.flip(1), c.flip(1), d.flip(1)
    tb, tc, td = b.T.flip(1), c.T.flip(1), d.T.flip(1)
    rows = [[a, rb, rc, rd], [-rb, a, td, -tc], [-rc, -td, a, tb], [-rd, tc, -tb, a]]
    return torch.cat([torch.cat(row, dim=1) for row in rows])
