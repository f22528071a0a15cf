"""What is computed for one shard of a feature store, in this process or on another machine."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cenote.backbones.base import Backbone, LayerReducer
from cenote.data.base import Split
from cenote.data.judged import JudgedData
from cenote.probe.files import join
from cenote.probe.loading import Augment, load_items
from cenote.probe.manifest import Layout, Shard
from cenote.probe.shards import write_shard
from cenote.types import Features


class Job(NamedTuple):
    """A shard to be made: its number, its first item, and the item after its last."""

    number: int
    first: int
    end: int


class Done(NamedTuple):
    """A shard that has been written."""

    number: int
    shard: Shard
    layout: Layout


@dataclass(frozen=True)
class Work:
    """Everything a shard is computed from; any process that sees ``folder`` can make any shard.

    Attributes:
        backbone: the network; ``None`` on the way to a process that loads it itself.
        folder: the store, a plain path or an fsspec URL.
        layers: hidden states to keep.
        The others are as in :func:`cenote.probe.extract.extract`.
    """

    backbone: Backbone | None
    split: Split | JudgedData
    folder: str
    layers: tuple[int, ...]
    dtype: torch.dtype
    batch_size: int
    view: int = 0
    augment: Augment | None = None
    reduce: LayerReducer | None = None
    num_workers: int = 0

    def items(self, first: int, stop: int) -> Generator[Any, None, None]:
        """Raw items, augmented."""
        ahead = 2 * self.batch_size
        return load_items(
            self.split, first, stop, view=self.view, augment=self.augment, workers=self.num_workers, ahead=ahead
        )

    def rows(self, items: Iterator[Any], first: int, stop: int) -> Rows:
        """Features of the next ``stop - first`` items of an iterator that stands at item ``first``."""
        assert self.backbone is not None
        batch = self.backbone.collate(list(islice(items, stop - first)))
        return Rows.of(self.backbone(batch, self.layers, self.reduce), self.dtype, self.split.ids[first:stop])

    def shard(
        self,
        job: Job,
        layout: Layout | None = None,
        items: Iterator[Any] | None = None,
        limit: int | None = None,
        on_items: Callable[[int], Any] = lambda items: None,
    ) -> Done:
        """Compute and write one shard.

        Args:
            job: which.
            layout: of the shards that are there already.
            items: an iterator that stands at ``job.first``, where several shards are made in a row.
            limit: bytes at which the shard ends before ``job.end``, with the batch that brings it there.
            on_items: called after every batch with the items of the shard so far.

        Raises:
            ValueError: features that must not be stored, or that change shape.
            OSError: the file could not be written; no partial file is left.
        """
        if items is None:
            with closing(self.items(job.first, job.end)) as items:
                return self.shard(job, layout, items, limit, on_items)
        batches: list[Rows] = []
        at, size = job.first, 0
        while at < job.end and (limit is None or size < limit):
            stop = min(at + self.batch_size, job.end)
            rows = self.rows(items, at, stop)
            layout = rows.layout if layout is None else layout
            same_layout(rows.layout, layout)
            batches.append(rows)
            at, size = stop, size + rows.nbytes
            on_items(at - job.first)
        assert layout is not None
        return Done(job.number, _write(self.folder, job.number, job.first, batches), layout)


Elsewhere = Callable[[Work, Sequence[Job], Layout | None], Iterable[Done]]
"""Makes the shards of all jobs, on other machines say, and yields each when it is written, in any order."""


@dataclass(frozen=True)
class Rows:
    """Features of a batch as they are stored: real tokens only, end to end."""

    layers: dict[int, Tensor]
    counts: Tensor
    pooled: Tensor | None
    layout: Layout

    @classmethod
    def of(cls, features: Features, dtype: torch.dtype, ids: Sequence[str]) -> Rows:
        """Drop padding, convert, and refuse what must not be stored, naming the item."""
        counts = features.mask.sum(1).cpu()
        if not counts.all():
            raise ValueError(f"item {ids[int(counts.argmin())]!r} has no real token")
        full = bool(features.mask.all())
        layers = {}
        for position, number in enumerate(features.layers):
            hidden = features.hidden[:, position]
            rows = hidden.flatten(0, 1) if full else hidden[features.mask]
            layers[number] = _stored(rows, dtype, counts, ids, f"layer {number}")
        pooled = features.pooled
        if pooled is not None:
            pooled = _stored(pooled, dtype, torch.ones_like(counts), ids, "the pooled output")
        grid = None if features.grid is None else (int(features.grid[0]), int(features.grid[1]))
        width = None if pooled is None else pooled.shape[1]
        return cls(layers, counts, pooled, Layout(features.hidden.shape[-1], features.prefix, grid, width))

    @property
    def nbytes(self) -> int:
        return sum(rows.nbytes for rows in self.layers.values())


def same_layout(found: Layout, known: Layout) -> None:
    """Raise ``ValueError`` if the shape of features has changed."""
    if found != known:
        raise ValueError(f"features changed shape between batches: {found} after {known}")


def _stored(rows: Tensor, dtype: torch.dtype, counts: Tensor, ids: Sequence[str], where: str) -> Tensor:
    """A copy in main memory in the stored type, all finite."""
    stored = torch.empty(rows.shape, dtype=dtype).copy_(rows)
    finite = stored.isfinite()
    if finite.all():
        return stored
    row = int(finite.all(1).logical_not().nonzero()[0])
    item = int(torch.searchsorted(counts.cumsum(0), row, right=True))
    if rows[row].isfinite().all():
        reason = f"values up to {float(rows[row].abs().max()):.3g}, too large for {dtype}: store float32 or bfloat16"
    else:
        reason = "NaN features" if rows[row].isnan().any() else "infinite features"
    raise ValueError(f"item {ids[item]!r} has {reason} ({where})")


def _write(folder: str, number: int, first: int, batches: list[Rows]) -> Shard:
    counts = torch.cat([rows.counts for rows in batches])
    tensors: dict[str, Sequence[Tensor]] = {"offsets": [torch.cat([counts.new_zeros(1), counts.cumsum(0)])]}
    for layer in batches[0].layers:
        tensors[f"layer.{layer}"] = [rows.layers[layer] for rows in batches]
    pooled = [rows.pooled for rows in batches if rows.pooled is not None]
    if pooled:
        tensors["pooled"] = pooled
    size, checksum = write_shard(join(folder, Shard.name(number)), tensors)
    return Shard(Shard.name(number), size, checksum, first, len(counts), int(counts.sum()), int(counts.max()))
