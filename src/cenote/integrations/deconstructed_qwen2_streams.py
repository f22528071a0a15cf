"""The second streams of a deconstructed language model, and the maps that they lend to the layers."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from cenote.integrations.deconstructed_qwen2_config import FIXED
from cenote.integrations.deconstructed_qwen2_layers import DeconstructedQwen2Layer, Pass
from cenote.ops.precision import autocast_dtype

Rotation = tuple[Tensor, Tensor]
Marks = tuple[tuple[weakref.ref[Tensor], int, int], ...]


def stream_maps(
    layers: list[DeconstructedQwen2Layer],
    streams: dict[str, Tensor],
    rotation: Rotation,
    make_run: Callable[[Tensor], Pass],
) -> Iterator[Tensor | None]:
    """Map by map, what each layer's stream looks at; ``None`` for layers whose map is not fixed.

    A stream ``(1, tokens, dim)`` runs through every layer below the last one that reads it, with ordinary attention of
    its own queries, keys and values and the layer's feed-forward network. Gradients flow through it.
    """
    last = {kind: max((i for i, layer in enumerate(layers) if layer.variant == kind), default=-1) for kind in FIXED}
    for index, layer in enumerate(layers):
        yield layer.fixed_map(streams[layer.variant], rotation) if layer.variant in FIXED else None
        for kind, stream in streams.items():
            if index < last[kind]:
                streams[kind] = layer(stream, make_run(stream))[0]


class MapCache:
    """Fixed maps of a model that is not being trained: computed once, until a weight changes.

    A change is noticed where torch notices it: optimiser steps, ``load_state_dict``, ``copy_`` and other in-place
    operations, a new tensor in a parameter's place. Writing into ``parameter.data`` in place goes unnoticed (as some
    adapter libraries do when they merge): call :meth:`drop` after it. The map of a short sequence is the leading block
    of the map of a longer one, so one set of maps serves all lengths; it at least doubles when it has to grow. Maps
    made under autocast serve only there. Of weights made in inference mode torch counts no changes: nothing is kept.
    """

    def __init__(self) -> None:
        self.drop()

    def drop(self) -> None:
        """Forget all maps."""
        self.rows = 0
        self._maps: list[Tensor | None] = []
        self._marks: Marks = ()
        self._precision: torch.dtype | None = None

    def __deepcopy__(self, memo: dict) -> MapCache:
        return MapCache()  # a copy has weights of its own

    def __reduce__(self) -> tuple:
        return MapCache, ()

    def get(
        self, rows: int, most: int, owner: nn.Module, compute: Callable[[int], list[Tensor | None]]
    ) -> list[Tensor | None]:
        """Maps for ``rows`` positions, each ``(1, heads, rows, rows)``, computed for more of at most ``most``."""
        tensors = [*owner.parameters(), *owner.buffers()]
        if any(x.is_inference() for x in tensors):
            return compute(rows)
        marks = tuple((weakref.ref(x), x._version, x.data_ptr()) for x in tensors)
        precision = autocast_dtype(tensors[0])
        if precision != self._precision or not self._same(marks):
            self.drop()
        if rows > self.rows:
            self.rows = min(most, max(rows, 2 * self.rows))
            self._maps, self._marks, self._precision = compute(self.rows), marks, precision
        return [None if one is None else one[..., :rows, :rows] for one in self._maps]

    def _same(self, marks: Marks) -> bool:
        return len(marks) == len(self._marks) and all(
            old[0]() is new[0]() and old[1:] == new[1:] for old, new in zip(self._marks, marks, strict=True)
        )


def check_fixed_input(rows: int, available: int, mask: Tensor | None) -> None:
    """Raise if maps that belong to positions cannot serve these tokens.

    Raises:
        ValueError: more tokens than the stream has rows, or padding anywhere but on the right.
    """
    if rows > available:
        raise ValueError(f"the fixed stream has {available} rows, too few for a sequence of {rows} tokens")
    if mask is not None and bool((mask[:, 1:] > mask[:, :-1]).any()):
        raise ValueError(
            "fixed maps belong to positions: pad on the right, so that each sequence starts at position 0, "
            "and continue only sequences without padding"
        )


def check_packing(position_ids: Tensor, variants: list[str]) -> None:
    """Raise ``ValueError`` for several sequences in one row where a layer would mix them.

    Without mask and cache the host reads a sequence's start from its positions; attention masks keep sequences apart,
    running sums and maps of their own do not.
    """
    mixing = sorted(set(variants) - {"standard", "static", "mlp"})
    if mixing and not torch.compiler.is_compiling() and bool((position_ids.diff(dim=1) != 1).any()):
        raise ValueError(f"{', '.join(mixing)} cannot keep packed sequences apart: give each a row of its own")


def check_fixed_ids(ids: Tensor) -> None:
    """Raise ``ValueError`` while the fixed text is not set."""
    if not torch.compiler.is_compiling() and bool((ids < 0).any()):
        raise ValueError("the fixed text is not set: call set_fixed_text(ids) first")
