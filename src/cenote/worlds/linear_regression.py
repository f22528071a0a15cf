"""In-context linear regression: prompts of pairs (x, y), each from a regression of its own."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cenote.worlds.base import World


class Prompts(NamedTuple):
    """A batch of prompts; leading axes are free, so that several runs can be held together.

    Attributes:
        x: inputs of the context, ``(*batch, pairs, features)``.
        y: their labels, ``(*batch, pairs, outputs)``.
        query: the input asked for, ``(*batch, features)``.
        target: its (noisy) label, ``(*batch, outputs)``.
        mask: ``True`` for a real pair, ``(*batch, pairs)``.
    """

    x: Float[Tensor, "*batch pairs features"]
    y: Float[Tensor, "*batch pairs outputs"]
    query: Float[Tensor, "*batch features"]
    target: Float[Tensor, "*batch outputs"]
    mask: Bool[Tensor, "*batch pairs"]


@dataclass(frozen=True)
class LinearRegression(World[Prompts]):
    """``y = beta^T x + e`` with ``x ~ N(0, Sigma)``, ``e ~ N(0, noise)`` and a fresh ``beta`` for each prompt.

    ``beta ~ N(0, I / features)``. With ``supports`` there is one task an output, which reads its own features S alone:
    ``beta_n ~ N(0, I / |S_n|)`` on them. From "In-Context Linear Regression Demystified" (arXiv 2503.12734).

    Args:
        features: width d of x.
        length: pairs L of the context.
        noise: variance of the label's noise.
        outputs: labels of a pair, each with a ``beta`` of its own.
        covariance: of x: variances, or the rows of a symmetric positive definite matrix; the identity by default.
        supports: for each output the features it reads, no feature twice.
        min_length: contexts have from so many pairs to ``length``, all equally likely, the rest masked; ``None`` for
            no masking.

    Raises:
        ValueError: a size below 1, negative noise, a covariance of another shape or one that is not symmetric positive
            definite, supports that overlap, are empty, name no feature or are not one an output.
    """

    name: ClassVar[str] = "linear_regression"
    predictor: ClassVar[str] = "Bayes: ridge regression"
    features: int = 5
    length: int = 40
    noise: float = 0.1
    outputs: int = 1
    covariance: tuple[float, ...] | tuple[tuple[float, ...], ...] | None = None
    supports: tuple[tuple[int, ...], ...] | None = None
    min_length: int | None = None

    def __post_init__(self) -> None:
        if self.features < 1 or self.length < 1 or self.outputs < 1:
            raise ValueError(
                "expected at least one feature, pair and output, got "
                f"features={self.features}, length={self.length}, outputs={self.outputs}"
            )
        if not (math.isfinite(self.noise) and self.noise >= 0):
            raise ValueError(f"the variance of the noise cannot be negative, got {self.noise}")
        if self.min_length is not None and not 1 <= self.min_length <= self.length:
            raise ValueError(f"min_length must lie in 1..{self.length}, got {self.min_length}")
        if self.supports is not None:
            if self.outputs == 1:
                object.__setattr__(self, "outputs", len(self.supports))
            check_supports(self.supports, self.features, self.outputs)
        _ = self._root

    @cached_property
    def sigma(self) -> Float[Tensor, "features features"]:
        """Covariance of x, float64."""
        if self.covariance is None:
            return torch.eye(self.features, dtype=torch.float64)
        given = torch.tensor(self.covariance, dtype=torch.float64)
        return given.diag() if given.ndim == 1 else given

    @cached_property
    def _root(self) -> Tensor:
        sigma, shape = self.sigma, (self.features, self.features)
        if tuple(sigma.shape) != shape or not torch.equal(sigma, sigma.T):
            raise ValueError(f"the covariance must be symmetric {shape}, got {self.covariance}")
        root, failed = torch.linalg.cholesky_ex(sigma)
        if failed:
            raise ValueError(f"the covariance must be positive definite, got {self.covariance}")
        return root.float()

    @cached_property
    def _spread(self) -> Tensor:
        """Standard deviation of each entry of beta, ``(features, outputs)``."""
        if self.supports is None:
            return torch.full((self.features, self.outputs), self.features**-0.5)
        spread = torch.zeros(self.features, self.outputs)
        for output, support in enumerate(self.supports):
            spread[list(support), output] = len(support) ** -0.5
        return spread

    def _sample(self, size: int, generator: torch.Generator) -> Prompts:
        x = torch.randn(size, self.length + 1, self.features, generator=generator)
        if self.covariance is not None:
            x = x @ self._root.T
        beta = torch.randn(size, self.features, self.outputs, generator=generator) * self._spread
        y = x @ beta
        y += math.sqrt(self.noise) * torch.randn(y.shape, generator=generator)
        mask = torch.ones(size, self.length, dtype=torch.bool)
        if self.min_length is not None:
            lengths = torch.randint(self.min_length, self.length + 1, (size, 1), generator=generator)
            mask = torch.arange(self.length) < lengths
        return Prompts(x[:, :-1], y[:, :-1], x[:, -1], y[:, -1], mask)

    def best(self, batch: Prompts) -> Tensor:
        """The posterior mean of the label, ``(*batch, outputs)``."""
        if self.supports is None:
            return ridge(batch, self.features * self.noise)
        answers = [
            ridge(
                batch._replace(x=batch.x[..., support], y=batch.y[..., n, None], query=batch.query[..., support]),
                len(support) * self.noise,
            )
            for n, support in enumerate(map(list, self.supports))
        ]
        return torch.cat(answers, dim=-1)


def check_supports(supports: tuple[tuple[int, ...], ...], features: int, outputs: int) -> None:
    """Raise ``ValueError`` unless there is one support an output, none empty, none sharing a feature."""
    named = [feature for support in supports for feature in support]
    if len(supports) != outputs or not all(supports):
        raise ValueError(f"expected one support with a feature for each of {outputs} outputs, got {supports}")
    if len(set(named)) < len(named) or not set(named) <= set(range(features)):
        raise ValueError(f"supports must be disjoint sets of features 0..{features - 1}, got {supports}")


def valid_pairs(prompts: Prompts) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs and labels with 0 in place of what is masked, and the number of real pairs ``(*batch, 1)``.

    Raises:
        ValueError: labels for another number of pairs than inputs, or a prompt without a real pair.
    """
    x, y, _, _, mask = prompts
    if y.shape[:-1] != x.shape[:-1] or mask.shape != x.shape[:-1]:
        raise ValueError(
            "expected one label and one mask entry for each x, got x "
            f"{tuple(x.shape)}, y {tuple(y.shape)}, mask {tuple(mask.shape)}"
        )
    count = mask.sum(dim=-1, keepdim=True)
    if not count.all():
        raise ValueError("a prompt needs at least one real pair")
    if bool(mask.all()):
        return x, y, count
    real = mask[..., None]
    return torch.where(real, x, 0), torch.where(real, y, 0), count


def gradient_step(
    prompts: Prompts, step: float = 1.0, matrix: Float[Tensor, "features features"] | None = None
) -> Float[Tensor, "*batch outputs"]:
    """One step of gradient descent from 0: ``step * mean_l y_l x_l^T M query`` over real pairs, M the identity.

    With ``step=1`` it is the baseline that the literature calls averaging.
    """
    x, y, count = valid_pairs(prompts)
    return _step(x, y, count, prompts.query, step, matrix)


def debiased_gradient_step(
    prompts: Prompts, step: float = 1.0, matrix: Float[Tensor, "features features"] | None = None
) -> Float[Tensor, "*batch outputs"]:
    """:func:`gradient_step` on inputs less their mean over real pairs, ``step * mean_l y_l (x_l - xbar)^T M query``."""
    x, y, count = valid_pairs(prompts)
    mean = x.sum(dim=-2, keepdim=True) / count[..., None]
    return _step(x - mean, y, count, prompts.query, step, matrix)


def _step(x: Tensor, y: Tensor, count: Tensor, query: Tensor, step: float, matrix: Tensor | None) -> Tensor:
    direction = query if matrix is None else query @ matrix.to(query).T
    # Masked labels are 0, so that their inputs, whatever the centring made of them, have no part in the sum.
    return step * ((x @ direction[..., None]).mT @ y).squeeze(-2) / count


def ridge(prompts: Prompts, penalty: float) -> Float[Tensor, "*batch outputs"]:
    """``query^T (X^T X + penalty I)^(-1) X^T y`` over real pairs: Bayes at ``penalty = features * noise``.

    With penalty 0, as without noise, its limit: :func:`least_squares`.
    """
    if penalty == 0:
        return least_squares(prompts)
    x, y, _ = valid_pairs(prompts)
    gram = x.mT @ x + penalty * torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    return (prompts.query[..., None, :] @ torch.linalg.solve(gram, x.mT @ y)).squeeze(-2)


def least_squares(prompts: Prompts) -> Float[Tensor, "*batch outputs"]:
    """The least-squares fit of smallest norm at the query."""
    x, y, _ = valid_pairs(prompts)
    return (prompts.query[..., None, :] @ torch.linalg.pinv(x) @ y).squeeze(-2)


def nearest_neighbours(prompts: Prompts, neighbours: int = 3) -> Float[Tensor, "*batch outputs"]:
    """Mean label of the real pairs nearest to the query; all of them where there are fewer than ``neighbours``."""
    if neighbours < 1:
        raise ValueError(f"expected at least one neighbour, got {neighbours}")
    x, y, count = valid_pairs(prompts)
    away = (x - prompts.query[..., None, :]).square().sum(dim=-1).masked_fill(~prompts.mask, float("inf"))
    rank = away.argsort(dim=-1).argsort(dim=-1)
    near = (rank < neighbours) & prompts.mask
    return (y * near[..., None]).sum(dim=-2) / count.clamp(max=neighbours)
