"""Many copies of one readout trained side by side: stacked parameters, shared reads of the tokens."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from cenote.ops.masked import widen
from cenote.ops.query_attention import Read, attend
from cenote.pooling.base import Pooling, Prepared, Query, QueryPooling

Stack = dict[str, Tensor]

BN_EPS, BN_MOMENTUM = 1e-6, 0.1


@dataclass(frozen=True)
class Member:
    """One model of a stack: its learning rate, the factor on its learned queries' rate, and its seed."""

    lr: float
    query_factor: float
    seed: int


class _Method(nn.Module):
    """Lets ``functional_call`` reach a method other than ``forward``."""

    def __init__(self, pooling: Pooling, call: Callable[..., Any]) -> None:
        super().__init__()
        self.pooling, self.call = pooling, call

    def forward(self, *args: Any) -> Any:
        return self.call(self.pooling, *args)


class StackedReadout(nn.Module):
    """``members`` copies of pooling, batch norm without affine parameters, and a linear head.

    Parameters live in :attr:`params` with a leading member axis: ``pooling.<name>``, ``head.weight``
    ``(members, outputs, width)``, ``head.bias``. A :class:`~cenote.pooling.base.QueryPooling` reads the tokens once for
    all members (their effective queries side by side in one attention); any other pooling is vmapped over its
    parameters.

    Args:
        make: builds one pooling; called once a member under the member's seed.
        members: what each copy is.
        outputs: width of the head (classes, or 1 for regression).
    """

    def __init__(self, make: Callable[[], Pooling], members: list[Member], outputs: int) -> None:
        super().__init__()
        poolings, heads = [], []
        for member in members:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(member.seed)
                poolings.append(make())
                heads.append(nn.Linear(poolings[-1].out_dim, outputs))
        self.members = list(members)
        self.template = poolings[0]
        self.shared_read = isinstance(self.template, QueryPooling) and self.template.single_read
        params, buffers = stack_module_state(poolings) if any(True for _ in self.template.parameters()) else ({}, {})
        self.params: Stack = {f"pooling.{name}": p.detach().clone().requires_grad_() for name, p in params.items()}
        self.params["head.weight"] = torch.stack([h.weight.detach() for h in heads]).requires_grad_()
        self.params["head.bias"] = torch.stack([h.bias.detach() for h in heads]).requires_grad_()
        width = self.template.out_dim
        self.stats: Stack = {name: b.detach().clone() for name, b in buffers.items()}
        self.stats = {f"pooling.{name}": b for name, b in self.stats.items()}
        self.stats["norm.mean"] = torch.zeros(len(members), width)
        self.stats["norm.var"] = torch.ones(len(members), width)

    def _pooling_state(self) -> tuple[Stack, Stack]:
        cut = len("pooling.")
        params = {name[cut:]: p for name, p in self.params.items() if name.startswith("pooling.")}
        buffers = {name[cut:]: b for name, b in self.stats.items() if name.startswith("pooling.")}
        return params, buffers

    def pool(self, tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Vectors ``(members, batch, width)`` and, for a shared read, weights ``(members, batch, queries, tokens)``."""
        params, buffers = self._pooling_state()
        if not self.shared_read:
            return self._vmapped(params, buffers, tokens, mask), None
        pooling: QueryPooling = self.template  # type: ignore[assignment]
        prepared = pooling.prepare(tokens, mask)
        there: list[bool] = []

        def present(pooling: QueryPooling, prepared: Prepared) -> tuple[Tensor, ...]:
            """The query without its ``None`` fields, which vmap cannot return."""
            query = pooling.query(prepared)
            there[:] = (part is not None for part in query)
            return tuple(part for part in query if part is not None)

        parts = iter(_over_members(pooling, present, params, (prepared,), (None,)))
        query = Query(*(_side_by_side(next(parts)) if known else None for known in there))  # type: ignore[arg-type]
        read = attend(query.queries, prepared.keys, prepared.values, mask, query.bias, query.extra)
        members = len(self.members)
        apart = Read(*(None if part is None else _apart(part, members) for part in read))  # type: ignore[arg-type]
        pooled = _over_members(
            pooling, lambda p, *rest: p.finish(Read(*rest[:-1]), rest[-1]), params,
            (*apart, prepared), (*(None if part is None else 0 for part in apart), None),
        )  # fmt: skip
        return pooled, apart.weights

    def _vmapped(self, params: Stack, buffers: Stack, tokens: Tensor, mask: Tensor | None) -> Tensor:
        if not params:
            vector = self.template._pool(tokens, mask)[0]
            return vector.expand(len(self.members), *vector.shape)
        method = _Method(self.template, lambda p, t, m: p._pool(t, m)[0])
        state = ({f"pooling.{k}": v for k, v in params.items()}, {f"pooling.{k}": v for k, v in buffers.items()})

        def call(p: Stack, b: Stack) -> Tensor:
            return functional_call(method, (p, b), (tokens, mask))

        return vmap(call, randomness="different")(*state)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Outputs of every member, ``(members, batch, outputs)``; training mode uses and tracks batch statistics."""
        pooled, _ = self.pool(tokens, mask)
        return torch.baddbmm(self.params["head.bias"][:, None], self._norm(pooled), self.params["head.weight"].mT)

    def _norm(self, pooled: Tensor) -> Tensor:
        pooled = widen(pooled)
        if not self.training:
            mean, var = self.stats["norm.mean"][:, None], self.stats["norm.var"][:, None]
            return (pooled - mean) * (var + BN_EPS).rsqrt()
        # One fused batch norm over the channels of all members.
        members, batch, width = pooled.shape
        flat = pooled.transpose(0, 1).reshape(batch, members * width)
        tracked = self.stats["norm.mean"].view(-1), self.stats["norm.var"].view(-1)
        normed = torch.batch_norm(flat, None, None, *tracked, True, BN_MOMENTUM, BN_EPS, False)
        return normed.view(batch, members, width).transpose(0, 1)

    def train(self, mode: bool = True) -> StackedReadout:
        super().train(mode)
        self.template.train(mode)
        return self

    def state(self) -> Stack:
        """A copy of every parameter and statistic, each with a leading member axis."""
        shared = {} if not self.shared_read else dict(self.template.named_buffers())
        stats = {
            name: shared[name[8:]].expand_as(t) if name.startswith("pooling.") and name[8:] in shared else t
            for name, t in self.stats.items()
        }
        return {name: t.detach().clone() for name, t in {**self.params, **stats}.items()}

    @torch.no_grad()
    def load(self, state: Stack) -> None:
        """Take over what :meth:`state` returned."""
        for name, tensor in {**self.params, **self.stats}.items():
            tensor.copy_(state[name])
        if self.shared_read:
            for name, buffer in self.template.named_buffers():
                buffer.copy_(state[f"pooling.{name}"][0])

    def keep(self, indices: list[int]) -> None:
        """Go on with these members only."""
        index = torch.tensor(indices)
        self.members = [self.members[i] for i in indices]
        self.params = {name: p.detach()[index].requires_grad_() for name, p in self.params.items()}
        self.stats = {name: s[index] for name, s in self.stats.items()}

    def member(self, state: Stack, index: int) -> tuple[Pooling, nn.BatchNorm1d, nn.Linear]:
        """One member of a :meth:`state` as plain modules in eval mode."""
        pooling = copy.deepcopy(self.template)
        own = {name[8:]: t[index] for name, t in state.items() if name.startswith("pooling.")}
        pooling.load_state_dict(own)
        norm = nn.BatchNorm1d(pooling.out_dim, eps=BN_EPS, momentum=BN_MOMENTUM, affine=False)
        norm.running_mean.copy_(state["norm.mean"][index])  # type: ignore[union-attr]
        norm.running_var.copy_(state["norm.var"][index])  # type: ignore[union-attr]
        head = nn.Linear(pooling.out_dim, state["head.bias"].shape[1])
        head.load_state_dict({"weight": state["head.weight"][index], "bias": state["head.bias"][index]})
        return pooling.eval(), norm.eval(), head.eval()


def _over_members(pooling: Pooling, call: Callable[..., Any], params: Stack, args: tuple, dims: tuple) -> Any:
    """``call(pooling, *args)`` for every member of ``params``; ``dims`` as in vmap, ``None`` for what members share."""
    method = _Method(pooling, call)
    named = {f"pooling.{name}": p for name, p in params.items()}
    if not named:
        raise TypeError(f"{type(pooling).__name__} has no parameters to stack")
    return vmap(lambda p, *rest: functional_call(method, p, rest), in_dims=(0, *dims), randomness="different")(
        named, *args
    )


def _side_by_side(stacked: Tensor) -> Tensor:
    """``(members, queries, n)`` to ``(members * queries, n)``; ``(members, batch, queries, n)`` to ``(batch, ...)``."""
    return stacked.flatten(0, 1) if stacked.ndim == 3 else stacked.transpose(0, 1).flatten(1, 2)


def _apart(read: Tensor, members: int) -> Tensor:
    """``(batch, members * queries, n)`` to ``(members, batch, queries, n)``."""
    return read.unflatten(1, (members, -1)).transpose(0, 1)
