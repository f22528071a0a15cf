"""Filling the feature store: one pass of a frozen backbone over one part of a data set."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch

from cenote.backbones.base import Backbone, LayerReducer
from cenote.data.base import Split
from cenote.data.judged import JudgedData
from cenote.probe.cache import stores_dir
from cenote.probe.checked import CheckedShards
from cenote.probe.files import exclusive, join, remove_leftovers
from cenote.probe.identity import identify
from cenote.probe.loading import Augment
from cenote.probe.manifest import Layout, Manifest, digest
from cenote.probe.store import FeatureStore
from cenote.probe.work import Done, Elsewhere, Job, Work, same_layout
from cenote.types import resolve_layers

SHARD_BYTES = 128 * 2**20
"""A shard is closed by the batch that brings it to this size."""

MANIFEST_SECONDS = 1.0
"""Where shards are made elsewhere, the manifest is written no more often: it grows with their number."""

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

Progress = Callable[[int, int], Any]


def extract(
    backbone: Backbone,
    split: Split | JudgedData,
    *,
    layers: str | int | Sequence[int] = "last",
    cache_dir: str | os.PathLike[str] | None = None,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 64,
    shard_items: int | None = None,
    on_batch: Progress | None = None,
    view: int = 0,
    augment: Augment | None = None,
    reduce: LayerReducer | None = None,
    num_workers: int = 0,
    elsewhere: Elsewhere | None = None,
) -> FeatureStore:
    """Hidden states of every item of a split, from the cache or computed now.

    The store is a folder under ``cache_dir`` named by a digest of backbone (spec, weights, revision), layers,
    transform, ``dtype``, data, view, augmentation and reduction. Shards are written one by one. After an interruption
    (an error, Ctrl-C, a kill) the same call goes on behind the last whole shard; batches start anew with every shard,
    so the files end up with the same bytes as in one go. Shards already there are checked by size and SHA-256, and bad
    ones extracted again. A second process that wants the same store waits for the first.

    Memory: one batch and one shard. Padding on either side is dropped by the mask; real tokens keep their order.

    Args:
        backbone: the frozen network.
        split: the items: one part of labelled data, or judged data as a whole.
        layers: hidden states to keep: ``"last"``, ``"all"``, ``"12,18"`` or numbers.
        cache_dir: path or fsspec URL; default ``$CENOTE_CACHE`` or ``~/.cache/cenote``.
        dtype: stored type: float32, float16 or bfloat16.
        batch_size: items a forward pass. It is not part of the digest: an item's features do not depend on its batch.
        shard_items: most items of a shard; a shard also ends with the batch that brings it to 128 MiB.
        on_batch: called with ``(items done, items in all)`` once at the start and after every batch.
        view: number of an augmented view; each is a store of its own.
        augment: ``augment(item, seed)``, applied to raw items before the backbone's own transform, with a seed made
            from ``view`` and the item's number. See :class:`cenote.probe.loading.Seeded` for transforms without a seed.
        reduce: token reduction, applied layer by layer inside the backbone.
        num_workers: threads that load items ahead of the backbone; 0 loads them in between.
        elsewhere: makes the shards in place of this process, see :mod:`cenote.integrations.ray`. Where shards end must
            then be known beforehand: the first batch stands for all in the count of items that fill 128 MiB. So the
            files are those of a run in this process where all items have the same number of tokens, or where
            ``shard_items`` closes every shard.

    Raises:
        ValueError: an empty split, an unknown ``dtype``, an item without tokens or with NaN or infinite features (its
            id and the layer are named), features that change shape between batches, a manifest of another
            configuration.
        OSError: a file could not be written, on a full disk for instance; whole shards stay, no partial file is left.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be float32, float16 or bfloat16, got {dtype}")
    for name, value in {"batch_size": batch_size, "shard_items": shard_items}.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not len(split):
        raise ValueError("there are no items to extract features from")
    numbers = tuple(sorted(set(resolve_layers(layers, backbone.num_layers))))
    key = {
        "backbone": backbone.spec,
        "fingerprint": backbone.fingerprint(),
        "revision": getattr(backbone, "revision", None),
        "transform": backbone.transform_id(),
        "layers": list(numbers),
        "dtype": str(dtype).removeprefix("torch."),
        "data": split.fingerprint,
        "view": view,
        "augment": None if augment is None else identify(augment),
        "reduce": None if reduce is None else identify(reduce),
    }

    folder = join(stores_dir(cache_dir), digest(key))
    work = Work(backbone, split, folder, numbers, dtype, batch_size, view, augment, reduce, num_workers)
    with exclusive(folder):
        remove_leftovers(folder)
        return _Filling(work, key, on_batch or (lambda *_: None)).run(shard_items, elsewhere)


@dataclass
class _Filling:
    """One run over a store's folder.

    Attributes:
        work: what shards are computed from.
        key: everything the store depends on.
        on_batch: told of the progress.
    """

    work: Work
    key: dict[str, Any]
    on_batch: Progress
    manifest: Manifest | None = None
    done: int = 0

    def __post_init__(self) -> None:
        self.folder, self.total = self.work.folder, len(self.work.split)

    def run(self, shard_items: int | None, elsewhere: Elsewhere | None) -> FeatureStore:
        """Repair bad shards, add missing ones, and open the store."""
        known = self._known()
        damaged = [] if known is None else known.damaged()
        shards = () if known is None else known.manifest.shards
        self.done = sum(shard.items for number, shard in enumerate(shards) if number not in damaged)
        self.on_batch(self.done, self.total)
        repairs = [Job(number, shards[number].first, shards[number].end) for number in damaged]
        first = shards[-1].end if shards else 0
        if elsewhere is None:
            self._here(repairs, len(shards), first, shard_items)
        elif repairs or first < self.total:
            self._elsewhere(elsewhere, [*repairs, *self._cut(len(shards), first, shard_items)])
        store = FeatureStore.open(self.folder)
        if known is not None:
            store.shards.trust(known)
        return store

    def _known(self) -> CheckedShards | None:
        try:
            self.manifest = Manifest.read(self.folder)
        except FileNotFoundError:
            return None
        if self.manifest.key != self.key or self.manifest.items != self.total:
            raise ValueError(
                f"{self.folder} belongs to another configuration ({self.manifest.items} items of "
                f"{self.manifest.key.get('backbone')!r}; expected {self.total} of {self.key['backbone']!r}): clear it"
            )
        return CheckedShards(self.folder, self.manifest)

    def _here(self, repairs: Sequence[Job], number: int, first: int, shard_items: int | None) -> None:
        """Make shards one by one, items loaded ahead across their borders."""

        def progress(items: int) -> None:
            self.on_batch(self.done + items, self.total)

        def layout() -> Layout | None:
            return None if self.manifest is None else self.manifest.layout

        for job in repairs:
            self._record(self.work.shard(job, layout(), on_items=progress))
        with closing(self.work.items(first, self.total)) as items:
            while first < self.total:
                end = self.total if shard_items is None else min(self.total, first + shard_items)
                done = self.work.shard(Job(number, first, end), layout(), items, SHARD_BYTES, progress)
                self._record(done)
                number, first = number + 1, done.shard.end

    def _elsewhere(self, elsewhere: Elsewhere, jobs: Sequence[Job]) -> None:
        """Have shards made, and note each as soon as those in front of it are there; many may come in a second."""
        waiting: dict[int, Done] = {}
        recorded = 0 if self.manifest is None else len(self.manifest.shards)
        written = time.monotonic()
        try:
            for done in elsewhere(self.work, jobs, None if self.manifest is None else self.manifest.layout):
                waiting[done.number] = done
                self.on_batch(self.done + sum(d.shard.items for d in waiting.values()), self.total)
                while ready := [number for number in waiting if number <= recorded]:
                    for number in ready:
                        self._note(waiting.pop(number))
                        recorded = max(recorded, number + 1)
                if self.manifest is not None and time.monotonic() - written > MANIFEST_SECONDS:
                    self.manifest.write(self.folder)
                    written = time.monotonic()
        finally:
            if self.manifest is not None:
                self.manifest.write(self.folder)
        remove_leftovers(self.folder)  # of workers that were killed

    def _cut(self, number: int, first: int, shard_items: int | None) -> list[Job]:
        """The missing shards, ended as a run in this process ends them where all batches are as large as the first."""
        if first == self.total:
            return []
        size = self.work.batch_size
        with closing(self.work.items(0, min(size, self.total))) as items:
            batch = self.work.rows(items, 0, min(size, self.total))
        most = size * math.ceil(SHARD_BYTES / batch.nbytes)
        most = most if shard_items is None else min(most, shard_items)
        starts = range(first, self.total, most)
        return [Job(number + n, start, min(start + most, self.total)) for n, start in enumerate(starts)]

    def _record(self, done: Done) -> None:
        self._note(done).write(self.folder)

    def _note(self, done: Done) -> Manifest:
        if self.manifest is None:
            self.manifest = Manifest(self.key, self.total, done.layout)
        same_layout(done.layout, self.manifest.layout)
        self.manifest = self.manifest.with_shard(done.number, done.shard)
        self.done += done.shard.items
        return self.manifest
