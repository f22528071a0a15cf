"""Decoding steps of a small Llama at 16 thousand tokens of context, with TidalDecode and without.

512 channels, 8 heads of 64, 12 and 16 layers, random weights, a cache of random keys and values: what a step costs does
not depend on them. Peers are the same model without the recipe, once with our preallocated cache (the ratio, at 16
layers) and once with transformers' DynamicCache, which copies all it holds in every step. Budgets: the default of 256
positions, and 10 % of the context. The layers are the default plan: two dense, two selecting, the others reusing.
"""

from __future__ import annotations

import argparse
import statistics
import time
from contextlib import nullcontext
from typing import Any

import torch
from common import finish
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicLayer

from cenote.attention import PreallocatedLayer, TidalDecode
from cenote.attention.host import cache_argument

GOAL = 2.1


def filled(model: Any, kind: type[DynamicLayer], tokens: int) -> DynamicCache:
    """A cache of random entries."""
    cache, config = DynamicCache(config=model.config), model.config
    shape = (1, config.num_key_value_heads, tokens, config.head_dim)
    cache.layers = [kind() for _ in range(config.num_hidden_layers)]
    for layer in cache.layers:
        layer.update(*(torch.randn(shape, device=model.device, dtype=model.dtype) for _ in range(2)))
    return cache


def step_times(model: Any, cache: DynamicCache, recipe: TidalDecode | None, steps: int, warmup: int) -> list[float]:
    """Seconds of each of ``steps`` steps; the cache is left as it was."""
    times = []
    with recipe(model) if recipe else nullcontext():
        for number in range(warmup + steps):
            start = time.perf_counter()
            model(input_ids=torch.tensor([[number + 1]], device=model.device), use_cache=True, **cache_argument(cache))
            if model.device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        cache.crop(-(warmup + steps))
    return times[warmup:]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--layers", type=int, nargs="+", default=[12, 16])
    parser.add_argument("--steps", type=int, default=8, help="a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="0 for as many as torch takes")
    options, _ = parser.parse_known_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    rows = [row for layers in options.layers for row in measure(layers, options)]
    finish("tidal_decode", "the dense model with a preallocated cache", GOAL, rows, rows[-4]["ratio"], __doc__)


def measure(layers: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=512, intermediate_size=1408, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=8, head_dim=64, max_position_embeddings=options.tokens + 1024,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().to(device)
    caches = {kind: filled(model, kind, options.tokens) for kind in (PreallocatedLayer, DynamicLayer)}
    tenth = max(1, options.tokens // 10)
    variants = {
        "dense, preallocated cache": (caches[PreallocatedLayer], None),
        "dense, DynamicCache": (caches[DynamicLayer], None),
        "TidalDecode(256)": (caches[PreallocatedLayer], TidalDecode()),
        f"TidalDecode({tenth})": (caches[PreallocatedLayer], TidalDecode(tenth)),
    }
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(options.rounds):
        for name, (cache, recipe) in variants.items():
            times[name].append(statistics.median(step_times(model, cache, recipe, options.steps, 2)))
    rows: list[dict[str, Any]] = []
    for ours in list(variants)[2:]:
        for peer in list(variants)[:2]:
            row = {"device": device, "threads": torch.get_num_threads(), "layers": layers, "tokens": options.tokens}
            row |= {"recipe": ours, "peer": peer}
            row |= {"peer ms": min(times[peer]) * 1e3, "cenote ms": min(times[ours]) * 1e3}
            row["ratio"] = statistics.median(p / o for p, o in zip(times[peer], times[ours], strict=True))
            rows.append(row | {"goal": GOAL})
    return rows


if __name__ == "__main__":
    main()
