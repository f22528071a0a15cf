"""What a decoding step costs under HyLRA: one layer's attention, and a whole model by its share of reusing layers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from cenote.attention.cache import PreallocatedLayer
from cenote.attention.host import cache_argument
from cenote.attention.hylra import HyLRA
from cenote.attention.plan import LayerPlan
from cenote.ops.chunk_scores import TokenOrder, best_chunks, chunk_positions, chunk_scores
from cenote.ops.gather_attention import decode_logits, gather_attention


@dataclass(frozen=True)
class LayerCosts:
    """One layer's attention for one new token, each as a call to be timed.

    Attributes:
        dense: fused attention to all keys.
        select: scores of all keys, choice of chunks, attention to them.
        reuse: attention to chunks chosen before.
    """

    dense: Callable[[], Tensor]
    select: Callable[[], Tensor]
    reuse: Callable[[], Tensor]


def layer_costs(keys: int, heads: int = 8, head_dim: int = 64, share: float = 0.1, chunk_size: int = 64) -> LayerCosts:
    """Calls on random keys and values of ``heads`` heads, sets of ``share`` of the keys."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, heads, 1, head_dim, generator=generator)
    key, value = (torch.randn(1, heads, keys, head_dim, generator=generator) for _ in range(2))
    order, chunks = TokenOrder.full(1, keys), torch.tensor([-(-keys // chunk_size)])
    keep = torch.tensor([max(6, round(keys * share) // chunk_size)])

    def choose() -> Any:
        weights = decode_logits(query, key).softmax(dim=-1)
        kept = best_chunks(chunk_scores(weights, chunk_size, "sum", order), keep, chunks, 1, 4)
        return chunk_positions(kept, chunk_size, order)

    chosen = choose()
    return LayerCosts(
        lambda: torch.nn.functional.scaled_dot_product_attention(query, key, value),
        lambda: gather_attention(query, key, value, choose()),
        lambda: gather_attention(query, key, value, chosen),
    )


class Decoding:
    """A random Llama with so many keys in its cache, a token at a time.

    Args:
        keys: held before the first step.
        layers: of the model, each with ``heads`` query and key-value heads of 64 channels.
        share: of the keys that sparse layers attend to.
    """

    def __init__(self, keys: int, layers: int = 8, heads: int = 4, share: float = 0.1) -> None:
        torch.manual_seed(0)
        width = 64 * heads
        config = LlamaConfig(
            vocab_size=256, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=2 * keys,
        )  # fmt: skip
        self.model, self.keys, self.layers = LlamaForCausalLM(config).eval(), keys, layers
        self.recipe = HyLRA(top_k=max(6, round(keys * share) // 64) * 64, threshold=0)
        self.cache = DynamicCache(config=config)
        self.places = [PreallocatedLayer(capacity=keys + 64) for _ in range(layers)]
        self.cache.layers = list(self.places)
        for place in self.places:
            place.update(*torch.randn(2, 1, heads, keys, 64).unbind())

    @torch.no_grad()
    def steps(self, plan: LayerPlan | None = None, count: int = 4) -> Tensor:
        """The last logits of so many tokens under a plan, or densely; the cache is as before afterwards."""
        token = torch.zeros(1, 1, dtype=torch.long)
        with nullcontext() if plan is None else replace(self.recipe, plan=plan)(self.model):
            for _ in range(count):
                logits = self.model(token, use_cache=True, **cache_argument(self.cache)).logits
        for place in self.places:
            place.crop(-count)
        return logits

    def plan(self, reuse: int) -> LayerPlan:
        """One full layer, so many reusing ones at the end, all others selecting."""
        return LayerPlan.from_selectors(self.layers, (0,), range(1, self.layers - reuse))
