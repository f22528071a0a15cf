"""Mixers of fixed state by their names: each is :class:`cenote.mixing.test_time_regression.TestTimeRegression` with one
rule, and takes the settings of both."""

from __future__ import annotations

from cenote.mixing.test_time_regression import TestTimeRegression


class LinearAttention(TestTimeRegression, rule="linear_attention"):
    """``S = S + phi(k) v^T``: see :class:`cenote.mixing.regressors_linear.LinearAttentionRegressor`."""


class Retention(TestTimeRegression, rule="retention"):
    """``S = a_h S + k v^T``: see :class:`cenote.mixing.regressors_linear.RetentionRegressor`."""


class ScalarDecay(TestTimeRegression, rule="scalar_decay"):
    """``S = exp(g) S + k v^T``: see :class:`cenote.mixing.regressors_linear.ScalarDecayRegressor`."""


class VectorDecay(TestTimeRegression, rule="vector_decay"):
    """``S = diag(exp(g)) S + k v^T``: see :class:`cenote.mixing.regressors_linear.VectorDecayRegressor`."""


class DeltaRule(TestTimeRegression, rule="delta_rule"):
    """``S = S + beta k (v - S^T k)^T``: see :class:`cenote.mixing.regressors_delta.DeltaRegressor`."""


class GatedDelta(TestTimeRegression, rule="gated_delta"):
    """A delta step behind a decay: see :class:`cenote.mixing.regressors_delta.GatedDeltaRegressor`."""


class GatedDeltaProduct(TestTimeRegression, rule="gated_delta_product"):
    """Several delta steps a token: see :class:`cenote.mixing.regressors_delta.GatedDeltaProductRegressor`."""


class Longhorn(TestTimeRegression, rule="longhorn"):
    """Implicit (proximal) steps: see :class:`cenote.mixing.regressors_delta.LonghornRegressor`."""


class NLMS(TestTimeRegression, rule="nlms"):
    """Normalised least mean squares: see :class:`cenote.mixing.regressors_delta.NLMSRegressor`."""


class Momentum(TestTimeRegression, rule="momentum"):
    """Steps with momentum and forgetting: see :class:`cenote.mixing.regressors_momentum.MomentumRegressor`."""


class MiniBatch(TestTimeRegression, rule="mini_batch"):
    """One gradient for several tokens: see :class:`cenote.mixing.regressors_momentum.MiniBatchRegressor`."""
