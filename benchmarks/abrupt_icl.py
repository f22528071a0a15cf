"""The abrupt transition: our training of three networks at once against the module as written and a looped generator.

A step of training is drawing a batch and updating on it, at the small setting (9 tokens of width 48, batches of 128).
The peer trains one network at a time: sequences are drawn one after the other, all keys, queries and values of both
layers are formed for every token, and torch's SGD updates. Both are timed by step and by seed; the run's time is that
of 8000 steps of three seeds on all cores, whose goal is two minutes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from common import finish
from torch import Tensor

from cenote.worlds.context_classification import ContextClassification
from cenote.worlds.induction import InductionNetwork
from cenote.worlds.induction_training import train_induction

WORLD = ContextClassification(num_classes=128, num_labels=16, pairs=4, dim=31, max_pairs=8, p_fresh=0.8)
SEEDS, MINUTES = (0, 1, 2), 2.0


def looped_batch(world: ContextClassification, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sequences of the same stream (B = 1, distinct labels), one after the other."""
    scale = (1 + world.noise**2) ** -0.5
    fresh_means = torch.randn(world.num_fresh, world.dim, generator=generator) * world.dim**-0.5
    inputs, targets = [], []
    for _ in range(size):
        fresh = torch.rand((), generator=generator) < world.p_fresh
        means = fresh_means if fresh else world.class_means
        labels = torch.randperm(world.num_labels, generator=generator)[: world.pairs].tolist()
        each = len(means) // world.num_labels
        classes = [label + world.num_labels * int(torch.randint(each, (), generator=generator)) for label in labels]
        place = int(torch.randint(world.pairs, (), generator=generator))
        offset = int(torch.randint(world.positions - world.tokens + 1, (), generator=generator))
        rows = []
        for k, label in zip([*classes, classes[place]], [*labels, None], strict=True):
            noise = torch.randn(world.dim, generator=generator) * world.dim**-0.5
            rows.append(scale * (means[k] + world.noise * noise))
            if label is not None:
                rows.append(world.label_vectors[label])
        position = torch.eye(world.positions)[offset : offset + world.tokens]
        inputs.append(torch.cat([position, torch.stack(rows)], dim=1))
        targets.append(labels[place])
    return torch.stack(inputs), torch.tensor(targets)


def plain_run(steps: int, seed: int) -> None:
    """One network trained as written."""
    world, generator = replace(WORLD, seed=seed), torch.Generator().manual_seed(seed)
    network = InductionNetwork.for_world(world)
    optimiser = torch.optim.SGD(network.parameters(), lr=0.03, weight_decay=1e-6 / 0.03)
    for _ in range(steps):
        inputs, targets = looped_batch(world, 128, generator)
        loss = F.cross_entropy(network(inputs), targets)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


def plain_updates(steps: int) -> None:
    """The updates alone, on one batch."""
    network = InductionNetwork.for_world(WORLD)
    optimiser = torch.optim.SGD(network.parameters(), lr=0.03, weight_decay=1e-6 / 0.03)
    batch = WORLD.sample(128, 0)
    for _ in range(steps):
        optimiser.zero_grad()
        F.cross_entropy(network(batch.inputs), batch.targets).backward()
        optimiser.step()


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8000, help="steps of the whole run")
    parser.add_argument("--peer-steps", type=int, default=40, help="steps of the peer, scaled to a step")
    parser.add_argument("--repeats", type=int, default=3, help="rounds in which ours and the peer's steps alternate")
    options, _ = parser.parse_known_args()
    ours, peer, updates, stream, looped = [], [], [], [], []
    generator = torch.Generator().manual_seed(0)
    short = max(16, options.peer_steps)
    plain_run(2, 0)  # what is loaded on first use is no part of a step
    train_induction(WORLD, 16, seeds=SEEDS, items=1)
    for _ in range(options.repeats):
        ours.append(seconds(lambda: train_induction(WORLD, short, seeds=SEEDS, every=short, items=1)) / short / 3)
        peer.append(seconds(lambda: plain_run(options.peer_steps, 0)) / options.peer_steps)
        updates.append(seconds(lambda: plain_updates(short)) / short)
        blocks = WORLD.batches(128, 0)
        stream.append(seconds(lambda: next(blocks)) / 16)  # noqa: B023
        looped.append(seconds(lambda: looped_batch(WORLD, 128, generator)))
    run = seconds(lambda: train_induction(WORLD, options.steps, seeds=SEEDS))
    ratio = min(peer) / min(ours)
    rows = [
        {
            "threads": torch.get_num_threads(),
            "steps": options.steps,
            "seeds": len(SEEDS),
            "run s": run,
            "goal s": 60 * MINUTES,
            "within goal": "yes" if run <= 60 * MINUTES * options.steps / 8000 else "no",
            "ours ms a step and seed": 1e3 * min(ours),
            "peer ms a step": 1e3 * min(peer),
            "plain update ms": 1e3 * min(updates),
            "batch ms": 1e3 * min(stream),
            "looped batch ms": 1e3 * min(looped),
        }
    ]
    finish("abrupt_icl: a step of training", "module as written, looped generator", 10.0, rows, ratio, __doc__)


if __name__ == "__main__":
    main()
