"""The random-feature attention layer as a scikit-learn regressor."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.utils.validation import check_is_fitted, column_or_1d, validate_data
from torch import Tensor

from cenote.integrations.sklearn import padded_items
from cenote.mixing.random_feature_attention_layer import RandomFeatureAttentionLayer


class RandomFeatureAttentionRegressor(RegressorMixin, BaseEstimator):
    """Regression on a query and a set of keys by one frozen attention layer with fitted values.

    ``X`` is ``(items, 1 + keys, dim)`` with the query in front, a list of ``(1 + keys, dim)`` arrays of different
    lengths, or ``(items, dim)``, where each vector is query and only key at once. See
    :class:`cenote.mixing.random_feature_attention_layer.RandomFeatureAttentionLayer`.

    Args:
        num_heads: frozen heads.
        biased: draw their weights around the identity.
        activation: ``"relu"`` or ``"softmax"``.
        alpha: ridge penalty; ``None`` chooses it by exact leave-one-out error.
        normalise: scale every vector to unit norm, as the layer's theory wants.
        random_state: seed of the frozen weights.

    Attributes:
        layer_: the fitted layer; its ``value`` holds the coefficients ``(heads, dim + 1)``.
        alpha_: the penalty used.
    """

    def __init__(  # untyped, since scikit-learn wants anything to be accepted here and refused in fit
        self, num_heads=256, *, biased=False, activation="relu", alpha=None, normalise=True, random_state=0
    ) -> None:
        self.num_heads = num_heads
        self.biased = biased
        self.activation = activation
        self.alpha = alpha
        self.normalise = normalise
        self.random_state = random_state

    def fit(self, X: Any, y: Any) -> RandomFeatureAttentionRegressor:
        """Solve for the values.

        Raises:
            ValueError: shapes that disagree, fewer than two items, numbers that are not finite.
        """
        query, keys, mask = self._read(X, reset=True)
        targets = column_or_1d(y, warn=True, dtype=np.float64)
        if len(targets) != len(query):
            raise ValueError(
                f"Found input variables with inconsistent numbers of samples: {[len(query), len(targets)]}"
            )
        if not np.isfinite(targets).all():
            raise ValueError("y must hold finite numbers, got NaN or infinity")
        if len(query) < 2:
            raise ValueError(f"expected at least 2 items to fit on, got n_samples = {len(query)}")
        layer = RandomFeatureAttentionLayer(
            query.shape[1], self.num_heads, biased=self.biased, activation=self.activation, seed=self.random_state
        ).double()
        centre = targets.mean()
        self.alpha_ = layer.fit(query, keys, torch.from_numpy(targets - centre), mask, self.alpha)
        self.layer_, self.intercept_ = layer, float(centre)
        return self

    @torch.no_grad()
    def predict(self, X: Any) -> np.ndarray:
        """One number an item."""
        check_is_fitted(self)
        query, keys, mask = self._read(X, reset=False)
        return self.layer_(query, keys, mask).numpy() + self.intercept_

    def _read(self, X: Any, reset: bool) -> tuple[Tensor, Tensor, Tensor]:
        if isinstance(X, list | tuple) and {getattr(item, "ndim", 0) for item in X} == {2}:
            tokens, real = padded_items(X)
        else:
            if getattr(X, "ndim", 2) == 3:
                tokens = np.asarray(X)
            else:
                flat = validate_data(self, X, reset=reset, dtype=[np.float64, np.float32])
                tokens = np.repeat(flat[:, None], 2, axis=1)
            real = np.ones(tokens.shape[:2], dtype=bool)
        if tokens.dtype.kind not in "fiu" or not np.isfinite(tokens).all():
            raise ValueError(f"X must hold finite numbers, got {tokens.dtype} with NaN, infinity or other objects")
        if tokens.shape[1] < 2:
            raise ValueError(f"X must be (items, 1 + keys, dim) with at least one key, got shape {tokens.shape}")
        if reset:
            self.n_features_in_ = tokens.shape[-1]
        elif tokens.shape[-1] != self.n_features_in_:
            raise ValueError(
                f"X has {tokens.shape[-1]} features, but {type(self).__name__} is expecting "
                f"{self.n_features_in_} features as input"
            )
        both = torch.from_numpy(tokens.astype(np.float64))
        if self.normalise:
            both = torch.nn.functional.normalize(both, dim=-1)
        return both[:, 0], both[:, 1:], torch.from_numpy(real[:, 1:])

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.three_d_array = True
        return tags
