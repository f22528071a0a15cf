"""Kernel ridge regression at every token against scikit-learn, and against plain ridge regression."""

import pytest
import torch
from jaxtyping import TypeCheckError
from sklearn.kernel_ridge import KernelRidge

from cenote.ops.kernel_ridge import kernel_matrix, kernel_ridge
from cenote.ops.ridge_recurrence import ridge_recurrence

KERNELS = ("linear", "dot", "gaussian")


@pytest.fixture
def given():
    q, k, v = (torch.randn(2, 2, 17, width, dtype=torch.float64) for width in (5, 5, 4))
    weight = torch.rand(2, 2, 17, dtype=torch.float64)
    weight[:, :, 3] = 0
    return q, k, v, weight


@pytest.mark.parametrize("kernel", KERNELS)
def test_is_scikit_learn_on_the_pairs_so_far(given, kernel):
    q, k, v, weight = (x[0, 1] for x in given)
    out = kernel_ridge(*given[:3], 0.3, given[3], kernel=kernel, scale=0.5)[0][0, 1]
    for t in (0, 2, 3, 16):
        seen = [n for n in range(t + 1) if weight[n] > 0]
        model = KernelRidge(alpha=0.3, kernel="precomputed")
        model.fit(kernel_matrix(k[seen], k[seen], kernel, 0.5).numpy(), v[seen].numpy(), weight[seen].numpy())
        expected = model.predict(kernel_matrix(q[t : t + 1], k[seen], kernel, 0.5).numpy())[0]
        torch.testing.assert_close(out[t], torch.from_numpy(expected))


@pytest.mark.parametrize("kernel", KERNELS)
def test_cut_anywhere(given, kernel):
    q, k, v, weight = given
    whole, last = kernel_ridge(q, k, v, 0.3, weight, kernel=kernel)
    state, parts = None, []
    for part in (slice(0, 1), slice(1, 4), slice(4, 17)):
        out, state = kernel_ridge(*(x[:, :, part] for x in (q, k, v)), 0.3, weight[:, :, part], state, kernel=kernel)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, dim=2), whole)
    torch.testing.assert_close(state, last)


def test_linear_kernel_is_ridge_regression(given):
    q, k, v, weight = given
    expected = ridge_recurrence(q, k, v, 0.6, weight=weight)[0]
    torch.testing.assert_close(kernel_ridge(q, k, v, 0.3, weight, kernel="linear", scale=0.5)[0], expected)


def test_gradients(given):
    inputs = [x[:1, :1, :6].clone().requires_grad_() for x in given[:3]]
    assert torch.autograd.gradcheck(lambda q, k, v: kernel_ridge(q, k, v, 0.3, scale=0.4)[0], inputs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ridge": 0.0}, "above 0"),
        ({"weight": torch.full((2, 2, 17), -1.0, dtype=torch.float64)}, "weight from 0 to 2"),
    ],
)
def test_refuses(given, change, message):
    q, k, v, weight = given
    with pytest.raises(ValueError, match=message):
        kernel_ridge(**{"query": q, "key": k, "value": v, "ridge": 0.3, "weight": weight, **change})


@pytest.mark.parametrize("change", [{"kernel": "cosine"}, {"value": torch.zeros(2, 2, 16, 4).double()}])
def test_refuses_by_type_or_value(given, change):
    q, k, v, weight = given
    with pytest.raises((ValueError, TypeCheckError)):
        kernel_ridge(**{"query": q, "key": k, "value": v, "ridge": 0.3, "weight": weight, **change})
