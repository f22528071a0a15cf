"""Readouts as scikit-learn estimators: token arrays in, classes or vectors out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.preprocessing import LabelEncoder
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, column_or_1d, validate_data
from torch import Tensor

from cenote.data.splits import holdout
from cenote.pooling import create_pooling
from cenote.pooling.base import Pooling
from cenote.probe.feed import Feed
from cenote.probe.fits import fit_free
from cenote.probe.outcome import Outcome
from cenote.probe.plan import Host, plan
from cenote.probe.tasks import Objective
from cenote.probe.train import Group, Schedule, train_groups
from cenote.types import Features

BATCH = 512


class _Held(Feed):
    """Features in memory as a feed."""

    def __init__(self, features: Features, targets: Tensor) -> None:
        self.held, self.targets, self.layers, self.device = features, targets, features.layers, "cpu"

    def __len__(self) -> int:
        return len(self.targets)


class _ReadoutEstimator(BaseEstimator):
    """What classifier and transformer share.

    ``X`` is ``(items, tokens, dim)``, ``(items, layers, tokens, dim)`` for readouts of several layers, a list of
    ``(tokens, dim)`` or ``(layers, tokens, dim)`` arrays of different lengths, or ``(items, dim)``, which is one token
    an item.
    """

    def __init__(  # untyped, since scikit-learn wants anything to be accepted here and refused in fit
        self,
        readout="mean",
        *,
        lrs=None,
        epochs=None,
        batch_size=None,
        validation_fraction=0.1,
        random_state=0,
    ) -> None:
        self.readout = readout
        self.lrs = lrs
        self.epochs = epochs
        self.batch_size = batch_size
        self.validation_fraction = validation_fraction
        self.random_state = random_state

    def _read(self, X: Any, reset: bool) -> tuple[Features, np.dtype]:
        """Checked input as features, and the floating-point type to answer in."""
        ranks = {getattr(item, "ndim", 0) for item in X} if isinstance(X, list | tuple) else set()
        if ranks in ({2}, {3}):
            tokens, mask = padded_items(X)
        else:
            if getattr(X, "ndim", 2) > 2:
                tokens = np.asarray(X)
            else:
                tokens = validate_data(self, X, reset=reset, dtype=[np.float64, np.float32])[:, None]
            if tokens.ndim > 4 or 0 in tokens.shape:
                raise ValueError(f"X must be (items, [[layers,] tokens,] dim), got shape {tokens.shape}")
            mask = np.ones((len(tokens), tokens.shape[-2]), dtype=bool)
        if tokens.dtype.kind not in "fiu" or not np.isfinite(tokens).all():
            raise ValueError(f"X must hold finite numbers, got {tokens.dtype} with NaN, infinity or other objects")
        if reset:
            self.n_features_in_ = tokens.shape[-1]
        elif tokens.shape[-1] != self.n_features_in_:
            raise ValueError(
                f"X has {tokens.shape[-1]} features, but {type(self).__name__} is expecting "
                f"{self.n_features_in_} features as input"
            )
        dtype = tokens.dtype if tokens.dtype == np.float32 else np.dtype(np.float64)
        hidden = torch.from_numpy(np.array(tokens, dtype=np.float32))
        hidden = hidden[:, None] if hidden.ndim == 3 else hidden
        return Features(hidden, torch.from_numpy(mask), tuple(range(1, hidden.shape[1] + 1))), dtype

    def _fit_readout(self, features: Features, y: Any) -> Outcome:
        """Train or fit the readout and a linear head; sets ``classes_``."""
        y = column_or_1d(y, warn=True)
        check_classification_targets(y)
        if len(y) != len(features.mask):
            raise ValueError(
                f"Found input variables with inconsistent numbers of samples: {[len(features.mask), len(y)]}"
            )
        encoder = LabelEncoder().fit(y)
        self.classes_ = encoder.classes_
        if len(self.classes_) < 2:
            raise ValueError(f"expected at least two classes, got one class only: {self.classes_[0]!r}")
        targets = torch.from_numpy(encoder.transform(y)).long()
        fitting, held_out = self._divide(targets)
        train, validation = (_Held(_some(features, rows), targets[rows]) for rows in (fitting, held_out))
        objective = Objective("classification", len(self.classes_))
        stack = features.hidden.shape[1]
        host = Host(self.n_features_in_, features.layers, None, 0, "sequence", bool(features.mask.all()))
        (candidate,) = plan([self.readout], host, stack, features.layers[-1:], "both", 1, self.lrs, None)
        if not candidate.members:
            outcome = fit_free(candidate, train, validation, validation, objective, host)
            assert outcome is not None
            return outcome
        schedule = Schedule.sized(len(train), self.epochs, self.batch_size, order_seed=self.random_state)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.random_state)
            group = Group.create(candidate, host.dim, objective, schedule, host.uniform)
            train_groups([group], [train], validation, schedule)
        return group.outcome(validation, complete=True)

    def _divide(self, targets: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Rows to fit on and rows to choose the setting on: all for both where there are too few."""
        every = np.arange(len(targets))
        count = round(self.validation_fraction * len(targets))
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"validation_fraction must lie between 0 and 1, got {self.validation_fraction}")
        if count < 1 or int(torch.bincount(targets).min()) < 2:
            return every, every
        fitting, held_out = holdout(targets.numpy(), count, self.random_state)
        return fitting, held_out

    @torch.no_grad()
    def _vectors(self, features: Features) -> Tensor:
        """Pooled vectors, ``(items, width)``."""
        pooling: Pooling = self.pooling_
        tokens = features.hidden if pooling.layers == "all" else features.hidden[:, -1]
        mask = None if bool(features.mask.all()) else features.mask
        pieces = [slice(start, start + BATCH) for start in range(0, len(tokens), BATCH)]
        return torch.cat([pooling(tokens[p], None if mask is None else mask[p]) for p in pieces]).float()

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.three_d_array = True
        return tags


class ReadoutClassifier(ClassifierMixin, _ReadoutEstimator):
    """A readout with a linear head, trained as the probe trains it.

    Readouts without parameters get a logistic regression whose penalty is chosen on a held-out part; trained ones a
    grid of learning rates, chosen likewise: ``ReadoutClassifier("efficient_probing(num_queries=8)").fit(X, y)``.

    ``X`` is ``(items, tokens, dim)``, ``(items, layers, tokens, dim)`` for readouts of several layers, a list of
    ``(tokens, dim)`` or ``(layers, tokens, dim)`` arrays of different lengths, or ``(items, dim)``, which is one token
    an item.

    Args:
        readout: as :func:`cenote.pooling.create_pooling` reads it.
        lrs: learning rates tried, in place of the readout's own grid.
        epochs, batch_size: of the training; by the number of items unless given.
        validation_fraction: share of the items on which settings are chosen.
        random_state: seed of the split, the initialisation and the batch order.

    Attributes:
        classes_: class labels.
        pooling_: the trained pooling.
        n_features_in_: token width.
    """

    def fit(self, X: Any, y: Any) -> ReadoutClassifier:
        """Fit on items and their labels."""
        if y is None:
            raise ValueError("ReadoutClassifier requires y to be passed, but the target y is None")
        outcome = self._fit_readout(self._read(X, reset=True)[0], y)
        assert outcome.head is not None
        self.pooling_, self.head_ = outcome.pooling, outcome.head.double()
        return self

    def decision_function(self, X: Any) -> np.ndarray:
        """Logits ``(items, classes)``, or for two classes their difference ``(items,)``."""
        check_is_fitted(self)
        logits = self._logits(X)
        return (logits[:, 1] - logits[:, 0] if logits.shape[1] == 2 else logits).numpy()

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities ``(items, classes)`` in the order of ``classes_``."""
        check_is_fitted(self)
        return self._logits(X).softmax(dim=-1).numpy()

    def predict(self, X: Any) -> np.ndarray:
        """The most probable class of each item."""
        check_is_fitted(self)
        return self.classes_[self._logits(X).argmax(dim=-1).numpy()]

    @torch.no_grad()
    def _logits(self, X: Any) -> Tensor:
        return self.head_(self._vectors(self._read(X, reset=False)[0]).double())


class ReadoutTransformer(ClassNamePrefixFeaturesOutMixin, TransformerMixin, _ReadoutEstimator):
    """Items to pooled vectors, in front of any estimator of scikit-learn.

    Readouts without parameters need no labels; trained ones learn with a linear head, which is then dropped. Arguments
    and input as :class:`ReadoutClassifier`.
    """

    def fit(self, X: Any, y: Any = None) -> ReadoutTransformer:
        """Fit on items; labels are needed where the readout has parameters."""
        features, _ = self._read(X, reset=True)
        stack = features.hidden.shape[1]
        fresh = create_pooling(self.readout, dim=self.n_features_in_, num_layers=stack)
        if not any(True for _ in fresh.parameters()):
            self.pooling_: Any = fresh.eval()
        else:
            if y is None:
                raise ValueError(f"{self.readout} has parameters to train, which requires y to be passed")
            self.pooling_ = self._fit_readout(features, y).pooling
        self._n_features_out = self.pooling_.out_dim
        return self

    def transform(self, X: Any) -> np.ndarray:
        """Vectors ``(items, out_dim)`` in the floating-point type of ``X``."""
        check_is_fitted(self)
        features, dtype = self._read(X, reset=False)
        return self._vectors(features).numpy().astype(dtype)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags


def padded_items(items: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Arrays ``([layers,] tokens, dim)`` of different lengths as one, and the mask of the real tokens."""
    arrays = [np.asarray(item, dtype=float) for item in items]
    widths = {array.shape[-1] for array in arrays}
    stacks = {array.shape[:-2] for array in arrays}
    lengths = np.array([array.shape[-2] for array in arrays])
    if len(widths) > 1 or (lengths == 0).any():
        raise ValueError(f"items must have at least one token each, all of one width, got widths {sorted(widths)}")
    if len(stacks) > 1:
        raise ValueError(f"items must have equally many layers, got {sorted(stack[0] for stack in stacks)}")
    mask = np.arange(lengths.max()) < lengths[:, None]
    tokens = np.zeros((len(arrays), *stacks.pop(), lengths.max(), widths.pop()))
    for place, array, length in zip(tokens, arrays, lengths, strict=True):
        place[..., :length, :] = array
    return tokens, mask


def _some(features: Features, rows: np.ndarray) -> Features:
    index = torch.from_numpy(np.asarray(rows))
    return Features(features.hidden[index], features.mask[index], features.layers)
