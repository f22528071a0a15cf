"""Mixers that solve their regression anew, weigh pairs by distance or fit a network, by their names: each is
:class:`cenote.mixing.test_time_regression.TestTimeRegression` with one rule, and takes the settings of both."""

from __future__ import annotations

from cenote.mixing.test_time_regression import TestTimeRegression


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
