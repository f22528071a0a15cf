"""Keys and values of tokens that were decoded sparsely, replaced by those of a dense pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cenote.attention.cache import PreallocatedLayer
from cenote.attention.host import Host, cache_argument, cache_of


@dataclass
class Pending:
    """Decoded tokens that are to be run again, the last ones of the cache; kept in its first layer.

    Attributes:
        embeddings: ``(batch, pending, dim)``.
        positions: ``(batch, pending)``.
        padding: which tokens of the whole cache are real, or ``None`` if all are.
        length: tokens in the cache.
    """

    embeddings: Float[Tensor, "batch pending dim"]
    positions: Int[Tensor, "batch pending"]
    padding: Bool[Tensor, "batch length"] | None
    length: int

    def select(self, rows: Tensor) -> None:
        self.embeddings, self.positions = self.embeddings[rows], self.positions[rows]
        self.padding = None if self.padding is None else self.padding[rows]

    def crop(self, length: int) -> None:
        left = max(0, self.embeddings.shape[1] - (self.length - length))
        self.embeddings, self.positions = self.embeddings[:, :left], self.positions[:, :left]
        self.padding = None if self.padding is None else self.padding[:, :length]
        self.length = length


class CacheCorrection:
    """Reruns the last decoded tokens densely, as one chunk, as soon as ``interval`` have come.

    What it needs of them lives in the cache, and so follows beams, crops and changes of the batch. A pass of several
    tokens is dense itself; what was pending before it is run again first, so that the pass sees a clean cache.

    Args:
        host: the model.
        interval: tokens to wait for.

    Attributes:
        running: whether the present pass is such a rerun, in which everything is to attend densely.
        padding: the mask of the present pass, to be set while it runs.

    Raises:
        ValueError: a host whose cache forgets, so that tokens cannot be run again.
    """

    def __init__(self, host: Host, interval: int) -> None:
        windows = [layer for layer, why in host.unserved().items() if "sliding" in why]
        if windows:
            raise ValueError(f"tokens cannot be rerun where layers {windows} forget: leave correction_interval out")
        self.host, self.interval = host, interval
        self.running = False
        self.padding: Tensor | None = None
        self._step: dict[str, Any] | None = None

    def begin(self, kwargs: dict[str, Any]) -> None:
        """A forward pass of the decoder starts."""
        self._step = None
        cache = cache_of(kwargs)
        if self.running or cache is None or not cache.get_seq_length():
            return
        tokens = kwargs.get("input_ids") if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
        if tokens is None:
            raise ValueError("the decoder's tokens can be rerun only if they are passed by name: input_ids=...")
        if tokens.shape[1] == 1:
            self._step = kwargs
        else:
            self._rerun(cache)

    def finish(self) -> None:
        """It is over."""
        step, self._step = self._step, None
        if step is None:
            return
        cache = cache_of(step)
        assert cache is not None
        first = _first_layer(cache)
        length, before = first.get_seq_length(), first.state
        embeddings = step.get("inputs_embeds")
        if embeddings is None:
            embeddings = self.host.decoder.get_input_embeddings()(step["input_ids"])  # type: ignore[operator]
        embeddings = embeddings.detach()
        positions = step.get("position_ids")
        if positions is None:
            positions = torch.full((1, 1), length - 1, device=embeddings.device)
        if positions.dim() != 2:
            raise ValueError(f"tokens are rerun at positions (batch, tokens) only, got {tuple(positions.shape)}")
        positions = positions.expand(embeddings.shape[0], -1)
        if isinstance(before, Pending) and before.length == length - 1:
            embeddings = torch.cat([before.embeddings, embeddings], dim=1)
            positions = torch.cat([before.positions, positions], dim=1)
        first.state = Pending(embeddings, positions, self.padding, length)
        if embeddings.shape[1] >= self.interval:
            self._rerun(cache)

    @torch.no_grad()
    def _rerun(self, cache: Any) -> None:
        first = _first_layer(cache)
        pending, first.state = first.state, None
        if not isinstance(pending, Pending) or not pending.embeddings.shape[1]:
            return
        cache.crop(-pending.embeddings.shape[1])
        self.running = True
        try:
            self.host.decoder(
                inputs_embeds=pending.embeddings,
                position_ids=pending.positions,
                attention_mask=None if pending.padding is None else pending.padding.long(),
                use_cache=True,
                **cache_argument(cache),
            )
        finally:
            self.running = False


def _first_layer(cache: Any) -> PreallocatedLayer:
    first = cache.layers[0]
    if not isinstance(first, PreallocatedLayer):
        raise ValueError(
            f"tokens can be rerun only in a cache that was filled within the recipe's block, got {type(first).__name__}"
        )
    return first
