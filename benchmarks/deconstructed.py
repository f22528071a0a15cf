"""Decoding and cached maps of the deconstructed Qwen2 variants.

First how long the next token takes behind a short and a long past, and what is kept of it: constant for Non-approximate
and Approximate, growing for standard attention. Then a forward pass of RndEmbQK with its maps cached against the same
pass that computes them, which is the ratio (the paper counts 2BL^2 d + 2BL d^2 operations a layer against
2L^2 d + 2BL^2 d + 6BL d^2).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from common import finish, interleaved, ratio
from torch import Tensor
from transformers.cache_utils import Cache

from cenote.integrations.deconstructed_qwen2 import DeconstructedQwen2Config, DeconstructedQwen2ForCausalLM

DECODED = ("standard", "random_fixed", "static", "approximate", "non_approximate", "mlp")
GOAL = 1.2


def build(variant: str, options: argparse.Namespace, device: str) -> DeconstructedQwen2ForCausalLM:
    torch.manual_seed(0)
    heads = max(1, options.dim // 64)
    config = DeconstructedQwen2Config(
        vocab_size=512, hidden_size=options.dim, intermediate_size=2 * options.dim, num_hidden_layers=options.depth,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=2 * max(options.lengths),
        variants=variant,
    )  # fmt: skip
    return DeconstructedQwen2ForCausalLM(config).eval().to(device)


def next_token(model: DeconstructedQwen2ForCausalLM, past: Cache | None, one: Tensor) -> Callable[[], Any]:
    return lambda: model(one, past_key_values=past)


def computed(model: DeconstructedQwen2ForCausalLM, ids: Tensor) -> Callable[[], Any]:
    def call() -> None:
        model.drop_fixed_maps()
        model(ids, use_cache=False)

    return call


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=21)
    options, _ = parser.parse_known_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows: list[dict[str, Any]] = []
    for variant in DECODED:
        model = build(variant, options, device)
        one = torch.zeros(options.batch, 1, dtype=torch.long, device=device)
        row: dict[str, Any] = {"device": device, "threads": torch.get_num_threads(), "variant": variant}
        calls = {}
        for length in options.lengths:
            past = model(one.expand(-1, length)).past_key_values
            assert past is not None
            row[f"kept MB at {length}"] = past.num_bytes() / 2**20
            calls[f"ms at {length}"] = next_token(model, past, one)
        times = interleaved(calls, options.repeats)
        row |= {name: 1e3 * sorted(each)[len(each) // 2] for name, each in times.items()}
        first, last = (f"ms at {n}" for n in (options.lengths[0], options.lengths[-1]))
        rows.append(row | {"long / short": ratio(times, last, first)})
    model = build("random_fixed", options, device)
    value = 0.0
    for length in options.lengths[:2]:
        ids = torch.zeros(options.batch, length, dtype=torch.long, device=device)
        cached = build("random_fixed", options, device)
        times = interleaved(
            {"computed": computed(model, ids), "cached": lambda cached=cached, ids=ids: cached(ids, use_cache=False)},
            options.repeats,
        )
        value = ratio(times, "computed", "cached")
        rows.append({"device": device, "variant": f"random_fixed, maps of {length} cached", "ratio": value})
    finish("deconstructed", "fixed maps computed anew", GOAL, rows, value, __doc__)


if __name__ == "__main__":
    main()
