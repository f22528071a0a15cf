"""In-context regression: our training of three networks at once against the model as written, one seed at a time.

A step is drawing 256 prompts of 40 pairs and one update of Adam. The peer draws prompt by prompt, maps every token by
K, V and O of each of four heads in turn, and updates with torch's default Adam. The run's time is that of 6000 steps
of three seeds on all cores, whose goal is one minute.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from common import finish
from torch import Tensor, nn

from cenote.worlds.linear_regression import LinearRegression
from cenote.worlds.regression_attention import RegressionAttention, fit_regression

WORLD, HEADS, BATCH, SEEDS, MINUTES = LinearRegression(), 4, 256, (0, 1, 2), 1.0


class Plain(nn.Module):
    """Heads one after the other, every product formed for every token."""

    def __init__(self) -> None:
        super().__init__()
        width = WORLD.features + 1
        self.heads = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(width, width, bias=False) for name in ("key", "query", "value", "output")})
            for _ in range(HEADS)
        )

    def forward(self, context: Tensor, query: Tensor) -> Tensor:
        answer = torch.zeros_like(query)
        for head in self.heads:
            scores = (head["key"](context) @ head["query"](query)[:, :, None]).squeeze(-1)
            mixed = (scores.softmax(dim=-1)[:, None] @ head["value"](context)).squeeze(1)
            answer = answer + head["output"](mixed)
        return answer[:, -1]


def looped_batch(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Prompts one after the other."""
    contexts, queries, targets = [], [], []
    for _ in range(BATCH):
        beta = torch.randn(WORLD.features, generator=generator) * WORLD.features**-0.5
        x = torch.randn(WORLD.length + 1, WORLD.features, generator=generator)
        y = x @ beta + WORLD.noise**0.5 * torch.randn(WORLD.length + 1, generator=generator)
        contexts.append(torch.cat([x[:-1], y[:-1, None]], dim=1))
        queries.append(torch.cat([x[-1], torch.zeros(1)]))
        targets.append(y[-1])
    return torch.stack(contexts), torch.stack(queries), torch.stack(targets)


def plain_run(steps: int) -> None:
    """One network trained as written."""
    model, generator = Plain(), torch.Generator().manual_seed(0)
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        context, query, target = looped_batch(generator)
        loss = (model(context, query) - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6000, help="steps of the whole run")
    parser.add_argument("--peer-steps", type=int, default=40, help="steps of the peer, scaled to a step")
    parser.add_argument("--repeats", type=int, default=3, help="rounds in which ours and the peer's steps alternate")
    options, _ = parser.parse_known_args()
    short = max(16, options.peer_steps)

    def ours(steps: int) -> None:
        fit_regression(RegressionAttention(WORLD.features, HEADS, seeds=SEEDS), WORLD, steps, batch=BATCH)

    own, peer = [], []
    plain_run(2)  # what is loaded on first use is no part of a step
    ours(16)
    for _ in range(options.repeats):
        own.append(seconds(lambda: ours(short)) / short / len(SEEDS))
        peer.append(seconds(lambda: plain_run(options.peer_steps)) / options.peer_steps)
    run = seconds(lambda: ours(options.steps))
    rows = [
        {
            "threads": torch.get_num_threads(),
            "steps": options.steps,
            "seeds": len(SEEDS),
            "run s": run,
            "goal s": 60 * MINUTES,
            "within goal": "yes" if run <= 60 * MINUTES * options.steps / 6000 else "no",
            "ours ms a step and seed": 1e3 * min(own),
            "peer ms a step": 1e3 * min(peer),
        }
    ]
    finish(
        "icl_regression: a step of training",
        "model as written, looped generator",
        5.0,
        rows,
        min(peer) / min(own),
        __doc__,
    )


if __name__ == "__main__":
    main()
