"""Filling the feature store: one pass of a frozen backbone over one part of a data set."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from cenote.backbones.base import Backbone, LayerReducer
from cenote.data.base import Split
from cenote.data.judged import JudgedData
from cenote.probe.cache import stores_dir
from cenote.probe.checked import CheckedShards
from cenote.probe.files import exclusive, join, remove_leftovers
from cenote.probe.identity import identify
from cenote.probe.loading import Augment, load_items
from cenote.probe.manifest import Layout, Manifest, Shard, digest
from cenote.probe.shards import write_shard
from cenote.probe.store import FeatureStore
from cenote.types import Features, resolve_layers

SHARD_BYTES = 128 * 2**20
"""A shard is closed by the batch that brings it to this size."""

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

    def load(first: int, stop: int) -> Generator[Any, None, None]:
        return load_items(split, first, stop, view=view, augment=augment, workers=num_workers, ahead=2 * batch_size)

    def encode(items: list[Any], ids: Sequence[str]) -> Rows:
        return Rows.of(backbone(backbone.collate(items), numbers, reduce), dtype, ids)

    folder = join(stores_dir(cache_dir), digest(key))
    with exclusive(folder):
        remove_leftovers(folder)
        filling = _Filling(folder, key, split.ids, len(split), load, encode, batch_size, on_batch or (lambda *_: None))
        return filling.run(shard_items)


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


@dataclass
class _Filling:
    """One run over a store's folder.

    Attributes:
        load: items of a range, one by one.
        encode: their features, given their ids.
    """

    folder: str
    key: dict[str, Any]
    ids: Sequence[str]
    total: int
    load: Callable[[int, int], Generator[Any, None, None]]
    encode: Callable[[list[Any], Sequence[str]], Rows]
    batch_size: int
    on_batch: Progress
    manifest: Manifest | None = None
    done: int = 0

    def run(self, shard_items: int | None) -> FeatureStore:
        """Repair bad shards, add missing ones, and open the store."""
        known = self._known()
        damaged = [] if known is None else known.damaged()
        shards = () if known is None else known.manifest.shards
        self.done = sum(shard.items for number, shard in enumerate(shards) if number not in damaged)
        self.on_batch(self.done, self.total)
        for number in damaged:
            first, end = shards[number].first, shards[number].end
            with closing(self.load(first, end)) as items:
                self._write(number, items, first, end, None)
        number, first = len(shards), shards[-1].end if shards else 0
        with closing(self.load(first, self.total)) as items:
            while first < self.total:
                end = self.total if shard_items is None else min(self.total, first + shard_items)
                first = self._write(number, items, first, end, SHARD_BYTES)
                number += 1
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

    def _write(self, number: int, items: Iterator[Any], first: int, end: int, limit: int | None) -> int:
        """One shard of the items from ``first``, up to ``end`` or ``limit`` bytes; returns where it ended."""
        batches: list[Rows] = []
        at, size = first, 0
        while at < end and (limit is None or size < limit):
            stop = min(at + self.batch_size, end)
            rows = self.encode(list(islice(items, stop - at)), self.ids[at:stop])
            if self.manifest is None:
                self.manifest = Manifest(self.key, self.total, rows.layout)
            if rows.layout != self.manifest.layout:
                raise ValueError(f"features changed shape between batches: {rows.layout} after {self.manifest.layout}")
            batches.append(rows)
            at, size = stop, size + rows.nbytes
            self.on_batch(self.done + at - first, self.total)
        assert self.manifest is not None
        shard = _write_rows(self.folder, number, first, batches)
        self.manifest = self.manifest.with_shard(number, shard)
        self.manifest.write(self.folder)
        self.done += at - first
        return at


def _write_rows(folder: str, number: int, first: int, batches: list[Rows]) -> Shard:
    counts = torch.cat([rows.counts for rows in batches])
    tensors: dict[str, Sequence[Tensor]] = {"offsets": [torch.cat([counts.new_zeros(1), counts.cumsum(0)])]}
    for layer in batches[0].layers:
        tensors[f"layer.{layer}"] = [rows.layers[layer] for rows in batches]
    pooled = [rows.pooled for rows in batches if rows.pooled is not None]
    if pooled:
        tensors["pooled"] = pooled
    size, checksum = write_shard(join(folder, Shard.name(number)), tensors)
    return Shard(Shard.name(number), size, checksum, first, len(counts), int(counts.sum()), int(counts.max()))
