"""Contrastive training of a readout on stored tokens, through sentence-transformers' trainer."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from cenote.data.judged import Judgement
from cenote.pooling.base import Pooling
from cenote.tuning.embedding_examples import Examples, Negatives, examples_of, mine


@dataclass(frozen=True)
class ContrastiveSettings:
    """Two stages of contrastive training, as NV-Embed (arXiv 2405.17428) trains, sized for heads on frozen tokens.

    Attributes:
        steps: optimiser steps of the first and second stage; 0 leaves a stage out.
        in_batch: whether documents of other rows count as wrong, in each stage.
        batch_size: queries a batch, each with its positive and its negatives.
        num_negatives: hard negatives a query.
        lr: learning rate of the first stage.
        second_lr: factor on ``lr`` in the second stage (published: 1.5e-5 after 2e-5).
        query_factor: factor on the rate of learned queries, which else hardly move under Adam.
        temperature: divides the cosines.
        positive_margin: a hard negative's similarity must stay below this fraction of the positive's.
        similar: pairs judged at least this share of the largest value are positives (0.8: 4 of 5).
        dissimilar: pairs judged above this share of the largest value are never negatives of each other.
        warmup: share of a stage's steps in which the rate rises.
        weight_decay: of AdamW, on matrices.
        candidates: at most so many documents are encoded to find hard negatives among, drawn by the seed.
        encode_batch: items pooled at a time when there is nothing to train.
        evaluations: how often ``evaluate`` is called in each stage, its end included; once more before the first.
        seed: of every random choice.
    """

    steps: tuple[int, int] = (200, 100)
    in_batch: tuple[bool, bool] = (True, False)
    batch_size: int = 32
    num_negatives: int = 4
    lr: float = 3e-4
    second_lr: float = 0.75
    query_factor: float = 10.0
    temperature: float = 0.05
    positive_margin: float = 0.95
    similar: float = 0.8
    dissimilar: float = 0.4
    warmup: float = 0.1
    weight_decay: float = 0.01
    candidates: int = 20_000
    encode_batch: int = 256
    evaluations: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.steps) < 0 or max(self.steps) < 1:
            raise ValueError(f"steps must be two numbers of at least 0, one above 0, got {self.steps}")
        for name in ("batch_size", "num_negatives", "candidates", "encode_batch", "evaluations"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("lr", "second_lr", "query_factor", "temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not 0 < self.positive_margin <= 1:
            raise ValueError(f"positive_margin must lie in (0, 1], got {self.positive_margin}")
        if not 0 <= self.dissimilar <= self.similar <= 1:
            raise ValueError(f"expected 0 <= dissimilar <= similar <= 1, got {self.dissimilar} and {self.similar}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup is a share of the steps, in [0, 1), got {self.warmup}")


def train_embedding(
    pooling: Pooling,
    read: Callable[[Tensor], tuple[Tensor, Tensor | None]],
    judgement: Judgement,
    settings: ContrastiveSettings | None = None,
    *,
    evaluate: Callable[[Pooling], float] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Pooling:
    """Train a pooling so that what was judged to belong together comes close together.

    Before each stage every query is given hard negatives by the pooling's own present vectors: the most similar
    documents below ``positive_margin`` of the positive's similarity that are not known to be relevant. The first stage
    also counts documents of other rows as wrong, unless they are known to be relevant to the query; the second, where
    rows may share a label, only a query's own negatives. Sources: NV-Embed (arXiv 2405.17428) for stages, data and
    filter. Otherwise than there, the scores of the filter come from the model under training instead of a teacher.

    Args:
        pooling: where to start; itself it is left as it is.
        read: item numbers ``(items,)`` to tokens ``(items, tokens, dim)`` (or hidden states, for poolings that read
            all layers) and mask ``(items, tokens)`` or ``None``.
        judgement: pairs, relevance or labels; see :func:`cenote.tuning.embedding_examples.examples_of`.
        settings: of the training; ``None`` takes the defaults.
        evaluate: a score of a pooling, the larger the better, on data that is not trained on. The best state seen
            (the start included) is returned; without it, the last.
        progress: called as ``progress(done, total)`` behind every step.

    Returns:
        A trained copy in eval mode.

    Raises:
        ValueError: a pooling without trainable parameters, a judgement without any positive.
        ImportError: sentence-transformers is missing.
    """
    settings = ContrastiveSettings() if settings is None else settings
    if not any(p.requires_grad for p in pooling.parameters()):
        raise ValueError(f"{type(pooling).__name__} has no trainable parameter: there is nothing to train")
    from cenote.tuning.embedding_trainer import Collate, parameter_groups, train_stage

    pooling = copy.deepcopy(pooling)
    examples = examples_of(judgement, settings.similar, settings.dissimilar)
    best = _Best(pooling, evaluate)
    total, done = sum(settings.steps), 0
    best.look()
    for stage, (steps, in_batch) in enumerate(zip(settings.steps, settings.in_batch, strict=True)):
        if not steps:
            continue
        seed = settings.seed + stage
        hard = _mine(pooling, read, examples, settings) if examples.mined else None
        looks = {steps * (i + 1) // settings.evaluations for i in range(settings.evaluations)}

        def after_step(step: int, looks: set[int] = looks, before: int = done) -> None:
            if step in looks:
                best.look()
            if progress is not None:
                progress(before + step, total)

        rate = settings.lr * (1.0 if stage == 0 else settings.second_lr)
        with _own_randomness():
            train_stage(
                pooling, read, Collate(examples, hard, settings.num_negatives, in_batch, seed), steps=steps,
                batch_size=settings.batch_size, temperature=settings.temperature, warmup=settings.warmup, seed=seed,
                groups=parameter_groups(pooling, rate, settings.query_factor, settings.weight_decay),
                after_step=after_step,
            )  # fmt: skip
        done += steps
    return best.restore().eval()


class _Best:
    """Keeps the state that scored highest."""

    def __init__(self, pooling: Pooling, evaluate: Callable[[Pooling], float] | None) -> None:
        self.pooling, self.evaluate = pooling, evaluate
        self.score, self.state = float("-inf"), None if evaluate is None else pooling.state_dict()

    def look(self) -> None:
        if self.evaluate is None:
            return
        training = self.pooling.training
        with _own_randomness(), torch.no_grad():
            score = self.evaluate(self.pooling.eval())
        self.pooling.train(training)
        if score > self.score:
            self.score, self.state = score, copy.deepcopy(self.pooling.state_dict())

    def restore(self) -> Pooling:
        if self.state is not None:
            self.pooling.load_state_dict(self.state)
        return self.pooling


def _mine(
    pooling: Pooling,
    read: Callable[[Tensor], tuple[Tensor, Tensor | None]],
    examples: Examples,
    settings: ContrastiveSettings,
) -> Negatives:
    rng = np.random.default_rng(settings.seed)
    documents = examples.candidates
    if len(documents) > settings.candidates:
        documents = rng.choice(documents, settings.candidates, replace=False)
    items = np.unique(np.concatenate([*examples.draw(np.arange(len(examples)), rng), documents]))
    vectors = embed(pooling, read, items, settings.encode_batch)
    return mine(examples, items, vectors, top_k=settings.num_negatives, margin=settings.positive_margin)


@torch.no_grad()
def embed(
    pooling: Pooling,
    read: Callable[[Tensor], tuple[Tensor, Tensor | None]],
    items: Int[np.ndarray, "items"],
    batch_size: int = 256,
) -> Float[Tensor, "items dim"]:
    """Vectors of items by number, in eval mode and without a graph, on the pooling's device."""
    device = next((p.device for p in pooling.parameters()), torch.device("cpu"))
    training, vectors = pooling.training, []
    pooling.eval()
    try:
        for numbers in torch.from_numpy(np.ascontiguousarray(items)).split(batch_size):
            tokens, mask = read(numbers)
            vectors.append(pooling(tokens.to(device), None if mask is None else mask.to(device)))
    finally:
        pooling.train(training)
    return torch.cat(vectors)


@contextmanager
def _own_randomness() -> Iterator[None]:
    """The caller's random state, whatever is seeded inside, is as before afterwards."""
    states = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
