"""Quest: a decoding step attends to the pages of the cache whose bounds promise it the largest logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cenote.attention.base import LayerCall, Recipe, Session, refuse_unserved
from cenote.attention.cache import PreallocatedLayer
from cenote.attention.host import Host
from cenote.ops.gather_attention import Positions, gather_attention


@dataclass(frozen=True)
class Quest(Recipe):
    """A new token attends, per query head, to the ``budget / page_size`` pages of highest bound, the newest among them.

    A page is ``page_size`` consecutive tokens of a row, counted from its first real one. With the least and the largest
    entries ``m`` and ``M`` of its keys, ``score = sum_d max(q_d m_d, q_d M_d)``, which no logit in the page exceeds.
    Bounds are kept beside the keys and take in one token a step. Prompts and continuations of several tokens are dense.
    Nothing is learnt. Source: "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference" (arXiv
    2406.10774).

    Args:
        budget: tokens that a head attends to, a multiple of ``page_size``.
        page_size: tokens a page.
        dense_layers: layers left alone; the paper leaves out the first two.

    Raises:
        ValueError: a budget that is no multiple of the page size; on entering, a layer with a window of its own that is
            not among ``dense_layers``.
    """

    name: ClassVar[str] = "quest"
    needs_state: ClassVar[bool] = True

    budget: int = 256
    page_size: int = 16
    dense_layers: tuple[int, ...] = (0, 1)

    def __post_init__(self) -> None:
        if self.page_size < 1 or self.budget < 1 or self.budget % self.page_size:
            raise ValueError(f"page_size must divide the budget, got {self.page_size} and {self.budget}")

    def start(self, host: Host) -> Session:
        layers = [layer for layer in range(host.num_layers) if layer not in self.dense_layers]
        refuse_unserved(self.name, host, layers, "name them in dense_layers")
        return _Session(host, layers, self)


class PageBounds:
    """Least and largest entries of each page's keys, ``(batch, kv_heads, pages, head_dim)``; a step state.

    Pages that a row does not have yet hold infinities.

    Args:
        page_size: tokens a page.
    """

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.tokens = 0
        self.least: Tensor | None = None
        self.most: Tensor | None = None

    def extend(
        self, key: Float[Tensor, "batch kv_heads keys head_dim"], real: Bool[Tensor, "batch keys"] | None
    ) -> None:
        """Take in the tokens behind those that are in already."""
        new = key[:, :, self.tokens :].detach()
        if real is None:
            page = torch.arange(self.tokens, key.shape[2], device=key.device).expand(key.shape[0], -1)
        else:
            page = real.cumsum(dim=1)[:, self.tokens :].sub(1).clamp(min=0)
        page = page // self.page_size
        self._make_room(new, key.shape[2] // self.page_size + 1)
        assert self.least is not None
        assert self.most is not None
        index = page[:, None, :, None].expand_as(new)
        low = high = new
        if real is not None:
            padding = ~real[:, None, self.tokens :, None]
            low, high = new.masked_fill(padding, float("inf")), new.masked_fill(padding, float("-inf"))
        self.least.scatter_reduce_(2, index, low, "amin")
        self.most.scatter_reduce_(2, index, high, "amax")
        self.tokens = key.shape[2]

    def scores(
        self, query: Float[Tensor, "batch heads 1 head_dim"], counts: Int[Tensor, "batch"]
    ) -> Float[Tensor, "batch heads pages"]:
        """Bounds on the query's inner products with a page's keys; minus infinity beyond a row's ``counts`` pages."""
        assert self.least is not None
        assert self.most is not None
        pages = int(counts.max())
        least, most = (x[:, :, :pages].float().transpose(-1, -2) for x in (self.least, self.most))
        grouped = query.float().reshape(query.shape[0], least.shape[1], -1, query.shape[-1])
        bounds = grouped.clamp(min=0) @ most + grouped.clamp(max=0) @ least
        there = torch.arange(pages, device=query.device) < counts[:, None]
        return bounds.flatten(1, 2).masked_fill(~there.unsqueeze(1), float("-inf"))

    def select(self, rows: Tensor) -> None:
        if self.least is not None and self.most is not None:
            self.least, self.most = (x.index_select(0, rows) for x in (self.least, self.most))

    def crop(self, length: int) -> None:
        """Forget everything: the next step reads the keys that are left again."""
        self.tokens, self.least, self.most = 0, None, None

    def _make_room(self, key: Tensor, pages: int) -> None:
        held = 0 if self.least is None else self.least.shape[2]
        if held >= pages:
            return
        shape = (*key.shape[:2], max(pages + 16, pages * 3 // 2) - held, key.shape[3])
        low, high = key.new_full(shape, float("inf")), key.new_full(shape, float("-inf"))
        self.least = low if self.least is None else torch.cat((self.least, low), dim=2)
        self.most = high if self.most is None else torch.cat((self.most, high), dim=2)


class _Session(Session):
    def __init__(self, host: Host, layers: list[int], recipe: Quest) -> None:
        super().__init__(host, layers)
        self.recipe = recipe

    def attend(self, call: LayerCall) -> Float[Tensor, "batch heads queries head_dim"]:
        held = call.offset + call.queries
        real = call.real[:, :held] if call.padded else None
        bounds = self._bounds(call)
        if bounds is not None:
            bounds.extend(call.key[:, :, :held], real)
        if not call.decoding or held <= self.recipe.budget:
            return call.dense()
        if bounds is None:  # a cache that was begun outside the block, or is none of ours
            bounds = PageBounds(self.recipe.page_size)
            bounds.extend(call.key[:, :, :held], real)
        return gather_attention(call.query, call.key, call.value, self._choose(call, bounds, real), call.scale)

    def _choose(self, call: LayerCall, bounds: PageBounds, real: Tensor | None) -> Positions:
        size, device = self.recipe.page_size, call.key.device
        held = call.offset + 1
        tokens = torch.full((call.query.shape[0],), held, device=device) if real is None else real.sum(dim=1)
        counts = (tokens + size - 1) // size
        scores = bounds.scores(call.query, counts)
        newest = (counts - 1)[:, None, None].expand(-1, scores.shape[1], -1)
        scores.scatter_(2, newest, float("inf"))
        best = scores.topk(min(self.recipe.budget // size, scores.shape[2]), dim=-1)
        index = (best.indices.unsqueeze(-1) * size + torch.arange(size, device=device)).flatten(2)
        used = (index < tokens[:, None, None]) & (best.values > float("-inf")).repeat_interleave(size, dim=-1)
        index = index.clamp(max=held - 1)
        if real is not None:  # from places among a row's real tokens to places in the cache
            order = (~real).byte().argsort(dim=1, stable=True)
            index = order[:, None].expand(-1, index.shape[1], -1).gather(2, index)
        return Positions(index, used)

    def _bounds(self, call: LayerCall) -> PageBounds | None:
        layer = call.inputs.cache
        if not isinstance(layer, PreallocatedLayer):
            return None
        if not isinstance(layer.state, PageBounds) or layer.state.page_size != self.recipe.page_size:
            layer.state = PageBounds(self.recipe.page_size)
        return layer.state
