"""The in-context classification stream: items and labels in turn, then an item whose label is asked for."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from cenote.worlds.base import World


class LabelledContexts(NamedTuple):
    """A batch of sequences ``x_1, l_1, ..., x_N, l_N, x_target``.

    Attributes:
        inputs: one-hot positions in front of the contents, ``(batch, 2 * pairs + 1, width)``.
        targets: the label asked for, ``(batch,)``.
        classes: class of each item, the target's last, ``(batch, pairs + 1)``; fresh classes are numbered from
            ``num_classes`` on.
        labels: label of each pair in the context, ``(batch, pairs)``.
    """

    inputs: Float[Tensor, "batch tokens width"]
    targets: Int[Tensor, "batch"]
    classes: Int[Tensor, "batch items"]
    labels: Int[Tensor, "batch pairs"]


@dataclass(frozen=True)
class ContextClassification(World[LabelledContexts]):
    """A few-shot stream that can be solved by copying a label of the context or by knowing the classes by heart.

    Class k has mean ``mu_k ~ N(0, I / dim)`` and label ``k mod num_labels``; labels have vectors ``~ N(0, I / dim)``;
    both are fixed by ``seed``. An item is ``(mu_k + noise e) / sqrt(1 + noise^2)`` with a fresh ``e ~ N(0, I / dim)``.

    *Bursty* sequences show ``pairs / burstiness`` classes ``burstiness`` times each, and ask for one of them. In the
    others the classes of items and target are drawn independently from ``P(k) ~ (k + 1)^(-zipf)``. *Fresh* sequences
    are bursty ones of 128 (``num_fresh``) classes drawn anew for the batch, which only the context can solve.
    From "The mechanistic basis of data dependence and abrupt learning in an in-context classification task"
    (arXiv 2312.03002), whose stream it is; fresh classes number themselves from ``num_classes`` on.

    Args:
        num_classes: classes K, a multiple of the labels.
        num_labels: labels L.
        pairs: item-label pairs N of the context.
        dim: width D of items and labels.
        max_pairs: longest context; one-hot positions are ``2 * max_pairs + 1`` wide, and the sequence begins at any of
            them that leaves it room.
        burstiness: copies B of each class in a bursty sequence; 0 for no bursty sequences of training classes.
        p_bursty: share of bursty sequences among those of training classes.
        p_fresh: share of sequences made of fresh classes.
        noise: within-class spread.
        zipf: exponent of the class frequencies.
        distinct_labels: classes of a bursty sequence have different labels, drawn without regard to the frequencies;
            ``False`` draws them by frequency, without repetition.
        label_shift: training classes carry label ``k + label_shift``, in the context and as targets: knowledge of
            the classes is then wrong.
        exclude_target: sequences that are not bursty never show the target's class.
        num_fresh: fresh classes of a batch, a multiple of the labels.
        seed: of class means and label vectors.

    Raises:
        ValueError: a setting out of its range or that does not divide what it must.
    """

    name: ClassVar[str] = "context_classification"
    predictor: ClassVar[str] = "label of the nearest item in the context, or of the nearest class"
    num_classes: int = 256
    num_labels: int = 32
    pairs: int = 8
    dim: int = 63
    max_pairs: int = 32
    burstiness: int = 1
    p_bursty: float = 1.0
    p_fresh: float = 0.0
    noise: float = 0.1
    zipf: float = 0.0
    distinct_labels: bool = True
    label_shift: int = 0
    exclude_target: bool = False
    num_fresh: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.num_classes, self.num_labels, self.pairs, self.dim, self.num_fresh) < 1:
            raise ValueError(f"sizes must be at least 1, got {self}")
        if self.pairs > self.max_pairs:
            raise ValueError(f"pairs must be at most max_pairs, got {self.pairs} > {self.max_pairs}")
        if self.num_classes % self.num_labels or self.num_fresh % self.num_labels:
            raise ValueError(
                f"num_labels must divide num_classes and num_fresh, got {self.num_labels} for {self.num_classes} and "
                f"{self.num_fresh}"
            )
        if not (0 <= self.p_bursty <= 1 and 0 <= self.p_fresh <= 1):
            raise ValueError(f"p_bursty and p_fresh must lie in 0..1, got {self.p_bursty} and {self.p_fresh}")
        if not (0 <= self.noise < math.inf and 0 <= self.zipf < math.inf):
            raise ValueError(f"noise and zipf cannot be negative, got {self.noise} and {self.zipf}")
        if self.burstiness < 0 or self.burstiness >= self.pairs or (self.burstiness and self.pairs % self.burstiness):
            raise ValueError(
                f"burstiness must divide pairs and be smaller, or 0; got {self.burstiness} for {self.pairs} pairs"
            )
        if self.burstiness == 0 and self.p_fresh > 0:
            raise ValueError("fresh classes come in bursts only: burstiness=0 needs p_fresh=0")
        bound, what = (
            (self.num_labels, "labels") if self.distinct_labels else (min(self.num_classes, self.num_fresh), "classes")
        )
        if self.shown > bound:
            raise ValueError(f"{self.shown} classes in a sequence cannot be different among {bound} {what}")

    @property
    def shown(self) -> int:
        """Distinct classes of a bursty sequence, ``pairs / burstiness``."""
        return self.pairs // self.burstiness if self.burstiness else 1

    @property
    def tokens(self) -> int:
        """Tokens of a sequence."""
        return 2 * self.pairs + 1

    @property
    def positions(self) -> int:
        """Width of the one-hot positions."""
        return 2 * self.max_pairs + 1

    @property
    def width(self) -> int:
        """Width of a token: positions, then content."""
        return self.positions + self.dim

    @cached_property
    def _vectors(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        drawn = torch.randn(self.num_classes + self.num_labels, self.dim, generator=generator) * self.dim**-0.5
        return drawn[: self.num_classes], drawn[self.num_classes :]

    @property
    def class_means(self) -> Float[Tensor, "classes dim"]:
        """Means of the training classes."""
        return self._vectors[0]

    @property
    def label_vectors(self) -> Float[Tensor, "labels dim"]:
        """Content of each label's token."""
        return self._vectors[1]

    @cached_property
    def _frequencies(self) -> Tensor:
        return torch.arange(1, self.num_classes + 1, dtype=torch.float64).pow(-self.zipf)

    def in_context(self) -> ContextClassification:
        """The evaluation IC: fresh classes alone."""
        return dataclasses.replace(self, burstiness=self.burstiness or 1, p_bursty=1.0, p_fresh=1.0)

    def in_context_shifted(self) -> ContextClassification:
        """The evaluation IC2: training classes whose labels have all moved on by one."""
        return dataclasses.replace(self, burstiness=self.burstiness or 1, p_bursty=1.0, p_fresh=0.0, label_shift=1)

    def in_weights(self) -> ContextClassification:
        """The evaluation IW: a target whose class the context does not show (excluded, where the paper leaves it to
        chance)."""
        return dataclasses.replace(self, p_bursty=0.0, p_fresh=0.0, exclude_target=True)

    def _sample(self, size: int, generator: torch.Generator) -> LabelledContexts:
        batch = self._batches(1, size, generator)
        return LabelledContexts(*(part[0] for part in batch))

    def batches(self, size: int, seed: int, ahead: int = 16) -> Iterator[LabelledContexts]:
        """Blocks of ``ahead`` batches without end, ``(ahead, batch, ...)``: a call draws them for little more than one.

        Each batch of a block has fresh classes of its own.
        """
        if size < 1 or ahead < 1:
            raise ValueError(f"expected at least one item and one batch, got {size} and {ahead}")
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield LabelledContexts(*self._batches(ahead, size, generator))

    def _batches(self, count: int, size: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """``count`` batches along a leading axis."""
        shape = (count, size)
        kind = torch.rand(*shape, 2, generator=generator)
        fresh = kind[..., 0] < self.p_fresh
        bursty = fresh | (kind[..., 1] < (self.p_bursty if self.burstiness else 0.0))
        classes = torch.zeros(*shape, self.pairs + 1, dtype=torch.long)
        if bool(bursty.any()):
            among = torch.where(fresh, self.num_fresh, self.num_classes)
            drawn = self._distinct(shape, among, generator)
            # Each class B times, shuffled; the target is what stands at a random place.
            order = torch.rand(*shape, self.pairs, generator=generator).argsort(dim=-1)
            context = drawn.repeat_interleave(self.burstiness, dim=-1).gather(-1, order)
            place = torch.randint(self.pairs, (*shape, 1), generator=generator)
            classes = torch.cat([context, context.gather(-1, place)], dim=-1)
        if not bool(bursty.all()):
            classes = torch.where(bursty[..., None], classes, self._independent(shape, generator))
        labels = (classes + torch.where(fresh, 0, self.label_shift)[..., None]) % self.num_labels
        means = self.class_means.expand(count, -1, -1)
        if self.p_fresh > 0:
            new = torch.randn(count, self.num_fresh, self.dim, generator=generator) * self.dim**-0.5
            means = torch.cat([means, new], dim=1)
            classes = classes + torch.where(fresh, self.num_classes, 0)[..., None]
        offset = torch.randint(self.positions - self.tokens + 1, shape, generator=generator)
        inputs = self._tokens(means, classes, labels[..., :-1], offset, generator)
        return inputs, labels[..., -1], classes, labels[..., :-1]

    def _tokens(
        self, means: Tensor, classes: Tensor, labels: Tensor, offset: Tensor, generator: torch.Generator
    ) -> Tensor:
        inputs = torch.zeros(*offset.shape, self.tokens, self.width)
        content = inputs[..., self.positions :]
        batch = torch.arange(len(means))[:, None, None]
        items = torch.randn(*classes.shape, self.dim, generator=generator)
        items = items.mul_(self.noise * self.dim**-0.5).add_(means[batch, classes])
        content[..., ::2, :] = items.mul_((1 + self.noise**2) ** -0.5)
        content[..., 1::2, :] = self.label_vectors[labels]
        place = offset[..., None] + torch.arange(self.tokens)
        inputs.scatter_(-1, place[..., None], 1.0)
        return inputs

    def _distinct(self, shape: tuple[int, int], among: Tensor, generator: torch.Generator) -> Tensor:
        """``shown`` different classes for each sequence, numbered below its entry of ``among``."""
        if self.distinct_labels:
            label = torch.rand(*shape, self.num_labels, generator=generator).argsort(dim=-1)[..., : self.shown]
            each = (among // self.num_labels)[..., None]
            within = (torch.rand(label.shape, generator=generator) * each).long()
            return label + self.num_labels * within
        # A race: the first to arrive at rates P(k) are a draw by frequency without repetition.
        most = max(self.num_classes, self.num_fresh)
        number = torch.arange(most)
        weight = torch.full((most,), 1.0)
        weight[: self.num_classes] = self._frequencies.float()
        trained = among == self.num_classes
        wait = -torch.rand(*shape, most, generator=generator).clamp_min(1e-30).log()
        arrival = wait / torch.where(trained[..., None], weight, 1.0)
        return arrival.masked_fill(number >= among[..., None], math.inf).topk(self.shown, largest=False).indices

    def _independent(self, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
        cumulative = self._frequencies.cumsum(0)
        uniform = torch.rand(*shape, self.pairs + 1, generator=generator, dtype=torch.float64)
        classes = torch.searchsorted(cumulative, uniform * cumulative[-1], right=True).clamp_max(self.num_classes - 1)
        while self.exclude_target and bool((again := classes[..., :-1] == classes[..., -1:]).any()):
            if self._frequencies[1:].sum() < 1e-6:
                raise ValueError(f"all but one class are too rare to keep it out of the context (zipf={self.zipf})")
            fresh = torch.rand(*shape, self.pairs, generator=generator, dtype=torch.float64)
            drawn = torch.searchsorted(cumulative, fresh * cumulative[-1], right=True)
            classes[..., :-1] = torch.where(again, drawn.clamp_max(self.num_classes - 1), classes[..., :-1])
        return classes

    def best(self, batch: LabelledContexts) -> Int[Tensor, "batch"]:
        """Label read off the inputs: of the nearest item in the context, or of the class whose mean is nearer still.

        Two items of a class lie apart by twice the squared distance of an item from its mean, and are compared so.
        """
        items, labels = batch.inputs[:, ::2, self.positions :], batch.inputs[:, 1::2, self.positions :]
        target, context = items[:, -1], items[:, :-1]
        away, nearest = (context - target[:, None]).square().sum(dim=-1).min(dim=1)
        shown = labels[torch.arange(len(labels)), nearest]
        copied = torch.cdist(shown, self.label_vectors).argmin(dim=1)
        shrink = (1 + self.noise**2) ** -0.5
        apart, known = torch.cdist(target, shrink * self.class_means).min(dim=1)
        known = (known + self.label_shift) % self.num_labels
        return torch.where(away / 2 < apart.square(), copied, known)


class ContextClassificationDataset(IterableDataset[LabelledContexts]):
    """Endless batches of a :class:`ContextClassification` for a ``DataLoader(dataset, batch_size=None)``.

    Each worker draws a stream of its own.
    """

    def __init__(self, world: ContextClassification, batch: int = 128, seed: int = 0) -> None:
        self.world, self.batch, self.seed = world, batch, seed

    def __iter__(self) -> Iterator[LabelledContexts]:
        worker = get_worker_info()
        # Streams of workers and of neighbouring seeds must not meet.
        seed = self.seed if worker is None else self.seed + (worker.id + 1) * 1_000_003
        return self.world.stream(self.batch, seed)
