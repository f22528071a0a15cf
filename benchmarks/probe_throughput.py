"""The probe's stacks against training the same heads one after the other in plain torch, from the same cached features.

The peer of a readout is ``Sequential(pooling in its published order of operations, BatchNorm1d, Linear)`` with
``torch.optim.AdamW``, one head after the other; ours is one stack of all members of the default grid, learning rates x query
factors x seeds. Both start from the same weights and see the same batches. Two members are trained as peers, in turn with the stack,
and the peer's time is that of one member-step times the number of members. Equal scores: the losses of those two after the timed steps
must agree. Readouts without a published form have our own module as their peer ("own module"); those without
parameters have scikit-learn's LogisticRegression over the same penalties.

Two outcomes: the learned-query readouts at the shapes of a ViT-S and a ViT-B (the smallest ratio), and the whole grid at the
shape of the embedded default (sum of the times of every readout).
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common import finish
from published import published
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from cenote.probe.heads import BN_EPS
from cenote.probe.linear import PENALTIES, fit_linear
from cenote.probe.plan import Candidate, Host, plan
from cenote.probe.tasks import Objective
from cenote.probe.train import Group, Schedule, select_tokens
from cenote.types import Features, Grid

# dim, patch grid, layers, classes, batch size
SHAPES = {"digits": (64, (4, 4), 4, 10, 32), "vit-s": (384, (14, 14), 1, 100, 32), "vit-b": (768, (14, 14), 1, 100, 32)}
LEARNED_QUERIES = ("efficient_probing", "aim", "cae", "cait", "coca", "jepa", "siglip")
STEPS, WARMUP, TRAIN_ITEMS = 612, 61, 1080  # of the default probe on the digits


class Peer:
    """One head in plain torch."""

    def __init__(self, pooling: nn.Module, queries: list[nn.Parameter], group: Group, index: int) -> None:
        member, width = group.stack.members[index], group.stack.template.out_dim
        head = nn.Linear(width, group.objective.outputs)
        head.load_state_dict(
            {key: group.stack.params[f"head.{key}"][index].detach().clone() for key in ("weight", "bias")}
        )
        self.model = nn.Sequential(pooling, nn.BatchNorm1d(width, affine=False, eps=BN_EPS), head).train()
        others = [p for p in self.model.parameters() if not any(p is q for q in queries)]
        groups = [{"params": others}, {"params": queries}]
        self.rates = [member.lr, member.lr * member.query_factor]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0)

    def step(self, tokens: Tensor, targets: Tensor, schedule: float) -> float:
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * schedule
        loss = F.cross_entropy(self.model(tokens), targets)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())


def contest(
    candidate: Candidate, dim: int, objective: Objective, batches: list[tuple[Features, Tensor]]
) -> dict[str, Any]:
    """Train the stack and two peers in turn; milliseconds a step and the largest difference of losses at the end."""
    group = Group.create(candidate, dim, objective, Schedule(1, 1.0, len(batches[0][1])), True)
    chosen = sorted({0, len(candidate.members) - 1})
    peers, kind = [], "published order"
    for index in range(len(candidate.members)):
        pair = published(candidate, dim, candidate.members[index].seed)
        if pair is None:
            kind, ours = "own module", candidate.make(dim)
            theirs: nn.Module = copy.deepcopy(ours)
            queries = [theirs.get_parameter(name) for name in ours.query_parameters]
        else:
            theirs, ours = pair
            queries = theirs.queries()
        with torch.no_grad():
            for name, parameter in ours.named_parameters():
                group.stack.params[f"pooling.{name}"][index].copy_(parameter)
        if index in chosen:
            peers.append(Peer(theirs, queries, group, index))
    ours_times, peer_times = [], []
    for number, (features, targets) in enumerate(batches, start=1):
        rate = number / WARMUP
        tokens, _ = select_tokens(features, candidate, True)
        start = time.perf_counter()
        losses = group.step(features, targets, rate)
        middle = time.perf_counter()
        theirs_losses = [peer.step(tokens, targets, rate) for peer in peers]
        ours_times.append(middle - start)
        peer_times.append((time.perf_counter() - middle) / len(peers))
    difference = float(np.abs(losses[chosen].numpy() - theirs_losses).max())
    if not difference < 0.02 * max(1.0, *theirs_losses):
        raise RuntimeError(f"{candidate.readout}: losses {losses[chosen].tolist()} of the stack, {theirs_losses} of the peers")
    members = len(candidate.members)
    ours, peer = (1e3 * statistics.median(times[2:]) for times in (ours_times, peer_times))
    return {
        "readout": candidate.readout, "peer": kind, "members": members, "ours ms/member-step": ours / members,
        "peer ms/member-step": peer, "ratio": peer * members / ours, "loss difference": difference,
        "ours s": ours * STEPS / 1e3, "peer s": peer * members * STEPS / 1e3,
    }  # fmt: skip


def contest_free(candidate: Candidate, dim: int, objective: Objective, parts: list[tuple[Features, Tensor]]) -> dict[str, Any]:
    """The converged linear model against scikit-learn's, over the same penalties; the difference is that of validation scores."""
    pooling = candidate.make(dim)
    train, validation = (pooling._pool(select_tokens(f, candidate, True)[0], None)[0] for f, _ in parts)
    train_targets, validation_targets = (targets for _, targets in parts)
    start = time.perf_counter()
    fit = fit_linear(train, train_targets, validation, validation_targets, objective)
    middle = time.perf_counter()
    scaled = [((v - fit.mean) / fit.std).numpy() for v in (train, validation)]
    scores = []
    for penalty in PENALTIES:
        model = LogisticRegression(C=1 / (penalty * len(train)), max_iter=500)
        scores.append(model.fit(scaled[0], train_targets.numpy()).score(scaled[1], validation_targets.numpy()))
    ours, peer = middle - start, time.perf_counter() - middle
    return {
        "readout": candidate.readout, "peer": "LogisticRegression", "members": len(PENALTIES), "ratio": peer / ours,
        "score difference": max(scores) - fit.validation, "ours s": ours, "peer s": peer,
    }  # fmt: skip


def features(items: int, shape: str, seed: int) -> tuple[Features, Tensor]:
    """Noise around a mean for each class."""
    dim, grid, layers, classes, _ = SHAPES[shape]
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(classes, 1, 1, dim, generator=torch.Generator().manual_seed(0))
    targets = torch.randint(classes, (items,), generator=generator)
    tokens = grid[0] * grid[1] + 1
    hidden = 0.5 * means[targets] + torch.randn(items, layers, tokens, dim, generator=generator)
    mask = torch.ones(items, tokens, dtype=torch.bool)
    return Features(hidden, mask, tuple(range(1, layers + 1)), Grid(*grid), 1), targets


def run(shape: str, steps: int, only: list[str] | None) -> list[dict[str, Any]]:
    """A row for each readout of the default grid at one shape; the learned-query ones at the large shapes."""
    dim, grid, layers, classes, batch = SHAPES[shape]
    host = Host(dim, tuple(range(1, layers + 1)), Grid(*grid), 1, "image", True)
    wanted = "all" if shape == "digits" else list(LEARNED_QUERIES)
    objective = Objective("classification", classes)
    batches = [features(batch, shape, seed) for seed in range(1, steps + 1)]
    rows = []
    for candidate in plan(wanted, host, layers, (layers,), "auto", 3, None, None):
        if only and candidate.readout not in only:
            continue
        if candidate.members:
            row = contest(candidate, dim, objective, batches)
        else:
            row = contest_free(candidate, dim, objective, [features(n, shape, 0) for n in (TRAIN_ITEMS, 120)])
        goal = 8 if shape != "digits" else None
        rows.append({"shape": shape, **row, "goal": goal})
        print({k: (round(v, 3) if isinstance(v, float) else v) for k, v in rows[-1].items()}, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, action="append")
    parser.add_argument("--readout", action="append")
    options, _ = parser.parse_known_args()
    rows = []
    for shape in options.shape or SHAPES:
        rows += run(shape, 12 if shape == "digits" else 6, options.readout)
    print("TOTAL", sum(r["ours s"] for r in rows), sum(r["peer s"] for r in rows), sum(r["peer s"] for r in rows)/sum(r["ours s"] for r in rows))


if __name__ == "__main__":
    main()
