"""One layer of multi-head attention on prompts of in-context regression, and its linear baseline."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cenote.ops.circuits import HeadCircuits
from cenote.worlds.linear_regression import LinearRegression, Prompts, valid_pairs


class RegressionAttention(nn.Module):
    """``prediction = last entries of sum_h O_h V_h sum_l a_h[l] z_l`` with ``a_h = softmax_l(z_l^T K_h^T Q_h z_q)``.

    Tokens are ``z_l = [x_l; y_l]``, the query's ``z_q = [x_q; 0]``, which is not among the keys. There is no
    ``1 / sqrt(dim)``, no residual and no norm. Linear attention has ``a_h[l] = z_l^T K_h^T Q_h z_q / divisor`` instead.
    From "In-Context Linear Regression Demystified" (arXiv 2503.12734). Parameters: ``4 H (features + outputs)^2``.

    The query's label is always 0, so that only the first columns of ``K_h^T Q_h`` act, and only the last rows of
    ``O_h V_h`` are read: those products alone are formed, once for all prompts.

    Args:
        features: width of x.
        heads: heads H.
        outputs: width of y.
        attention: ``"softmax"`` or ``"linear"``.
        divisor: of linear attention: a fixed number (the paper's contrast uses the training length), or ``None`` for
            the prompt's own number of pairs.
        seeds: holds one network for each along a leading axis, of the weights and of the prompts, each drawn from its
            own seed alone; ``None`` for a single network without that axis.
        init_std: standard deviation of every weight.

    Raises:
        ValueError: a size below 1, an unknown attention, a divisor for softmax or one that is not positive.
    """

    def __init__(
        self,
        features: int,
        heads: int = 4,
        outputs: int = 1,
        attention: str = "softmax",
        divisor: float | None = None,
        seeds: Sequence[int] | None = None,
        init_std: float = 0.1,
    ) -> None:
        super().__init__()
        if min(features, heads, outputs) < 1:
            raise ValueError(f"sizes must be at least 1, got features={features}, heads={heads}, outputs={outputs}")
        if seeds is not None and not len(seeds):
            raise ValueError("expected at least one seed, got none")
        if attention not in ("softmax", "linear"):
            raise ValueError(f"attention must be 'softmax' or 'linear', got {attention!r}")
        if divisor is not None and (attention == "softmax" or not divisor > 0):
            raise ValueError(f"only linear attention has a divisor, a positive one; got {divisor} for {attention}")
        self.features, self.outputs, self.attention, self.divisor = features, outputs, attention, divisor
        self.seeds = None if seeds is None else tuple(seeds)
        shape = (4, heads, features + outputs, features + outputs)
        if self.seeds is None:
            drawn = torch.randn(shape)
        else:
            drawn = torch.stack(
                [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in self.seeds], dim=1
            )
        self.key, self.query, self.value, self.output = (nn.Parameter(init_std * each) for each in drawn)

    @property
    def circuits(self) -> HeadCircuits:
        """The heads' matrices, as they are without a gradient."""
        return HeadCircuits(self.query.detach(), self.key.detach(), self.value.detach(), self.output.detach())

    def forward(
        self, prompts: Prompts, return_attention: bool = False
    ) -> Float[Tensor, "*batch outputs"] | tuple[Float[Tensor, "*batch outputs"], Float[Tensor, "*batch heads pairs"]]:
        """Predictions ``(*runs, batch, outputs)``, and the attention ``(*runs, batch, heads, pairs)`` if asked for."""
        kq = self.key.mT @ self.query[..., : self.features]
        ov = self.output[..., self.features :, :] @ self.value
        prediction, weights = attend_prompts(kq, ov, prompts, self.attention, self.divisor)
        return (prediction, weights) if return_attention else prediction


def attend_prompts(
    kq: Float[Tensor, "*runs heads width features"],
    ov: Float[Tensor, "*runs heads outputs width"],
    prompts: Prompts,
    attention: str = "softmax",
    divisor: float | None = None,
) -> tuple[Float[Tensor, "*batch outputs"], Float[Tensor, "*batch heads pairs"]]:
    """What heads of given circuits predict, and their attention.

    Args:
        kq: columns of ``K_h^T Q_h`` that meet the query's x.
        ov: rows of ``O_h V_h`` that are read.
        prompts: ``(*runs, batch, ...)``.
        attention: ``"softmax"`` or ``"linear"``.
        divisor: of linear attention; ``None`` for the number of real pairs.
    """
    x, y, count = valid_pairs(prompts)
    if (x.shape[-1], y.shape[-1]) != (kq.shape[-1], ov.shape[-2]):
        raise ValueError(
            f"expected {kq.shape[-1]} features and {ov.shape[-2]} outputs, got {x.shape[-1]} and {y.shape[-1]}"
        )
    tokens = torch.cat([x, y], dim=-1)
    heads, width = kq.shape[-3:-1]
    wanted = prompts.query @ kq.flatten(-3, -2).mT  # (*runs, batch, heads * width)
    scores = wanted.unflatten(-1, (heads, width)) @ tokens.mT
    if attention == "softmax":
        weights = _softmax(scores, prompts.mask)
    else:
        weights = scores / (
            count[..., None] if divisor is None else divisor
        )  # masked tokens are 0, and so are their scores
    read = (weights @ tokens).flatten(-2)
    return read @ ov.transpose(-3, -2).flatten(-2).mT, weights


def reduced_prediction(
    omega: Float[Tensor, "heads"], mu: Float[Tensor, "heads"], prompts: Prompts
) -> Float[Tensor, "*batch outputs"]:
    """``sum_h mu_h sum_l softmax_l(omega_h x_l^T x_q) y_l``: heads of which two numbers are left."""
    x, y, _ = valid_pairs(prompts)
    scores = omega[:, None] * (x @ prompts.query[..., None]).mT
    weights = _softmax(scores, prompts.mask)
    return torch.einsum("h,...ho->...o", mu, weights @ y)


def _softmax(scores: Tensor, mask: Tensor) -> Tensor:
    return (scores if mask.all() else scores.masked_fill(~mask[..., None, :], float("-inf"))).softmax(dim=-1)


def fit_regression(
    model: RegressionAttention,
    world: LinearRegression,
    steps: int = 6000,
    *,
    batch: int = 256,
    lr: float = 3e-3,
    final_lr: float = 0.02,
    ahead: int = 8,
    watch: Callable[[int, Tensor], None] | None = None,
) -> RegressionAttention:
    """Train by the mean squared error on fresh prompts with Adam and a cosine to ``final_lr * lr``.

    All runs go on together, each on prompts drawn from its own seed: what comes of one does not depend on the others.

    Args:
        model: built with ``seeds``.
        ahead: steps whose prompts are drawn together.
        watch: told the step and the losses of all runs, ``(runs,)``, after every update.
    """
    if model.seeds is None:
        raise ValueError("expected a model built with seeds, which its prompts are drawn from as well")
    # The prompts' seeds are kept apart from those of the weights.
    streams = [world.stream(batch * ahead, 1_000_003 * (seed + 1)) for seed in model.seeds]
    optimiser = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps, final_lr * lr)
    for step in range(steps):
        if step % ahead == 0:
            drawn = zip(*(next(stream) for stream in streams), strict=True)
            block = [torch.stack(parts).unflatten(1, (ahead, batch)) for parts in drawn]
        prompts = Prompts(*(part[:, step % ahead] for part in block))
        losses = (model(prompts) - prompts.target).square().mean(dim=(1, 2))
        optimiser.zero_grad()
        losses.sum().backward()
        optimiser.step()
        schedule.step()
        if watch is not None:
            watch(step, losses.detach())
    return model.eval()
