"""Sliding window with attention sinks: what every selection of keys has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from cenote.attention.base import LayerCall, Recipe, Session, refuse_unserved
from cenote.attention.host import Host
from cenote.ops.gather_attention import Positions, gather_attention

CHUNK = 256
"""Queries of a prompt that are worked on together."""


@dataclass(frozen=True)
class Window(Recipe):
    """A new token attends to the row's first ``sinks`` tokens and the newest ones, ``budget`` in all, itself included.

    Source: "Efficient Streaming Language Models with Attention Sinks" (arXiv 2309.17453). Other than there, positions
    stay those of the text instead of being counted anew within the window, and the cache keeps all tokens: this is a
    choice of keys, no eviction. Padding is no token. Nothing is learnt.

    Args:
        budget: tokens that a query attends to.
        sinks: of these, the first ones of the row.
        prefill: hold prompts to the same window; they are dense otherwise.
        dense_layers: layers left alone.

    Raises:
        ValueError: a budget that leaves no token beside the sinks, or negative sinks; on entering, a layer that has a
            window of its own and is not among ``dense_layers``.
    """

    name: ClassVar[str] = "window"

    budget: int = 256
    sinks: int = 4
    prefill: bool = False
    dense_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.sinks < 0 or self.budget <= self.sinks:
            raise ValueError(f"need sinks >= 0 and a larger budget, got {self.sinks} and {self.budget}")

    def start(self, host: Host) -> Session:
        layers = [layer for layer in range(host.num_layers) if layer not in self.dense_layers]
        refuse_unserved(self.name, host, layers, "name them in dense_layers")
        return _Session(host, layers, self)


class _Session(Session):
    def __init__(self, host: Host, layers: list[int], recipe: Window) -> None:
        super().__init__(host, layers)
        self.recipe = recipe

    def attend(self, call: LayerCall) -> Float[Tensor, "batch heads queries head_dim"]:
        if call.offset + call.queries <= self.recipe.budget or not (call.decoding or self.recipe.prefill):
            return call.dense()
        return self._step(call) if call.decoding else self._prompt(call)

    def _step(self, call: LayerCall) -> Tensor:
        sinks, recent = self.recipe.sinks, self.recipe.budget - self.recipe.sinks
        if call.padded:
            place = call.real.cumsum(dim=1)
            chosen = call.real & ((place <= sinks) | (place > place[:, -1:] - recent))
            positions = Positions.from_mask(chosen.unsqueeze(1).expand(-1, call.key.shape[1], -1))
        else:
            last, device = call.offset + 1, call.key.device
            index = torch.cat((torch.arange(sinks, device=device), torch.arange(last - recent, last, device=device)))
            positions = Positions(index.expand(*call.key.shape[:2], -1))
        return gather_attention(call.query, call.key, call.value, positions, call.scale)

    def _prompt(self, call: LayerCall) -> Tensor:
        """A stretch of queries at a time, over those keys that any of them sees."""
        sinks, recent = self.recipe.sinks, self.recipe.budget - self.recipe.sinks
        place = call.real.cumsum(dim=1)
        parts = []
        for first in range(0, call.queries, CHUNK):
            last = min(first + CHUNK, call.queries)
            own = place[:, call.offset + first : call.offset + last, None]
            near = (place[:, None] <= sinks) | (place[:, None] > own - recent)
            seen = call.visible(first, last) & near.unsqueeze(1)
            columns = seen.flatten(0, 2).any(dim=0).nonzero().flatten()
            key, value = (x.index_select(2, columns) for x in (call.key, call.value))
            seen = seen.index_select(3, columns)
            part = F.scaled_dot_product_attention(
                call.query[:, :, first:last], key, value, seen, scale=call.scale, enable_gqa=call.groups > 1
            )
            parts.append(part.masked_fill(~seen.any(dim=-1, keepdim=True), 0.0))
        return torch.cat(parts, dim=2)
