"""The feature store: hidden states on disk, read in any order through memory maps.

A store is a folder with ``manifest.json`` (see :mod:`cenote.probe.manifest`) and shards (see
:mod:`cenote.probe.shards`), filled by :func:`cenote.probe.extract.extract`. A bad shard is never read silently, see
:mod:`cenote.probe.checked`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from cenote.probe.cache import StoreInfo, clear, list_stores
from cenote.probe.checked import CheckedShards, DamagedStoreError
from cenote.probe.files import normalise
from cenote.probe.manifest import Manifest
from cenote.types import Features, Grid

__all__ = ["DamagedStoreError", "FeatureStore", "StoreInfo", "clear", "list_stores"]


class Piece(NamedTuple):
    """The part of a batch that lies in one shard.

    Attributes:
        tensors: the shard's.
        rows: numbers of the wanted items within the shard.
        places: their positions in the batch.
    """

    tensors: dict[str, Tensor]
    rows: np.ndarray
    places: np.ndarray

    def spans(self) -> tuple[np.ndarray, np.ndarray]:
        """The first token of each wanted item, and the one after its last, within the shard."""
        offsets = self.tensors["offsets"].numpy()
        return offsets[self.rows], offsets[self.rows + 1]


class FeatureStore:
    """Features of one part of a data set, on disk.

    Made by :meth:`open` or :func:`cenote.probe.extract.extract`. Reading needs memory for the batch only. The pages of
    mapped shards belong to their files (``RssFile``, not ``RssAnon``), and :meth:`release` gives them back at once.

    Attributes:
        path: the folder, plain or an fsspec URL.
        shards: its files, checked before they are read.
        manifest: what it holds.
        dtype: what reading gives; ``None`` for the stored type.
        layers: hidden states held, ascending.
        dim: width of a token.
        grid: patch grid behind the prefix, or ``None``.
        prefix: non-patch tokens in front.
        pooled_dim: width of the encoder's own pooled output, or ``None``.
        uniform: whether all items have the same number of tokens.
    """

    def __init__(self, shards: CheckedShards, dtype: torch.dtype | None = torch.float32) -> None:
        manifest, layout = shards.manifest, shards.manifest.layout
        self.shards, self.path, self.manifest = shards, shards.path, manifest
        self.dtype = getattr(torch, manifest.dtype) if dtype is None else dtype
        self.layers, self.dim, self.prefix = manifest.layers, layout.dim, layout.prefix
        self.pooled_dim = layout.pooled_dim
        self.grid = None if layout.grid is None else Grid(*layout.grid)
        self.longest = max((shard.longest for shard in manifest.shards), default=0)
        self.uniform = all(shard.tokens == shard.items * self.longest for shard in manifest.shards)
        self._firsts = np.array([shard.first for shard in manifest.shards])

    @classmethod
    def open(cls, path: str | os.PathLike[str], dtype: torch.dtype | None = torch.float32) -> FeatureStore:
        """Open a finished store; ``dtype`` is what reading gives, ``None`` for the stored type.

        Raises:
            FileNotFoundError: there is no store.
            ValueError: the manifest is malformed or the extraction was interrupted.
            DamagedStoreError: shards are missing or of the wrong size.
        """
        path = normalise(path)
        manifest = Manifest.read(path)
        if not manifest.complete:
            raise ValueError(
                f"{path} holds {manifest.stored} of {manifest.items} items: run the extraction again to finish it"
            )
        shards = CheckedShards(path, manifest)
        shards.refuse(shards.wrong_size())
        return cls(shards, dtype)

    def __len__(self) -> int:
        return self.manifest.stored

    @cached_property
    def counts(self) -> Int[Tensor, "items"]:
        """Tokens of each item."""
        if self.uniform:
            return torch.full((len(self),), self.longest)
        return torch.cat([self.shards.tensors(n)["offsets"].diff() for n in range(len(self.manifest.shards))])

    def batch(
        self, indices: Any, layers: int | Sequence[int] | None = None, out: Float[Tensor, "..."] | None = None
    ) -> Features:
        """Features of the given items, in that order; rows are padded on the right only where token counts differ.

        Args:
            indices: item numbers, as a tensor, an array or a sequence.
            layers: hidden states to read, in this order; ``None`` for all that are held.
            out: a contiguous buffer of the reading type whose first elements are to hold the result.

        Raises:
            ValueError: no items, numbers out of range, layers not held, an unsuitable buffer.
            DamagedStoreError: a shard is not what was written.
        """
        index, chosen = self._index(indices), self._layers(layers)
        pieces = self._pieces(index)
        pooled = None if self.pooled_dim is None else self._pooled(pieces, len(index))
        if self.uniform:
            hidden = self._buffer(out, (len(index), len(chosen), self.longest, self.dim))
            _fill_uniform(hidden, pieces, chosen)
            mask = torch.ones(len(index), self.longest, dtype=torch.bool)
        else:
            counts = np.empty(len(index), np.int64)
            for piece in pieces:
                begins, ends = piece.spans()
                counts[piece.places] = ends - begins
            mask = torch.arange(int(counts.max())) < torch.from_numpy(counts)[:, None]
            hidden = self._buffer(out, (len(index), len(chosen), mask.shape[1], self.dim))
            _fill_ragged(hidden, pieces, chosen)
        return Features(hidden, mask, chosen, self.grid, self.prefix, pooled)

    def batches(
        self, batch_size: int, shuffle_seed: int | None = None, layers: int | Sequence[int] | None = None
    ) -> Iterator[tuple[Int[Tensor, "batch"], Features]]:
        """``(item numbers, features)`` of every item once, in order or in the permutation that the seed fixes."""
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        order = torch.arange(len(self))
        if shuffle_seed is not None:
            order = torch.randperm(len(self), generator=torch.Generator().manual_seed(shuffle_seed))
        for indices in order.split(batch_size):
            yield indices, self.batch(indices, layers)

    def pooled(self, indices: Any) -> Float[Tensor, "batch pooled_dim"]:
        """The encoder's own pooled output of the given items."""
        if self.pooled_dim is None:
            raise ValueError(f"{self.manifest.key['backbone']} has no pooled output of its own")
        index = self._index(indices)
        return self._pooled(self._pieces(index), len(index))

    def verify(self) -> None:
        """Compare size and checksum of every shard; raises :class:`DamagedStoreError` naming the bad ones."""
        self.shards.refuse(self.shards.damaged())

    def release(self) -> None:
        """Unmap every shard, so that its pages no longer count as this process's memory. Reading goes on as before."""
        self.shards.release()

    def _index(self, indices: Any) -> np.ndarray:
        index = np.asarray(indices.cpu() if isinstance(indices, Tensor) else indices)
        if index.ndim != 1 or not index.size or index.dtype.kind not in "iu":
            raise ValueError(f"indices must be item numbers in one dimension, got {index.dtype} of shape {index.shape}")
        if index.min() < 0 or index.max() >= len(self):
            raise ValueError(f"item numbers must lie in 0..{len(self) - 1}, got {index.min()}..{index.max()}")
        return index

    def _layers(self, layers: int | Sequence[int] | None) -> tuple[int, ...]:
        chosen = self.layers if layers is None else (layers,) if isinstance(layers, int) else tuple(layers)
        if not chosen or not set(chosen) <= set(self.layers):
            raise ValueError(f"layers must be among those stored, {list(self.layers)}, got {list(chosen)}")
        return chosen

    def _pieces(self, index: np.ndarray) -> list[Piece]:
        """The batch shard by shard."""
        number = np.searchsorted(self._firsts, index, side="right") - 1
        by_shard = np.argsort(number, kind="stable")
        present, begins = np.unique(number[by_shard], return_index=True)
        groups = np.split(by_shard, begins[1:])
        return [
            Piece(self.shards.tensors(int(n)), index[places] - self._firsts[n], places)
            for n, places in zip(present, groups, strict=True)
        ]

    def _pooled(self, pieces: list[Piece], batch: int) -> Tensor:
        out = torch.empty(batch, self.pooled_dim or 0, dtype=self.dtype)
        for piece in pieces:
            _copy_rows(out, piece.tensors["pooled"], piece)
        return out

    def _buffer(self, out: Tensor | None, shape: tuple[int, ...]) -> Tensor:
        """Room for a batch, zero where it has to be padded."""
        if out is None:
            return torch.zeros(shape, dtype=self.dtype)  # pages that are never padding are not touched twice
        size = math.prod(shape)
        if out.dtype != self.dtype or out.numel() < size or not out.is_contiguous() or out.device.type != "cpu":
            found = f"{out.dtype} of shape {tuple(out.shape)} on {out.device}"
            raise ValueError(
                f"out must be a contiguous {self.dtype} CPU tensor of at least {size} elements, got {found}"
            )
        hidden = out.view(-1)[:size].view(shape)
        return hidden if self.uniform else hidden.zero_()


def _fill_uniform(hidden: Float[Tensor, "b l t d"], pieces: list[Piece], layers: tuple[int, ...]) -> None:
    """Items of equal length: one row of ``tokens * dim`` numbers an item and layer."""
    flat = hidden.flatten(2)
    for piece in pieces:
        for slot, layer in enumerate(layers):
            _copy_rows(flat[:, slot], piece.tensors[f"layer.{layer}"].view(-1, flat.shape[2]), piece)


def _fill_ragged(hidden: Float[Tensor, "b l t d"], pieces: list[Piece], layers: tuple[int, ...]) -> None:
    """Items of any length, into rows that are zero."""
    for piece in pieces:
        begins, ends = piece.spans()
        spans = list(zip(piece.places.tolist(), begins.tolist(), ends.tolist(), strict=True))
        for slot, layer in enumerate(layers):
            target, source = _assignable(hidden[:, slot], piece.tensors[f"layer.{layer}"])
            for place, begin, end in spans:
                target[place, : end - begin] = source[begin:end]


def _copy_rows(target: Float[Tensor, "b w"], source: Float[Tensor, "n w"], piece: Piece) -> None:
    """``target[places] = source[rows]``.

    A batch from one shard is one vectorised copy. From several, a row at a time is faster than a vectorised gather
    followed by a permutation, which passes everything through a second, fresh buffer.
    """
    if len(piece.rows) == len(target) and source.dtype == target.dtype:
        torch.index_select(source, 0, torch.from_numpy(piece.rows), out=target)
        return
    into, rows = _assignable(target, source)
    for place, row in zip(piece.places.tolist(), piece.rows.tolist(), strict=True):
        into[place] = rows[row]


def _assignable(target: Tensor, source: Tensor) -> tuple[Any, Any]:
    """The same memory as NumPy arrays, whose assignments take a tenth of the time; NumPy has no bfloat16, though."""
    if torch.bfloat16 in (target.dtype, source.dtype):
        return target, source
    return target.numpy(), source.numpy()
