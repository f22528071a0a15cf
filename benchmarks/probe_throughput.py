"""The probe's stacks against training the same heads one after the other in plain torch, from the same cached features.

The peer of a readout is ``Sequential(pooling in its published order of operations, BatchNorm1d, Linear)`` with
``torch.optim.AdamW``, one head after the other; ours is one stack of all members of the default grid, learning rates x
query factors x seeds. Both start from the same weights and see the same batches, in the warm-up of the default
schedule. Two members are trained as peers, in turn with the stack; the peer's time is that of one member-step times the
number of members. Equal scores: after the timed steps the losses of those two must agree with the stack's. Readouts
without a published form have our own module as their peer ("own module"); those without parameters have scikit-learn's
LogisticRegression over the same penalties. The column "with halving" counts that the probe drops the weaker half of the
learning rates twice. The peer trains them all to the end, so that is not the same work, and a rate that would have come
out best late can be lost: the goals are about the ratio without it.

Two outcomes: the learned-query readouts at the shape of a ViT-B (the smallest ratio; the ViT-S is in the table too),
and the whole grid at the shape of the embedded default, all groups together as the probe trains them.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common import finish
from published import published
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from cenote.allocator import keep_freed_memory
from cenote.probe.heads import BN_EPS
from cenote.probe.linear import PENALTIES, fit_linear
from cenote.probe.parallel import side_by_side
from cenote.probe.plan import Candidate, Host, plan
from cenote.probe.tasks import Objective
from cenote.probe.train import Group, Schedule, select_tokens
from cenote.types import Features, Grid

# dim, patch grid, layers, classes, batch size
SHAPES = {
    "vit-s": (384, (14, 14), 1, 100, 32), "vit-b": (768, (14, 14), 1, 100, 32), "digits": (64, (4, 4), 4, 10, 32)
}  # fmt: skip
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


Batch = tuple[Features, Tensor]
Row = dict[str, Any]


def contest(candidate: Candidate, dim: int, objective: Objective, batches: list[Batch]) -> tuple[Group, Row]:
    """Train the stack and two peers in turn; the stack, and the times and the largest difference of losses."""
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
        raise RuntimeError(f"{candidate.readout}: losses {losses[chosen].tolist()}, of the peers {theirs_losses}")
    members = len(candidate.members)
    ours, peer = (1e3 * statistics.median(times[2:]) for times in (ours_times, peer_times))
    ratio = peer * members / ours
    return group, {
        "readout": candidate.readout, "peer": kind, "members": members, "ours ms/member-step": ours / members,
        "peer ms/member-step": peer, "ratio": ratio, "with halving": ratio / halved(candidate),
        "loss difference": difference, "ours s": ours * STEPS / 1e3, "peer s": peer * members * STEPS / 1e3,
    }  # fmt: skip


def halved(candidate: Candidate) -> float:
    """The share of all member-steps that is left when the weaker half of the rates is dropped at the pruning points."""
    total = left = len({(m.lr, m.query_factor) for m in candidate.members})
    done = share = 0.0
    for point in (*Schedule(1, 1.0).prune_at, 1.0):
        share += (point - done) * left / total
        done, left = point, math.ceil(left / 2)
    return share


def contest_free(candidate: Candidate, dim: int, objective: Objective, parts: list[Batch]) -> Row:
    """The converged linear model against scikit-learn's, over the same penalties; validation scores are compared."""
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


def features(items: int, shape: str, seed: int) -> Batch:
    """Noise around a mean for each class."""
    dim, grid, layers, classes, _ = SHAPES[shape]
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(classes, 1, 1, dim, generator=torch.Generator().manual_seed(0))
    targets = torch.randint(classes, (items,), generator=generator)
    tokens = grid[0] * grid[1] + 1
    hidden = 0.5 * means[targets] + torch.randn(items, layers, tokens, dim, generator=generator)
    mask = torch.ones(items, tokens, dtype=torch.bool)
    return Features(hidden, mask, tuple(range(1, layers + 1)), Grid(*grid), 1), targets


def run(shape: str, steps: int, only: list[str] | None) -> tuple[list[Row], float]:
    """A row for each readout of the default grid (the learned-query ones at the large shapes), and the ratio of all."""
    dim, grid, layers, classes, batch = SHAPES[shape]
    host = Host(dim, tuple(range(1, layers + 1)), Grid(*grid), 1, "image", True)
    wanted = "all" if shape == "digits" else list(LEARNED_QUERIES)
    objective = Objective("classification", classes)
    batches = [features(batch, shape, seed) for seed in range(1, steps + 1)]
    rows, groups = [], []
    for candidate in plan(wanted, host, layers, (layers,), "auto", 3, None, None):
        if only and candidate.readout not in only:
            continue
        if candidate.members:
            group, row = contest(candidate, dim, objective, batches)
            groups.append(group)
        else:
            row = contest_free(candidate, dim, objective, [features(n, shape, 0) for n in (TRAIN_ITEMS, 120)])
        rows.append({"shape": shape, **row, "goal": None if shape == "digits" else 8})
    return rows, sum(row["peer s"] for row in rows) / (together(groups, batches) + sum_free(rows))


def together(groups: list[Group], batches: list[Batch]) -> float:
    """Seconds of all steps when the groups are trained together, as the probe does."""
    times = []
    with side_by_side(len(groups)) as every:
        for data, targets in batches:
            start = time.perf_counter()
            list(every(partial(Group.step, features=data, targets=targets, rate=1 / WARMUP), groups))
            times.append(time.perf_counter() - start)
    return STEPS * statistics.median(times[2:])


def sum_free(rows: list[Row]) -> float:
    """Our seconds for the readouts without parameters."""
    return sum(row["ours s"] for row in rows if row["peer"] == "LogisticRegression")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--shape", choices=SHAPES, action="append", help="only these shapes")
    parser.add_argument("--readout", action="append", help="only these readouts")
    options = parser.parse_args()
    shapes = options.shape or list(SHAPES)
    keep_freed_memory()  # as cenote probe does; the peer runs in the same process
    outcomes = []

    def tell(name: str, peer: str, goal: float, rows: list[Row], value: float) -> None:
        finish(name, peer, goal, rows, value)
        outcomes.append({"name": name, "peer": peer, "ratio": value, "goal": goal, "rows": rows})

    learned = [row for shape in shapes if shape != "digits" for row in run(shape, 6, options.readout)[0]]
    if learned:
        judged = [row["ratio"] for row in learned if row["shape"] == learned[-1]["shape"]]
        tell(
            f"probe: learned-query readouts, smallest ratio at {learned[-1]['shape']}",
            "published order of operations, one head after the other",
            8,
            learned,
            min(judged),
        )
    if "digits" in shapes:
        rows, value = run("digits", 12, options.readout)
        tell("probe: whole default grid on the digits", "the same heads one after the other", 3, rows, value)
        rest = [row for row in rows if row["readout"] != "coca"]
        print(
            f"of the peer's time CoCa takes {1 - sum(r['peer s'] for r in rest) / sum(r['peer s'] for r in rows):.0%}"
        )
    if options.json:
        options.json.write_text(json.dumps(outcomes, indent=2) + "\n")


if __name__ == "__main__":
    if "OMP_WAIT_POLICY" not in os.environ:
        # Waiting threads that spin make either side many times slower on few cores; read when torch loads.
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "OMP_WAIT_POLICY": "passive"})
    main()
