"""Sign codes of a layer's keys, kept beside them in the cache."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cenote.attention.base import LayerCall
from cenote.attention.cache import PreallocatedLayer
from cenote.ops.sign_hashes import hamming_distance, sign_codes


class KeyHashes:
    """Codes of the keys seen so far, made once for each key; a step adds those of the new tokens.

    Args:
        projection: rotation in front of the signs.
    """

    def __init__(self, projection: Float[Tensor, "dim dim"]) -> None:
        self.projection = projection
        self.length = 0
        self._codes: Tensor | None = None

    @classmethod
    def of(cls, call: LayerCall, projection: Float[Tensor, "dim dim"]) -> KeyHashes:
        """The codes of a call's keys: what the cache holds, brought up to date, or all anew without a cache of ours."""
        place = call.inputs.cache
        held = place.state if isinstance(place, PreallocatedLayer) else None
        if not isinstance(held, KeyHashes) or not torch.equal(held.projection, projection):
            held = cls(projection)
            if isinstance(place, PreallocatedLayer):
                place.state = held
        held.extend(call.key[:, :, : call.offset + call.queries])
        return held

    @property
    def codes(self) -> Int[Tensor, "batch kv_heads keys words"]:
        """The codes, in the order of the cache."""
        assert self._codes is not None
        return self._codes[:, :, : self.length]

    def extend(self, keys: Float[Tensor, "batch kv_heads keys head_dim"]) -> None:
        """Add the codes of those keys that have none yet."""
        total = keys.shape[2]
        new = sign_codes(keys[:, :, self.length :], self.projection)
        if self._codes is None or self._codes.shape[2] < total:
            room = new.new_empty(*new.shape[:2], total + total // 2, new.shape[3])
            if self._codes is not None:
                room[:, :, : self.length] = self.codes
            self._codes = room
        self._codes[:, :, self.length : total] = new
        self.length = total

    def distance(self, query: Float[Tensor, "batch kv_heads 1 head_dim"]) -> Int[Tensor, "batch kv_heads keys"]:
        """Bits in which each key's code differs from the query's."""
        return hamming_distance(sign_codes(query, self.projection), self.codes)

    def select(self, rows: Tensor) -> None:
        if self._codes is not None:
            self._codes = self._codes.index_select(0, rows)

    def crop(self, length: int) -> None:
        self.length = min(self.length, length)
