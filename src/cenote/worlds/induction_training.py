"""Training of many small attention-only networks at once, at a fraction of the plain form's work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from cenote.worlds.context_classification import ContextClassification, LabelledContexts
from cenote.worlds.induction import (
    InductionNetwork,
    context_label_accuracy,
    item_label_association,
    label_places,
    matching_labels,
    target_item_label_association,
    target_label_attention,
)

State = dict[str, Tensor]


def stacked_logits(
    state: State, inputs: Float[Tensor, "runs batch tokens width"]
) -> Float[Tensor, "runs batch labels"]:
    """Logits of networks whose weights are stacked along a leading axis: :class:`InductionNetwork` of one or two heads.

    The same function with a third of the work. Only the last token is asked for, so the last layer has one query, its
    scores are ``h_j . w`` with ``w = K^T Q h_last``, and it reads ``V sum_j a_j h_j``: its keys and values are never
    formed. The first layer leaves ``h_j = x_j + V c_j`` with ``c = A x``, which meets vectors alone: ``h w = x w + A (x
    V^T w)`` and ``a h = a x + V (a A) x``, so its values are not formed either. What is left for every token is one
    product with ``K^T Q``.
    """
    runs, batch, tokens, width = inputs.shape
    x, last = inputs.flatten(0, 1), inputs[:, :, -1]
    heads = sum(name.endswith(".q") for name in state)
    if heads == 1:
        wanted = last @ (state["attn.0.q"].mT @ state["attn.0.k"])
        weights = (wanted.reshape(-1, 1, width) @ x.mT).softmax(dim=-1)
        return _answer(state, last + (weights @ x).view(runs, batch, width) @ state["attn.0.v"].mT)
    if heads != 2:
        raise ValueError(f"expected networks of one or two heads, got {heads}")
    value, read = state["attn.0.v"], state["attn.1.v"]
    # Keys in rows, queries in columns: the softmax over rows of so few tokens is many times faster than over columns.
    later = torch.full((tokens, tokens), float("-inf"), dtype=x.dtype, device=x.device).tril(-1)
    keyed = (inputs.flatten(1, 2) @ (state["attn.0.k"].mT @ state["attn.0.q"])).view(x.shape)
    first = torch.baddbmm(later, keyed, x.mT).softmax(dim=1)
    last = last + (x.mT @ first[:, :, -1:]).view(runs, batch, width) @ value.mT
    circuit = state["attn.1.q"].mT @ state["attn.1.k"]
    wanted = (last @ torch.cat([circuit, circuit @ value], dim=-1)).view(runs * batch, 2, width)
    own, through = torch.bmm(wanted, x.mT).split(1, dim=1)
    second = torch.baddbmm(own, through, first).softmax(dim=-1)
    seen = torch.cat([second, second @ first.mT], dim=1) @ x
    return _answer(state, last + seen.view(runs, batch, 2 * width) @ torch.cat([read.mT, (read @ value).mT], dim=1))


def _answer(state: State, last: Tensor) -> Tensor:
    layer = 0
    while f"mlp.{layer}.weight" in state:
        last = torch.baddbmm(state[f"mlp.{layer}.bias"][..., None], last, state[f"mlp.{layer}.weight"].mT).relu()
        layer += 1
    return last @ state["readout.weight"].mT


@torch.no_grad()
def sgd_step(parameters: list[Tensor], gradients: tuple[Tensor, ...], lr: float, decay: float) -> None:
    """In place ``theta <- (1 - decay) theta - lr gradient``: the decay is not scaled by the rate."""
    torch._foreach_mul_(parameters, 1 - decay)
    torch._foreach_add_(parameters, gradients, alpha=-lr)


@dataclass(frozen=True)
class InductionRuns:
    """What :func:`train_induction` gives.

    Attributes:
        worlds: the stream of each run, with its own seed.
        networks: one trained network a run.
        steps: updates done at each evaluation.
        measures: by name ``(evaluations, runs)``: ``loss``, ``accuracy``, ``cla``, ``ila1``, ``tila2``, ``tla2`` on
            fresh classes, ``iw`` and ``ic2`` (accuracies) where asked for. Networks of one layer have no ``ila1``.
    """

    worlds: tuple[ContextClassification, ...]
    networks: tuple[InductionNetwork, ...]
    steps: tuple[int, ...]
    measures: dict[str, Float[Tensor, "evaluations runs"]]

    def first(self, name: str, reached: float, below: bool = False) -> list[float]:
        """First step, by run, at which a measure is at least (or at most) a value; infinity if never."""
        values = self.measures[name]
        there = values <= reached if below else values >= reached
        return [
            next((float(s) for s, yes in zip(self.steps, run, strict=True) if yes), float("inf")) for run in there.T
        ]

    def at(self, name: str, steps: Sequence[float]) -> list[float]:
        """The measure of each run at its own step; NaN for a step without an evaluation."""
        rows = {step: row for row, step in enumerate(self.steps)}
        return [
            self.measures[name][rows[int(step)], run].item() if step in rows else float("nan")
            for run, step in enumerate(steps)
        ]


def train_induction(
    world: ContextClassification,
    steps: int,
    *,
    seeds: Sequence[int] = (0,),
    batch: int = 128,
    lr: float = 0.03,
    decay: float = 1e-6,
    layers: int = 2,
    every: int = 250,
    items: int = 2000,
    memory: bool = False,
    ahead: int = 16,
) -> InductionRuns:
    """Plain SGD on the target's cross-entropy, all seeds at once along a leading axis.

    A seed decides class means, label vectors, initial weights and batches of its run, which does not depend on the
    others.

    Args:
        world: its own ``seed`` is replaced by each of ``seeds``.
        every: updates between evaluations on fixed sequences.
        items: sequences of each evaluation set.
        memory: also measure accuracy on training classes without (``iw``) and with shifted (``ic2``) labels in context.
        ahead: batches that are drawn together.
    """
    worlds = [replace(world, seed=seed) for seed in seeds]
    # Class means, weights, batches and evaluation sets come from seeds kept apart.
    networks = [
        InductionNetwork.for_world(each, layers, torch.Generator().manual_seed(1_000_003 * (each.seed + 1) + 4))
        for each in worlds
    ]
    state = {
        name: torch.stack([network.state_dict()[name] for network in networks]) for name in networks[0].state_dict()
    }
    parameters = list(state.values())
    for parameter in parameters:
        parameter.requires_grad_()
    streams = [each.batches(batch, 1_000_003 * (each.seed + 1), ahead) for each in worlds]
    tests = [_evaluation_sets(each, items, memory) for each in worlds]
    records: list[list[dict[str, float]]] = []
    done = []
    for step in range(steps + 1):
        if step % every == 0 or step == steps:
            _unstack(state, networks)
            records.append([_measure(*pair) for pair in zip(networks, tests, strict=True)])
            done.append(step)
        if step == steps:
            break
        if step % ahead == 0:
            blocks = [next(stream) for stream in streams]
            inputs, targets = (torch.stack([block[part] for block in blocks], dim=1) for part in (0, 1))
        logits = stacked_logits(state, inputs[step % ahead])
        # The sum over runs of each run's mean: no run's gradient knows of the others.
        loss = F.cross_entropy(logits.flatten(0, 1), targets[step % ahead].flatten(), reduction="sum") / batch
        sgd_step(parameters, torch.autograd.grad(loss, parameters), lr, decay)
    names = records[0][0]
    measures = {name: torch.tensor([[run[name] for run in row] for row in records]) for name in names}
    return InductionRuns(tuple(worlds), tuple(networks), tuple(done), measures)


def _evaluation_sets(world: ContextClassification, items: int, memory: bool) -> dict[str, LabelledContexts]:
    sets = {"ic": world.in_context().sample(items, 1_000_003 * (world.seed + 1) + 1)}
    if memory:
        sets["iw"] = world.in_weights().sample(items, 1_000_003 * (world.seed + 1) + 2)
        sets["ic2"] = world.in_context_shifted().sample(items, 1_000_003 * (world.seed + 1) + 3)
    return sets


@torch.no_grad()
def _measure(network: InductionNetwork, tests: dict[str, LabelledContexts]) -> dict[str, float]:
    test = tests["ic"]
    logits, attention, _ = network.trace(test.inputs)
    labels = label_places(test.inputs.shape[1])
    found = {
        "loss": F.cross_entropy(logits, test.targets),
        "accuracy": (logits.argmax(dim=1) == test.targets).float().mean(),
        "cla": context_label_accuracy(logits, test.labels),
        "tila2": target_item_label_association(attention[-1], matching_labels(test.classes)),
        "tla2": target_label_attention(attention[-1], labels),
    }
    if len(attention) > 1:
        found["ila1"] = item_label_association(attention[0], labels)
    for name in ("iw", "ic2"):
        if name in tests:
            found[name] = (network(tests[name].inputs).argmax(dim=1) == tests[name].targets).float().mean()
    return {name: value.item() for name, value in found.items()}


def _unstack(state: State, networks: Sequence[InductionNetwork]) -> None:
    for run, network in enumerate(networks):
        network.load_state_dict({name: weights[run].detach() for name, weights in state.items()})
