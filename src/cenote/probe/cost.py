"""What a readout costs and how sharply it attends."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cenote.pooling.base import Pooling


def macs(pooling: Pooling, head: nn.Module, tokens: Tensor, mask: Tensor | None) -> int:
    """Multiply-accumulates of pooling and head for one item, counted by torch's own flop counter.

    Matrix products and convolutions count; elementwise work (a mean, a softmax) does not.
    """
    # The counter's module hooks trip over parameters that require gradients: count on a copy that does not.
    still_pooling, still_head = copy.deepcopy(pooling).requires_grad_(False), copy.deepcopy(head).requires_grad_(False)
    # The counter does not know the fused attention of the CPU, whose plain form has the same products.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        still_head(still_pooling._pool(tokens[:1], None if mask is None else mask[:1])[0].float())
    return counter.get_total_flops() // 2


@torch.no_grad()
def latency_ms(pooling: Pooling, head: nn.Module, tokens: Tensor, mask: Tensor | None) -> float:
    """Time of pooling and head for one item of the given batch, in milliseconds."""
    return median_ms(lambda: head(pooling._pool(tokens, mask)[0].float())) / len(tokens)


def median_ms(call: Callable[[], Tensor], repeats: int = 5) -> float:
    """Median wall time of a call after one warm-up, in milliseconds; on the CPU with one thread."""
    times, threads = [], torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(repeats + 1):
            start = time.perf_counter()
            if call().is_cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return statistics.median(times[1:]) * 1e3


def attention_entropy(weights: Tensor, mask: Tensor | None) -> Tensor:
    """Entropy of each query's attention over ``log(tokens)``: 0 looks at one token, 1 is uniform.

    Weights are normalised over tokens first. ``(batch, queries, tokens)`` to the mean over items, ``(queries,)``.
    Items with a single token are left out.
    """
    wide = weights.float()
    wide = wide / wide.sum(dim=-1, keepdim=True).clamp(min=1e-12)
    entropy = torch.special.entr(wide).sum(dim=-1)
    count = torch.full((len(wide),), wide.shape[-1]) if mask is None else mask.sum(dim=-1).cpu()
    many = count > 1
    if not many.any():
        return torch.zeros(wide.shape[1])
    return (entropy[many] / count[many].log()[:, None].to(entropy)).mean(dim=0)
