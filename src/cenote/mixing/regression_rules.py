"""Every rule of test-time regression as a mixer of its own name: each is
:class:`cenote.mixing.test_time_regression.TestTimeRegression` with that rule, and takes the settings of both."""

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


class Ridge(TestTimeRegression, rule="ridge"):
    """Ridge regression, exact at every token: see :class:`cenote.mixing.regressors_ridge.RidgeRegressor`."""


class KernelRidge(TestTimeRegression, rule="kernel_ridge"):
    """Kernel ridge regression: see :class:`cenote.mixing.regressors_ridge.KernelRidgeRegressor`."""


class LocalConstant(TestTimeRegression, rule="local_constant"):
    """Weighted mean of the values: see :class:`cenote.mixing.regressors_local.LocalConstantRegressor`."""


class LocalLinear(TestTimeRegression, rule="local_linear"):
    """A plane fitted around the query: see :class:`cenote.mixing.regressors_local.LocalLinearRegressor`."""


class Parallax(TestTimeRegression, rule="parallax"):
    """Softmax attention with a learned slope: see :class:`cenote.mixing.regressors_local.ParallaxRegressor`."""


class Taylor2(TestTimeRegression, rule="taylor2"):
    """Weights ``1 + s + s^2 / 2``: see :class:`cenote.mixing.regressors_local.TaylorRegressor`."""


class TTTMLP(TestTimeRegression, rule="ttt_mlp"):
    """A network trained while it reads: see :class:`cenote.mixing.regressors_mlp.MLPRegressor`."""


class TitansMLP(TestTimeRegression, rule="titans_mlp"):
    """The same with momentum and forgetting: see :class:`cenote.mixing.regressors_mlp.TitansRegressor`."""
