"""Whether shared attention maps save time: a decoding step and a training step against the dense model's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from cenote.attention.host import cache_argument
from cenote.integrations.echo_att_model import share_attention
from cenote.reproductions.base import Finding, finding
from cenote.reproductions.timing import time_ratio

Steps = tuple[Callable[[], Any], Callable[[], Any]]


def build(layers: int, hidden: int, heads: int, kv_heads: int, context: int, *, shared: int = 0) -> Any:
    """A random Llama, with so many layers before the last one sharing."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=context,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    return share_attention(model, range(layers - shared, layers)) if shared else model


def decoding(model: Any, length: int) -> Callable[[], Any]:
    """One token behind a past of so many; the cache is cut back afterwards, so that every call is the same."""
    cache = DynamicCache(config=model.config)
    ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    with torch.no_grad():
        for _ in range(0, length, 256):
            model(ids.expand(1, min(256, length)), **cache_argument(cache))

    def step() -> None:
        with torch.no_grad():
            model(ids, **cache_argument(cache))
        cache.crop(-1)

    return step


def training(model: Any, ids: Tensor) -> Callable[[], Any]:
    """Forward and backward pass on one batch."""
    model.requires_grad_()

    def step() -> None:
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()

    return step


def speed_findings(quick: bool = True) -> list[Finding]:
    """At three quarters of eight layers, at a longer and a shorter context."""
    sizes = (8, 128, 4, 2)
    lengths = (2048, 128) if quick else (8192, 256)
    rounds = 9 if quick else 25
    dense, student = build(*sizes, 16384), build(*sizes, 16384, shared=6)
    long, short = (time_ratio(decoding(dense, n), decoding(student, n), rounds) for n in lengths)
    tokens = 512 if quick else 1024
    ids = torch.zeros(2, tokens, dtype=torch.long)
    step = time_ratio(training(dense, ids), training(student, ids), rounds)
    return [
        finding(
            f"Decoding behind {lengths[0]} tokens with six of eight layers sharing is faster than dense.",
            "above 1x",
            long,
            lambda v: v > 1,
            paper="1.42x (40.50 against 28.44 tokens/s, TinyLlama, 77 %, V100)",
            unit="x",
            note=f"Behind {lengths[1]} tokens {short:.2f}x. Benchmarks of more sizes: benchmarks/echo_att.py.",
        ),
        finding(
            f"A training step on {tokens} tokens with six of eight layers sharing is faster than dense.",
            "above 1x",
            step,
            lambda v: v > 1,
            paper="1.85x (43.5 h against 23.5 h)",
            unit="x",
            note="The dense model uses a fused kernel; sources of shared maps make theirs explicitly.",
        ),
    ]
