"""PoNet: what a layer costs by the number of tokens, beside a softmax transformer layer of equal width."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertLayer

from cenote.integrations.ponet_config import PoNetConfig
from cenote.integrations.ponet_encoder import PoNetLayer
from cenote.mixing.base import MixerContext
from cenote.reproductions.base import Finding, finding

LENGTHS = (512, 1024, 2048, 4096, 8192)
WIDTH, HEADS, SENTENCE = 128, 4, 25
PONET_COST = "Time per token of a PoNet layer stays as it is when a text gets longer."
DENSE_COST = "Time per token of a softmax transformer layer grows with the text."
"""Claims whose values, one a length, are the curves of the figure."""


class Layers(nn.Module):
    """The two layers of one width, post-norm, four times as wide inside."""

    def __init__(self, width: int = WIDTH, heads: int = HEADS) -> None:
        super().__init__()
        sizes: dict[str, Any] = {"hidden_size": width, "num_attention_heads": heads, "intermediate_size": 4 * width}
        self.ponet = PoNetLayer(PoNetConfig(**sizes))
        self.dense = BertLayer(BertConfig(**sizes, attn_implementation="sdpa"))  # type: ignore[call-arg]
        self.eval()


def sentences(tokens: int, batch: int = 1) -> MixerContext:
    """A class token, sentences of :data:`SENTENCE` tokens, and a separator at the end."""
    place = torch.arange(tokens)
    segments = torch.where(place == 0, 0, 1 + (place - 1) // SENTENCE)
    segments[-1] += 1
    special = (place == 0) | (place == tokens - 1)
    return MixerContext(segment_ids=segments.expand(batch, -1), special_mask=special.expand(batch, -1))


def cost_findings(lengths: Sequence[int] = LENGTHS, rounds: int = 5) -> list[Finding]:
    """Time on one thread without gradients, and what autograd keeps for a training step."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            layers = Layers()
            times = [_times(layers, n, rounds) for n in lengths]
            kept = [_kept(layers.ponet, n) for n in lengths]
    finally:
        torch.set_num_threads(threads)
    ours, dense = ([1e6 * t[which] / n for t, n in zip(times, lengths, strict=True)] for which in (0, 1))
    ratios = [t[2] for t in times]
    doubling = [2 ** (math.log(b[0] / a[0]) / math.log(n / m)) for a, b, m, n in _steps(times, lengths)]
    growth = [2 ** (math.log(b / a) / math.log(n / m)) for a, b, m, n in _steps(kept, lengths)]
    by = f"One value a length: {', '.join(map(str, lengths))} tokens. "
    setting = f"Width {WIDTH}, {HEADS} heads, one thread, forward pass without padding."
    long = [n for n in lengths if n >= 4096]
    return [
        finding(PONET_COST, "at most 1.5 times the shortest's", ours, lambda v: v <= 1.5 * ours[0],
                unit="microseconds a token, by length", note=by + setting),
        finding(DENSE_COST, "at least the shortest's", dense, lambda v: v >= dense[0],
                unit="microseconds a token, by length",
                note=by + "BERT's layer of transformers with PyTorch's fused attention."),
        finding("Twice the tokens take a PoNet layer at most 2.3 times the time.", "at most 2.3 (median of the steps)",
                statistics.median(doubling), lambda v: v <= 2.3, unit="x by doubling",
                note=f"Steps: {', '.join(f'{v:.2f}' for v in doubling)}."),
        finding("Twice the tokens keep twice the memory for a training step of a PoNet layer.", "at most 2.05",
                growth, lambda v: v <= 2.05, unit="x by doubling"),
        finding("A PoNet layer is faster than a softmax transformer layer at 4096 tokens and more.", "at least 5 times",
                [r for r, n in zip(ratios, lengths, strict=True) if n in long] or ratios[-1:], lambda v: v >= 5,
                paper="9x at 4096 tokens (training on a GPU, 16.2 against 1.8 steps a second)",
                unit="x, median of rounds", note=f"At {', '.join(map(str, long or lengths[-1:]))} tokens."),
    ]  # fmt: skip


def _steps(values: Sequence, lengths: Sequence[int]) -> list[tuple]:
    return list(zip(values, values[1:], lengths, lengths[1:], strict=False))


@torch.no_grad()
def _times(layers: Layers, tokens: int, rounds: int) -> tuple[float, float, float]:
    """Least seconds of either layer, and the median over rounds of dense time over PoNet's."""
    x, context = torch.randn(1, tokens, WIDTH), sentences(tokens)
    taken: list[tuple[float, float]] = []
    for number in range(rounds + 1):
        start = time.perf_counter()
        layers.ponet(x, None, context)
        middle = time.perf_counter()
        layers.dense(x)
        if number:
            taken.append((middle - start, time.perf_counter() - middle))
    ours, dense = zip(*taken, strict=True)
    return min(ours), min(dense), statistics.median(d / o for o, d in taken)


def _kept(layer: PoNetLayer, tokens: int) -> int:
    """Bytes that autograd keeps for the backward pass, each storage once, parameters left out."""
    own = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out, _ = layer(torch.randn(1, tokens, WIDTH), None, sentences(tokens))
    del out
    return sum(kept.values())
