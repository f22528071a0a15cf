"""Readouts that need no training loop: fixed vectors with a converged linear model, the encoder's own pooler, nearest
neighbours."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from cenote.ops.masked import masked_mean
from cenote.probe.cost import median_ms
from cenote.probe.feed import Feed
from cenote.probe.knn import knn_grid, knn_scores
from cenote.probe.linear import LinearFit, fit_linear
from cenote.probe.outcome import Outcome
from cenote.probe.plan import Candidate, Host
from cenote.probe.tasks import Objective
from cenote.probe.train import select_tokens
from cenote.types import Features, TokenChoice

IN_MEMORY = 2**28
KNN_NEIGHBOURS = (5, 10, 15, 20, 50, 100, 200)


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
    """``read`` applied to every item in order, ``(items, width)``: in RAM up to 256 MB, beyond that in a file without
    a name."""
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
) -> Outcome | None:
    """Fit a candidate without parameters, ``"encoder_pooler"`` or ``"knn"``; ``None`` where this backbone or task has
    none."""
    start = time.perf_counter()
    if job == "knn":
        return _knn(train, validation, test, objective, host, start)
    candidate = job if isinstance(job, Candidate) else None
    if candidate is None and not train.store.pooled_dim:
        return None
    pooling = None if candidate is None else candidate.make(host.dim).eval()

    def read(features: Features) -> Tensor:
        if candidate is None or pooling is None:
            assert features.pooled is not None
            return features.pooled
        return pooling._pool(*select_tokens(features, candidate, host.uniform))[0]

    parts = [vectors(feed, read) for feed in (train, validation, test)]
    fit = fit_linear(parts[0], train.targets, parts[1], validation.targets, objective)
    head = linear_head(fit)
    outcome = Outcome(
        readout="encoder_pooler" if candidate is None else candidate.readout,
        layers=(train.layers[-1],) if candidate is None else candidate.layers,
        tokens="both" if candidate is None else candidate.tokens,
        candidate=candidate, pooling=pooling, head=head,
        predictions=objective.predictions(head(parts[2]).detach())[None],
        validation=fit.validation, params=fit.weight.numel() + fit.bias.numel(), seconds=time.perf_counter() - start,
        regularisation=fit.penalty,
    )  # fmt: skip
    if candidate is None:
        outcome.macs = fit.weight.numel()
        outcome.latency_ms = median_ms(lambda: head(parts[2][:32])) / len(parts[2][:32])
    return outcome


def _knn(train: Feed, validation: Feed, test: Feed, objective: Objective, host: Host, start: float) -> Outcome | None:
    """Cosine nearest neighbours of mean tokens of the last layer; neighbours and temperature chosen on the validation
    part."""
    if objective.task != "classification":
        return None
    choice: TokenChoice = "patches" if host.modality == "image" else "both"

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
    return Outcome(
        readout="knn", layers=(train.layers[-1],), tokens=choice, candidate=None, pooling=None, head=None,
        predictions=predictions, validation=best.top1, params=0, seconds=time.perf_counter() - start, macs=bank.numel(),
        latency_ms=latency,
    )  # fmt: skip
