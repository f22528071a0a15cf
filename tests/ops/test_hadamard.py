"""Hadamard matrices: orders, orthogonality, the fast transform against the matrix."""

import pytest
import torch

from cenote.ops.hadamard import (
    hadamard_matrix,
    hadamard_transform,
    has_hadamard,
    random_hadamard,
    random_orthogonal,
)

ORDERS = (1, 2, 4, 8, 12, 20, 24, 28, 36, 40, 44, 48, 52, 60, 76, 100, 108, 140, 148, 156, 172, 344)


@pytest.mark.parametrize("order", ORDERS)
def test_rows_are_orthogonal_signs(order):
    matrix = hadamard_matrix(order)
    assert bool((matrix.abs() == 1).all())
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order, dtype=torch.float64))


@pytest.mark.parametrize("order", [1, 2, 12, 48, 64, 172, 344])
def test_fast_transform_is_the_matrix(order):
    x = torch.randn(3, 2, order, dtype=torch.float64)
    torch.testing.assert_close(hadamard_transform(x), x @ hadamard_matrix(order) * order**-0.5)


def test_powers_of_two_are_sylvesters():
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    assert torch.equal(hadamard_matrix(8), torch.kron(torch.kron(two, two), two))


@pytest.mark.parametrize("draw", [random_hadamard, random_orthogonal])
def test_random_rotations_are_orthogonal_and_follow_the_generator(draw):
    q, again, other = (draw(24, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    torch.testing.assert_close(q @ q.T, torch.eye(24, dtype=torch.float64))
    assert torch.equal(q, again)
    assert not torch.equal(q, other)


@pytest.mark.parametrize("order", [0, 3, 6, 92, 50])
def test_unknown_orders_are_refused(order):
    assert not has_hadamard(order)
    with pytest.raises(ValueError, match="orthogonal"):
        hadamard_matrix(order)
