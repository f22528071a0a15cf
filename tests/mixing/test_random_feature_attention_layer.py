"""The frozen attention layer, its ridge fit and its kernel."""

import math

import numpy as np
import pytest
import torch
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import Ridge
from sklearn.utils.estimator_checks import parametrize_with_checks

from cenote.integrations.sklearn_random_features import RandomFeatureAttentionRegressor
from cenote.mixing.random_feature_attention_layer import RandomFeatureAttentionLayer
from cenote.ops.random_features import attention_features, mlp_features, rectified_covariance
from cenote.ops.ridge import ridge_path


def draw(items=12, keys=5, dim=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    query, others = torch.randn(items, dim, generator=g), torch.randn(items, keys, dim, generator=g)
    unit = torch.nn.functional.normalize
    return unit(query, dim=-1).double(), unit(others, dim=-1).double()


def filled(dim=4, heads=7, **options):
    layer = RandomFeatureAttentionLayer(dim, heads, **options).double()
    with torch.no_grad():
        layer.value.copy_(torch.randn(heads, dim + 1, generator=torch.Generator().manual_seed(3)))
    return layer


@pytest.mark.parametrize("activation", ["relu", "softmax", torch.tanh])
@pytest.mark.parametrize("biased", [False, True])
def test_answer_is_the_sum_over_heads_and_keys(activation, biased):
    query, keys = draw()
    layer = filled(biased=biased, activation=activation)
    expected = torch.zeros(12, dtype=torch.float64)
    for n in range(12):
        q, k = torch.cat([query[n], torch.ones(1)]), torch.cat([keys[n], torch.ones(5, 1)], dim=1)
        for m in range(7):
            scores = torch.stack([q @ layer.weight[m] @ each for each in k])
            if activation == "softmax":
                gates = scores.softmax(0)
            else:
                gates = (scores.relu() if activation == "relu" else scores.tanh()) / 5
            expected[n] += (gates * (k @ layer.value[m])).sum()
    torch.testing.assert_close(layer(query, keys), expected)
    torch.testing.assert_close(layer.features(query, keys) @ layer.value.flatten(), expected)


def test_order_padding_and_repetition_of_keys_change_nothing():
    query, keys = draw()
    layer = filled()
    answer = layer(query, keys)
    torch.testing.assert_close(layer(query, keys.flip(1)), answer, rtol=0, atol=1e-12)
    torch.testing.assert_close(layer(query, torch.cat([keys, keys], 1)), answer, rtol=0, atol=1e-12)
    mask = torch.ones(12, 8, dtype=torch.bool)
    mask[:, 5:] = False
    for garbage in (7.0, float("nan")):
        padded = torch.cat([keys, torch.full((12, 3, 4), garbage, dtype=torch.float64)], dim=1)
        torch.testing.assert_close(layer(query, padded, mask), answer, rtol=0, atol=1e-12)
        torch.testing.assert_close(layer.features(query, padded, mask), layer.features(query, keys))


def test_only_the_values_train_and_weights_come_from_seed_or_state():
    layer = filled()
    assert sum(p.numel() for p in layer.parameters() if p.requires_grad) == 7 * 5
    assert torch.equal(
        RandomFeatureAttentionLayer(4, 7, seed=0).weight, RandomFeatureAttentionLayer(4, 7, seed=0).weight
    )
    assert not torch.equal(layer.weight, filled(seed=1).weight)
    query, keys = draw()
    again = RandomFeatureAttentionLayer.from_reference(layer.state_dict())
    torch.testing.assert_close(again(query, keys), layer(query, keys))


def test_scores_have_the_stated_distribution():
    query, keys = draw(3, 2, 6)
    for biased in (False, True):
        layer = RandomFeatureAttentionLayer(6, 40000, biased=biased).double()
        q, k = (torch.cat([x, torch.ones(*x.shape[:-1], 1)], dim=-1) for x in (query, keys))
        scores = torch.einsum("nd,mde,nie->mni", q, layer.weight, k)
        mean = torch.einsum("nd,nid->ni", query, keys) if biased else torch.zeros(3, 2, dtype=torch.float64)
        torch.testing.assert_close(scores.mean(0), mean, rtol=0, atol=0.03)
        torch.testing.assert_close(scores.std(0), torch.ones(3, 2, dtype=torch.float64), rtol=0, atol=0.03)


@pytest.mark.parametrize("heads", [2, 30])
def test_ridge_solution_is_that_of_scikit_learn_from_either_side(heads):
    query, keys = draw(40)
    targets = torch.randn(40, generator=torch.Generator().manual_seed(1)).double()
    layer = RandomFeatureAttentionLayer(4, heads).double()
    phi = layer.features(query, keys).numpy()
    layer.fit(query, keys, targets, penalty=0.01)
    expected = Ridge(alpha=0.01 * heads * 40, fit_intercept=False, solver="cholesky").fit(phi, targets.numpy()).coef_
    np.testing.assert_allclose(layer.value.detach().flatten().numpy(), expected, rtol=1e-6, atol=1e-8)


def test_leave_one_out_is_what_leaving_out_gives():
    g = torch.Generator().manual_seed(0)
    for features in (4, 30):
        phi, y = torch.randn(12, features, generator=g).double(), torch.randn(12, 2, generator=g).double()
        path = ridge_path(phi, y)
        for i in range(12):
            rest = torch.arange(12) != i
            gram = phi[rest].T @ phi[rest] + 12 * 0.1 * torch.eye(features, dtype=torch.float64)
            v = torch.linalg.solve(gram, phi[rest].T @ y[rest])
            torch.testing.assert_close(path.leave_one_out(0.1)[i], y[i] - phi[i] @ v, rtol=1e-8, atol=1e-10)


def test_penalty_zero_gives_the_least_norm_interpolation():
    g = torch.Generator().manual_seed(0)
    phi, y = torch.randn(6, 20, generator=g).double(), torch.randn(6, 1, generator=g).double()
    torch.testing.assert_close(ridge_path(phi, y).coefficients(0.0), torch.linalg.pinv(phi) @ y)


def test_kernel_constants_and_limit_of_many_heads():
    u = torch.tensor([1.0 + 1e-7, 0.0, -1.0], dtype=torch.float64)
    torch.testing.assert_close(
        rectified_covariance(u), torch.tensor([0.5, 1 / (2 * math.pi), 0.0], dtype=torch.float64), rtol=0, atol=1e-9
    )
    query, keys = draw(12, 5, 4)
    scaled = 1.7 * keys
    layer = RandomFeatureAttentionLayer(4, 20000).double()
    for given in (keys, scaled):
        phi = layer.features(query, given)
        kernel = layer.kernel(query, given)
        assert torch.linalg.eigvalsh(kernel).min() > -1e-10
        torch.testing.assert_close(kernel, kernel.T)
        assert ((phi @ phi.T / 20000 - kernel).abs().max() / kernel.max()).item() < 0.05
    mask = torch.ones(12, 5, dtype=torch.bool)
    mask[:, 3:] = False
    torch.testing.assert_close(layer.kernel(query, keys, mask=mask), layer.kernel(query, keys[:, :3]))
    with pytest.warns(UserWarning, match="unit norm"):
        layer.kernel(query, scaled, assume_unit_norm=True)


def test_mlp_features_read_everything_end_to_end():
    query, keys = draw(3, 2, 4)
    weight = torch.randn(9, 13, generator=torch.Generator().manual_seed(2)).double()
    expected = (torch.cat([query, keys.flatten(1), torch.ones(3, 1)], dim=1) @ weight.T).relu()
    torch.testing.assert_close(mlp_features(query, keys, weight), expected)
    mask = torch.tensor([[True, False]] * 3)
    zeroed = keys * mask[..., None]
    torch.testing.assert_close(mlp_features(query, keys, weight, mask), mlp_features(query, zeroed, weight))


def test_bad_input_is_refused():
    query, keys = draw()
    layer = RandomFeatureAttentionLayer(4, 3).double()
    mask = torch.ones(12, 5, dtype=torch.bool)
    empty = mask.clone()
    empty[2] = False
    nan = keys.clone()
    nan[0, 0, 0] = float("nan")
    for given, message in (
        ((query[:, :3], keys), "dim=4"), ((query, keys[:, 0]), "expected query"), ((query, keys[:, :, :3]), "dim=4"),
        ((query, keys, mask[:, :3]), "mask of shape"), ((query, keys, empty), r"\[2\]"), ((query, nan), "not finite"),
        ((query, keys[:, :0]), "at least one key"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            layer(*given)
    with pytest.raises(TypeError, match="boolean"):
        layer(query, keys, mask.float())
    with pytest.raises(ValueError, match="num_heads"):
        RandomFeatureAttentionLayer(4, 0)
    with pytest.raises(ValueError, match="activation"):
        RandomFeatureAttentionLayer(4, 2, activation="tanh")
    for penalty in (-1.0, float("nan"), [0.1, -1.0], []):
        with pytest.raises(ValueError, match="not negative"):
            layer.fit(query, keys, torch.zeros(12).double(), penalty=penalty)
    for others in ((query, None), (None, keys), (query, keys[:3]), (query[:, :2], keys[..., :2])):
        with pytest.raises(ValueError, match=r"both or neither|expected query|dim=4"):
            layer.kernel(query, keys, *others)
    with pytest.raises(ValueError, match="not finite"):
        layer.fit(query, keys, torch.full((12,), float("inf")).double())
    for other in (
        RandomFeatureAttentionLayer(4, 3, biased=True),
        RandomFeatureAttentionLayer(4, 3, activation="softmax"),
    ):
        with pytest.raises(ValueError, match="closed form"):
            other.kernel(query, keys)


@parametrize_with_checks([RandomFeatureAttentionRegressor(num_heads=32)])
def test_keeps_the_contract_of_scikit_learn(estimator, check):
    check(estimator)


def test_estimator_learns_a_function_of_query_and_keys():
    def part(seed):
        query, keys = draw(400, 6, 5, seed)
        beta = torch.nn.functional.normalize(torch.ones(5).double(), dim=0)
        y = (torch.einsum("nd,nid->ni", query, keys) * (keys @ beta)).mean(dim=1)
        return torch.cat([query[:, None], keys], dim=1).numpy(), y.numpy()

    (x, y), (tx, ty) = part(0), part(1)
    model = RandomFeatureAttentionRegressor(200).fit(x, y)
    assert model.score(tx, ty) > 0.75
    ragged = [item[: 3 + n % 5] for n, item in enumerate(tx)]
    alone = np.concatenate([model.predict([item]) for item in ragged])
    np.testing.assert_allclose(model.predict(ragged), alone, atol=1e-10)


def test_kernel_serves_scikit_learns_kernel_ridge():
    (query, keys), (other_query, other_keys) = draw(60), draw(20, seed=5)
    layer = RandomFeatureAttentionLayer(4, 30000).double()
    y = (keys[:, :, 0] ** 2).mean(dim=1)
    exact = KernelRidge(alpha=0.01, kernel="precomputed").fit(layer.kernel(query, keys).numpy(), y.numpy())
    found = exact.predict(layer.kernel(other_query, other_keys, query, keys).numpy())
    layer.fit(query, keys, y, penalty=0.01 / 60)
    np.testing.assert_allclose(layer(other_query, other_keys).detach().numpy(), found, atol=0.02)


def test_callable_features_match_relu():
    query, keys = draw()
    weight = filled().weight
    torch.testing.assert_close(
        attention_features(query, keys, weight, None, torch.relu), attention_features(query, keys, weight)
    )
