"""Readouts that need no training loop: fixed vectors with a converged linear model, the encoder's own pooler, nearest neighbours."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cenote.ops.masked import masked_mean
from cenote.probe.cost import latency_ms
from cenote.probe.feed import Feed
from cenote.probe.knn import knn_grid, knn_scores
from cenote.probe.linear import LinearFit, fit_linear
from cenote.probe.plan import Candidate, Host
from cenote.probe.tasks import Objective
from cenote.probe.train import select_tokens
from cenote.types import Features

IN_MEMORY = 2**28
KNN_NEIGHBOURS = (5, 10, 15, 20, 50, 100, 200)


@dataclass
class Fitted:
    """What :class:`cenote.probe.run.Outcome` needs of a readout fitted here; predictions have one seed, the fit being exact."""

    key: str
    readout: str
    layers: tuple[int, ...]
    tokens: str
    candidate: Candidate | None
    pooling: nn.Module | None
    head: nn.Module | None
    predictions: np.ndarray
    validation: float
    params: int
    seconds: float
    regularisation: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)


def linear_head(fit: LinearFit) -> nn.Sequential:
    """A linear fit as standardisation and linear layer, in eval mode."""
    width, outputs = fit.weight.shape[1], fit.weight.shape[0]
    norm = nn.BatchNorm1d(width, eps=0.0, affine=False)
    norm.running_mean.copy_(fit.mean)  # type: ignore[union-attr]
    norm.running_var.copy_(fit.std.square())  # type: ignore[union-attr]
    linear = nn.Linear(width, outputs)
    linear.load_state_dict({"weight": fit.weight, "bias": fit.bias})
    return nn.Sequential(norm, linear).eval()


@torch.no_grad()
def vectors(feed: Feed, read: Callable[[Features], Tensor]) -> Tensor:
    """``read`` applied to every item in order, ``(items, width)``: in RAM up to 256 MB, beyond that in a file without a name."""
    result: Tensor | None = None
    start = 0
    for features, _ in feed.batches(512):
        piece = read(features).float().cpu()
        if result is None:
            shape = (len(feed), piece.shape[1])
            if 4 * shape[0] * shape[1] <= IN_MEMORY:
                result = torch.empty(shape)
            else:
                with tempfile.TemporaryFile() as spill:
                    result = torch.from_numpy(np.memmap(spill, np.float32, "w+", shape=shape))
        result[start : start + len(piece)] = piece
        start += len(piece)
    assert result is not None
    return result


def fit_free(
    job: Candidate | str, train: Feed, validation: Feed, test: Feed, objective: Objective, host: Host
) -> Fitted | None:
    """Fit a candidate without parameters, ``"encoder_pooler"`` or ``"knn"``; ``None`` where this backbone or task has none."""
    start = time.perf_counter()
    if job == "knn":
        return _knn(train, validation, test, objective, host, start)
    if isinstance(job, Candidate):
        candidate = job
        pooling = candidate.make(host.dim).eval()

        def read(features: Features) -> Tensor:
            return pooling._pool(*select_tokens(features, candidate, host.uniform))[0]

        names: tuple = (candidate.key, candidate.readout, candidate.layers, candidate.tokens, candidate, pooling)
    elif train.store.pooled_dim:
        layer = (train.layers[-1],)
        names = (f"encoder_pooler | {layer[0]} | both", "encoder_pooler", layer, "both", None, None)

        def read(features: Features) -> Tensor:
            assert features.pooled is not None
            return features.pooled
    else:
        return None
    parts = [vectors(feed, read) for feed in (train, validation, test)]
    fit = fit_linear(parts[0], train.targets, parts[1], validation.targets, objective)
    head = linear_head(fit)
    predictions = objective.predictions(head(parts[2]).detach())[None]
    params, seconds = fit.weight.numel() + fit.bias.numel(), time.perf_counter() - start
    extra = {"converged": fit.converged}
    if names[4] is None:
        extra |= {"macs": fit.weight.numel(), "latency_ms": latency_ms(_Identity(), head, parts[2][:32], None)}
    return Fitted(*names, head, predictions, fit.validation, params, seconds, fit.penalty, extra)


class _Identity(nn.Module):
    """Stands in for a pooling when the encoder did the pooling."""

    def _pool(self, vectors: Tensor, mask: Tensor | None) -> tuple[Tensor, None]:
        return vectors, None


def _knn(train: Feed, validation: Feed, test: Feed, objective: Objective, host: Host, start: float) -> Fitted | None:
    """Cosine nearest neighbours of mean tokens of the last layer; neighbours and temperature chosen on the validation part."""
    if objective.task != "classification":
        return None
    choice = "patches" if host.modality == "image" else "both"

    def read(features: Features) -> Tensor:
        tokens, mask = features.tokens(choice)
        return masked_mean(tokens, None if host.uniform else mask)

    bank, val, held_out = (vectors(feed, read) for feed in (train, validation, test))
    neighbours = [k for k in KNN_NEIGHBOURS if k <= len(bank)] or [len(bank)]
    settings = knn_grid(bank, train.targets, val, validation.targets, neighbours, num_classes=objective.outputs)
    best = max(settings, key=lambda setting: setting.top1)
    begin = time.perf_counter()
    scores = knn_scores(bank, train.targets, held_out, best.k, best.temperature, objective.outputs)
    latency = (time.perf_counter() - begin) * 1e3 / len(held_out)
    predictions = (scores / scores.sum(dim=1, keepdim=True)).numpy()[None]
    layer = train.layers[-1]
    extra = {"macs": bank.numel(), "latency_ms": latency, "k": best.k, "temperature": best.temperature}
    seconds = time.perf_counter() - start
    return Fitted(
        f"knn | {layer} | {choice}", "knn", (layer,), choice, None, None, None, predictions, best.top1, 0, seconds, None, extra
    )
