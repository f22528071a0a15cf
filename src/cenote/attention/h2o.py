"""H2O: the cache keeps the newest tokens and those that have received the most attention, and drops the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cenote.attention.base import LayerCall, Recipe, Session, refuse_unserved
from cenote.attention.cache import PreallocatedLayer
from cenote.attention.host import Host
from cenote.ops.attention_statistics import attention_received


@dataclass
class Received:
    """What a layer knows of the tokens it holds; a step state.

    Attributes:
        places: of the tokens in the text, ``(batch, kv_heads, held)``.
        scores: attention received from all queries since they came, summed over the heads of the group, same shape.
    """

    places: Int[Tensor, "batch kv_heads held"]
    scores: Float[Tensor, "batch kv_heads held"]

    def select(self, rows: Tensor) -> None:
        self.places, self.scores = (x.index_select(0, rows) for x in (self.places, self.scores))

    def crop(self, length: int) -> None:
        """The layer does that, as its tokens stand in no order."""

    def take(self, index: Int[Tensor, "batch kv_heads kept"]) -> None:
        """Keep these of the held tokens."""
        self.places, self.scores = (x.gather(2, index) for x in (self.places, self.scores))


class EvictingLayer(PreallocatedLayer):
    """Holds fewer tokens than it has seen, for each key and value head others; its length is what it has seen."""

    def __init__(self, capacity: int = 0, **kwargs: Any) -> None:
        super().__init__(0, **kwargs)  # never the room of all tokens
        self.seen = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.seen += key_states.shape[2]
        return super().update(key_states, value_states)

    def get_seq_length(self) -> int:
        return self.seen

    def reset(self) -> None:
        super().reset()
        self.seen = 0

    def keep(self, index: Int[Tensor, "batch kv_heads kept"]) -> None:
        """Drop every token but these."""
        assert self.keys is not None
        assert self.values is not None
        assert isinstance(self.state, Received)
        self.keys, self.values = (
            x.gather(2, index.unsqueeze(-1).expand(-1, -1, -1, x.shape[-1])) for x in (self.keys, self.values)
        )
        self.state.take(index)

    def drop(self, index: Int[Tensor, "batch kv_heads"]) -> None:
        """Drop one token of each head: the last takes its place in the buffer, and nothing else is copied."""
        assert self.keys is not None
        assert self.values is not None
        assert isinstance(self.state, Received)
        kept = []
        for x in (self.keys, self.values, self.state.places, self.state.scores):
            place = index[(..., *[None] * (x.dim() - 2))].expand(-1, -1, 1, *x.shape[3:])
            x.scatter_(2, place, x[:, :, -1:].clone())
            kept.append(x[:, :, :-1])
        self.keys, self.values, self.state.places, self.state.scores = kept

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens; what has been dropped because of them does not come back.

        Raises:
            ValueError: some of them are dropped already.
        """
        length = self.seen - abs(tokens_to_remove)
        if isinstance(self.state, Received) and length < self.seen:
            kept = self.state.places < length
            count = kept.shape[2] - (self.seen - length)
            if not bool((kept.sum(dim=-1) == count).all()):
                raise ValueError(
                    f"h2o has dropped some of the last {self.seen - length} tokens: it cannot take them back"
                )
            self.keep(kept.byte().argsort(dim=-1, descending=True, stable=True)[..., :count])
            self.seen = length


@dataclass(frozen=True)
class H2O(Recipe):
    """Each layer's cache holds, for each key and value head, at most ``budget`` tokens between passes.

    These are the ``recent`` newest and, of the others, those whose ``score_j = sum_i a_ij`` is largest: the attention
    received since they came, from the prompt's queries and every later one, summed over the heads that share the key.
    The others are removed from the cache for good. A prompt attends densely before its tokens are dropped. Dropped
    keys leave no gap, since positions are rotated into those that stay. Source: "H2O: Heavy-Hitter Oracle for Efficient
    Generative Inference of Large Language Models" (arXiv 2306.14048). Nothing is learnt.

    The caches of generations begun inside the block cannot be continued outside; beams, selections of rows and taking
    back recent tokens work.

    Args:
        budget: tokens that a head keeps.
        recent: of these, the newest; half of them unless given.
        dense_layers: layers left alone.

    Raises:
        ValueError: a budget below 2 or no room for ``recent``; on entering, a layer with a window of its own that is
            not among ``dense_layers``; a cache that holds tokens from outside the block.
    """

    name: ClassVar[str] = "h2o"
    cache_layer: ClassVar[type[PreallocatedLayer]] = EvictingLayer
    needs_state: ClassVar[bool] = True

    budget: int = 256
    recent: int | None = None
    dense_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.budget < 2 or not 1 <= self.newest <= self.budget:
            raise ValueError(f"need budget >= 2 and 1 <= recent <= budget, got {self.budget} and {self.recent}")

    @property
    def newest(self) -> int:
        """How many of the newest tokens are always kept."""
        return self.budget // 2 if self.recent is None else self.recent

    def start(self, host: Host) -> Session:
        layers = [layer for layer in range(host.num_layers) if layer not in self.dense_layers]
        refuse_unserved(self.name, host, layers, "name them in dense_layers")
        return _Session(host, layers, self)


class _Session(Session):
    def __init__(self, host: Host, layers: list[int], recipe: H2O) -> None:
        super().__init__(host, layers)
        self.recipe = recipe

    def attend(self, call: LayerCall) -> Float[Tensor, "batch heads queries head_dim"]:
        layer = call.inputs.cache
        if layer is None and call.prompt:
            return call.dense()
        if not isinstance(layer, EvictingLayer) or (not call.prompt and layer.state is None):
            raise ValueError("h2o needs a cache that holds nothing yet when the block is entered")
        output, received = self._prompt(call) if call.prompt else self._behind(call, layer)
        layer.state = received
        self._evict(call, layer, received)
        return output

    def _prompt(self, call: LayerCall) -> tuple[Tensor, Received]:
        batch, kv_heads, keys = call.key.shape[:3]
        scores = attention_received(call.query, call.key, call.call.mask.padding, scale=call.scale)
        places = torch.arange(keys, device=call.key.device).repeat(batch, kv_heads, 1)
        return call.dense(), Received(places, scores.unflatten(1, (kv_heads, -1)).sum(dim=2))

    def _behind(self, call: LayerCall, layer: EvictingLayer) -> tuple[Tensor, Received]:
        """Attention of new tokens to what is held and to each other."""
        before, padding = layer.state, call.call.mask.padding
        assert isinstance(before, Received)
        batch, kv_heads = call.key.shape[:2]
        own = torch.arange(call.offset, call.offset + call.queries, device=call.key.device)
        places = torch.cat((before.places, own.expand(batch, kv_heads, -1)), dim=2)
        query = call.query.unflatten(1, (kv_heads, -1))
        logits = (query @ call.key.unsqueeze(2).transpose(-1, -2)).float() * call.scale
        if call.queries > 1:
            logits = logits.masked_fill(places[:, :, None, None] > own[:, None], float("-inf"))
        if padding is not None:
            real = padding[:, None].expand(-1, kv_heads, -1).gather(2, places)
            logits = logits.masked_fill(~real[:, :, None, None], float("-inf"))
        weights = logits.softmax(dim=-1)
        if padding is not None:
            weights = weights.nan_to_num().masked_fill(~padding[:, own][:, None, None, :, None], 0.0)
        output = weights.to(call.value.dtype) @ call.value.unsqueeze(2)
        new = before.scores.new_zeros(batch, kv_heads, call.queries)
        scores = torch.cat((before.scores, new), dim=2) + weights.sum(dim=(2, 3))
        return output.flatten(1, 2), Received(places, scores.detach())

    def _evict(self, call: LayerCall, layer: EvictingLayer, received: Received) -> None:
        surplus = received.places.shape[2] - self.recipe.budget
        if surplus <= 0:
            return
        priority, padding = received.scores, call.call.mask.padding
        if padding is None:
            recent = received.places >= layer.seen - self.recipe.newest
            priority = priority.masked_fill(recent, float("inf"))
        else:
            order = padding.cumsum(dim=1)
            order = (
                torch.where(padding, order, -1)[:, None].expand(-1, priority.shape[1], -1).gather(2, received.places)
            )
            recent = order > padding.sum(dim=1)[:, None, None] - self.recipe.newest
            priority = priority.masked_fill(recent, float("inf")).masked_fill(order < 0, float("-inf"))
        if surplus == 1:
            layer.drop(priority.argmin(dim=-1))
        else:
            layer.keep(priority.topk(self.recipe.budget, dim=-1, sorted=False).indices)
