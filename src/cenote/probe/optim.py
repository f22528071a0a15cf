"""Optimisers for stacks of models: every parameter has a leading member axis, every member its own learning rate.

The updates are those of the usual optimisers, member by member; only the learning rate is a vector. Gradients come in as a
dict of the same names. State tensors are created on the first step.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

Stack = dict[str, Tensor]
"""Parameter name to ``(members, ...)``."""


def warmup_cosine(epoch: float, epochs: int, warmup: float, minimum: float = 0.0) -> float:
    """Factor on the base rate at a fractional epoch: linear warm-up, then half a cosine to ``minimum``.

    ``e / warmup`` before ``warmup``, then ``m + (1 - m) (1 + cos(pi (e - warmup) / (epochs - warmup))) / 2``.
    """
    if epoch < warmup:
        return epoch / warmup
    progress = (epoch - warmup) / max(epochs - warmup, 1e-12)
    return minimum + (1 - minimum) * 0.5 * (1 + math.cos(math.pi * progress))


def _per_member(values: Tensor, like: Tensor) -> Tensor:
    """``(members,)`` shaped to broadcast over ``(members, ...)``."""
    return values.view(-1, *(1,) * (like.ndim - 1))


class StackOptimizer(ABC):
    """One optimiser for all members of a stack.

    Args:
        params: the stack, updated in place.
        lr: learning rate of each member, ``(members,)``.
        factors: parameter name to a ``(members,)`` factor on the learning rate (learned queries); 1 where absent.
        weight_decay: decay on parameters with at least two axes (the member axis not counted).
    """

    slots: tuple[str, ...]

    def __init__(
        self, params: Stack, lr: Tensor, factors: dict[str, Tensor] | None = None, weight_decay: float = 0.0
    ) -> None:
        self.params, self.lr, self.factors, self.weight_decay = params, lr, factors or {}, weight_decay
        self.steps = 0
        self.state: dict[str, Stack] = {
            slot: {name: torch.zeros_like(p) for name, p in params.items()} for slot in self.slots
        }

    @torch.no_grad()
    def step(self, grads: Stack, schedule: float = 1.0) -> None:
        """One update of every member; ``schedule`` multiplies all learning rates."""
        self.steps += 1
        for name, grad in grads.items():
            rate = self.lr * schedule
            if name in self.factors:
                rate = rate * self.factors[name]
            self._update(name, self.params[name], grad, _per_member(rate, grad))

    @abstractmethod
    def _update(self, name: str, param: Tensor, grad: Tensor, rate: Tensor) -> None: ...

    def keep(self, members: Tensor, params: Stack) -> None:
        """Go on with a subset of members, whose parameters are ``params``."""
        self.params, self.lr = params, self.lr[members]
        self.factors = {name: factor[members] for name, factor in self.factors.items()}
        self.state = {slot: {name: t[members] for name, t in stack.items()} for slot, stack in self.state.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """Flat tensors from which :meth:`load_state_dict` resumes exactly."""
        flat = {f"{slot}.{name}": t for slot, stack in self.state.items() for name, t in stack.items()}
        return {**flat, "steps": torch.tensor(self.steps)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.steps = int(state["steps"])
        for slot, stack in self.state.items():
            for name, tensor in stack.items():
                tensor.copy_(state[f"{slot}.{name}"])


class AdamW(StackOptimizer):
    """AdamW (Loshchilov and Hutter, 2019), betas 0.9 and 0.999, eps 1e-8."""

    slots = ("exp_avg", "exp_avg_sq")
    betas, eps = (0.9, 0.999), 1e-8

    def _update(self, name: str, param: Tensor, grad: Tensor, rate: Tensor) -> None:
        first, second = self.betas
        average, square = self.state["exp_avg"][name], self.state["exp_avg_sq"][name]
        if self.weight_decay and param.ndim > 2:
            param.mul_(1 - rate * self.weight_decay)
        average.lerp_(grad, 1 - first)
        square.mul_(second).addcmul_(grad, grad, value=1 - second)
        denominator = square.sqrt().div_(math.sqrt(1 - second**self.steps)).add_(self.eps)
        param.sub_(average.div(denominator).mul_(rate / (1 - first**self.steps)))


class SGD(StackOptimizer):
    """Stochastic gradient descent with momentum 0.9."""

    slots = ("momentum",)
    momentum = 0.9

    def _update(self, name: str, param: Tensor, grad: Tensor, rate: Tensor) -> None:
        if self.weight_decay and param.ndim > 2:
            grad = grad + self.weight_decay * param
        velocity = self.state["momentum"][name].mul_(self.momentum).add_(grad)
        param.sub_(rate * velocity)


class LARS(StackOptimizer):
    """Layer-wise adaptive rate scaling (You et al., 2017) as used for linear probes.

    Tensors with at least two axes: ``g <- (g + wd p) * trust |p| / |g|`` (factor 1 if a norm is 0), norms taken for
    each member by itself; then momentum 0.9. One-axis tensors get neither decay nor scaling.
    """

    slots = ("momentum",)
    momentum, trust = 0.9, 0.001

    def _update(self, name: str, param: Tensor, grad: Tensor, rate: Tensor) -> None:
        if param.ndim > 2:
            grad = grad + self.weight_decay * param
            weight_norm = param.flatten(1).norm(dim=1)
            grad_norm = grad.flatten(1).norm(dim=1)
            scale = torch.where(
                (weight_norm > 0) & (grad_norm > 0), self.trust * weight_norm / grad_norm, torch.ones_like(grad_norm)
            )
            grad = grad * _per_member(scale, grad)
        velocity = self.state["momentum"][name].mul_(self.momentum).add_(grad)
        param.sub_(rate * velocity)


OPTIMIZERS: dict[str, type[StackOptimizer]] = {"adamw": AdamW, "sgd": SGD, "lars": LARS}
