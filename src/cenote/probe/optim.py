"""Optimisers for stacks of models: every parameter has a leading member axis, every member its own learning rate.

The updates are those of the usual optimisers, member by member; only the learning rate is a vector. Gradients come in
as a dict of the same names. State tensors are created on the first step.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from itertools import groupby

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
        self._update(grads, schedule)

    @abstractmethod
    def _update(self, grads: Stack, schedule: float) -> None: ...

    def rate(self, name: str) -> Tensor:
        """Base learning rate of each member for one parameter, ``(members,)``."""
        return self.lr * self.factors[name] if name in self.factors else self.lr

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
    """AdamW (Loshchilov and Hutter, 2019), betas 0.9 and 0.999, eps 1e-8.

    torch's fused kernel passes over the memory once, but knows one learning rate a call: members that stand next to
    each other and share a rate go through it together.
    """

    slots = ("exp_avg", "exp_avg_sq")
    betas, eps = (0.9, 0.999), 1e-8

    def _update(self, grads: Stack, schedule: float) -> None:
        pieces: dict[tuple[float, bool], list[tuple[str, slice]]] = {}
        for name in grads:
            decays = self.params[name].ndim > 2
            for rate, members in _runs(self.rate(name)):
                pieces.setdefault((rate, decays), []).append((name, members))
        for (rate, decays), own in pieces.items():
            count = torch.full((), float(self.steps), device=self.params[own[0][0]].device)
            # The kernel takes tensors for contiguous without asking.
            torch._fused_adamw_(
                [self.params[n][m].detach() for n, m in own], [grads[n][m].contiguous() for n, m in own],
                [self.state["exp_avg"][n][m] for n, m in own], [self.state["exp_avg_sq"][n][m] for n, m in own],
                [], [count] * len(own), lr=rate * schedule, beta1=self.betas[0], beta2=self.betas[1],
                weight_decay=self.weight_decay if decays else 0.0, eps=self.eps, amsgrad=False, maximize=False,
            )  # fmt: skip


def _runs(rates: Tensor) -> list[tuple[float, slice]]:
    """Stretches of members with one rate: ``[0.1, 0.1, 0.3]`` to ``[(0.1, 0:2), (0.3, 2:3)]``."""
    runs, start = [], 0
    for rate, group in groupby(rates.tolist()):
        stop = start + len(list(group))
        runs.append((rate, slice(start, stop)))
        start = stop
    return runs


class _Momentum(StackOptimizer):
    """Momentum 0.9 on gradients that a subclass prepares."""

    slots = ("momentum",)
    momentum = 0.9

    def _update(self, grads: Stack, schedule: float) -> None:
        for name, grad in grads.items():
            param = self.params[name]
            velocity = self.state["momentum"][name].mul_(self.momentum).add_(self._prepared(param, grad))
            param.sub_(_per_member(self.rate(name) * schedule, grad) * velocity)

    @abstractmethod
    def _prepared(self, param: Tensor, grad: Tensor) -> Tensor: ...


class SGD(_Momentum):
    """Stochastic gradient descent with momentum 0.9."""

    def _prepared(self, param: Tensor, grad: Tensor) -> Tensor:
        return grad + self.weight_decay * param if self.weight_decay and param.ndim > 2 else grad


class LARS(_Momentum):
    """Layer-wise adaptive rate scaling (You et al., 2017) as used for linear probes.

    Tensors with at least two axes: ``g <- (g + wd p) * trust |p| / |g|`` (factor 1 if a norm is 0), norms taken for
    each member by itself; then momentum 0.9. One-axis tensors get neither decay nor scaling.
    """

    trust = 0.001

    def _prepared(self, param: Tensor, grad: Tensor) -> Tensor:
        if param.ndim <= 2:
            return grad
        grad = grad + self.weight_decay * param
        weight_norm, grad_norm = param.flatten(1).norm(dim=1), grad.flatten(1).norm(dim=1)
        known = (weight_norm > 0) & (grad_norm > 0)
        scale = torch.where(known, self.trust * weight_norm / grad_norm, torch.ones_like(grad_norm))
        return grad * _per_member(scale, grad)


OPTIMIZERS: dict[str, type[StackOptimizer]] = {"adamw": AdamW, "sgd": SGD, "lars": LARS}
