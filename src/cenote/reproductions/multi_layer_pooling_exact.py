"""Pooling And Attention: what holds exactly (reference tensors, masks, symmetries, rewrites), and costs."""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cenote.backbones.collect import collect
from cenote.backbones.hooks import find_blocks
from cenote.pooling.multi_layer import LatentPooling, MultiLayerPooling
from cenote.reproductions.base import Finding, finding
from cenote.reproductions.golden import golden_findings
from cenote.reproductions.latent_published import latents_read, multiplications

DIM, LAYERS = 24, 6
PUBLISHED: dict[str, Any] = {"dim": 4096, "num_latents": 768, "num_heads": 32, "head_dim": 2048}


def exact_findings() -> list[Finding]:
    """Everything that needs no training and no clock."""
    return [
        *golden_findings("multi-layer-pooling"),
        *_padding(),
        *_symmetries(),
        *_one_token(),
        *_rewrites(),
        *_costs(),
        *_memory(),
    ]


def _head(kind: type[nn.Module], seed: int = 0, **options: Any) -> Any:
    """A head with norms and biases away from their start, so that leaving one out would show."""
    sizes = {"dim": DIM, "num_latents": 16, "num_heads": 4, "head_dim": 12}
    if kind is MultiLayerPooling:
        sizes["num_layers"] = LAYERS
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pool = kind(**{**sizes, **options})
        for name, parameter in pool.named_parameters():
            if "norm" in name or name.endswith("bias"):
                nn.init.normal_(parameter, mean=float(name.endswith("norm.weight")), std=0.3)
    return pool.eval()


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def _padding() -> list[Finding]:
    """Every masked head on rows alone and on the same rows with NaN padding, of two amounts, on either side."""
    hidden = _noise(3, LAYERS, 7, DIM)
    heads: list[tuple[Any, Tensor]] = [
        (_head(LatentPooling, tokens=t, normalize=True), hidden[:, -1]) for t in ("all", "last")
    ]
    heads += [(_head(MultiLayerPooling, layer_vector=v, normalize=True), hidden) for v in ("mean", "last")]
    worst = 0.0
    for pool, x in heads:
        for amount in (1, 9):
            pad = x.new_full((*x.shape[:-2], amount, DIM), float("nan"))
            for padded in (torch.cat([x, pad], dim=-2), torch.cat([pad, x], dim=-2)):
                mask = ~padded.reshape(3, -1, x.shape[-2] + amount, DIM)[:, 0].isnan().any(dim=-1)
                worst = max(worst, _apart(pool(padded, mask), pool(x)))
    x, pad = hidden[:, -1], _noise(3, 5, DIM)
    mask = torch.arange(12).expand(3, -1) < 7
    leak = _apart(_head(LatentPooling, attend_padding=True)(torch.cat([x, pad], dim=1), mask), _head(LatentPooling)(x))
    return [
        _at_most(
            "Side and amount of padding change no embedding of a masked head.",
            worst,
            1e-5,
            note=f"Padding is NaN here. Padding of noise moves design 4 as published, with the leak, by {leak:.2g}.",
        )
    ]


@torch.no_grad()
def _symmetries() -> list[Finding]:
    hidden = _noise(3, LAYERS, 7, DIM)
    worst = 0.0
    for kind, x in ((LatentPooling, hidden[:, -1]), (MultiLayerPooling, hidden)):
        pool, permuted = _head(kind, normalize=True), _head(kind, normalize=True)
        permuted.block.latents.copy_(pool.block.latents.flip(0))
        worst = max(worst, _apart(permuted(x), pool(x)))
    pool, swapped = _head(MultiLayerPooling, normalize=True), _head(MultiLayerPooling, normalize=True)
    order = [3, 1, 2, 0, 4, 5]
    swapped.layer_vectors.copy_(pool.layer_vectors[order])
    alone = _apart(pool(hidden[:, order]), pool(hidden))
    return [
        _at_most("Permuting the latents changes nothing.", worst, 1e-5),
        _at_most(
            "Swapping two layers together with their learned vectors changes nothing.",
            _apart(swapped(hidden[:, order]), pool(hidden)),
            1e-5,
            note=f"Swapping the layers alone moves the embedding by {alone:.2g}.",
        ),
    ]


def _one_token() -> list[Finding]:
    pool = _head(LatentPooling, tokens="last")
    vector, weights = pool(_noise(3, 7, DIM), return_weights=True)
    (vector * _noise(3, DIM)).sum().backward()
    gradient = pool.block.query.weight.grad
    return [
        _at_most(
            "Design 2: all attention is on the last token.", _apart(weights[..., -1].detach(), torch.ones(3, 16)), 0.0
        ),
        _at_most(
            "Design 2: the query projection gets no gradient.",
            0.0 if gradient is None else float(gradient.abs().max()),
            0.0,
            unit="max abs gradient",
        ),
    ]


@torch.no_grad()
def _rewrites() -> list[Finding]:
    """Sizes at which each of the three orders of products is the cheapest."""
    worst = 0.0
    for sizes in ({}, {"num_latents": 20, "head_dim": 5}, {"num_latents": 4, "head_dim": 30}):
        pool = _head(LatentPooling, **sizes)
        for tokens in (1, 7, 60):
            x, mask = (
                _noise(3, tokens, DIM),
                torch.arange(tokens) < torch.tensor([tokens, 1, max(1, tokens // 2)])[:, None],
            )
            worst = max(worst, _apart(pool(x, mask), latents_read(pool.block, x, mask)))
        multi = _head(MultiLayerPooling, **sizes)
        vectors = _noise(3, LAYERS, DIM)
        worst = max(worst, _apart(multi.pool_layers(vectors), latents_read(multi.block, vectors + multi.layer_vectors)))
    return [_at_most("Queries made once and reordered products are the published function in float32.", worst, 1e-5)]


def _costs() -> list[Finding]:
    with torch.device("meta"):
        pool = MultiLayerPooling(**PUBLISHED, num_layers=32).eval().requires_grad_(False)
        vectors, short, long = (torch.empty(1, *shape, 4096) for shape in ((32,), (32, 8), (32, 512)))
    published = multiplications(lambda: latents_read(pool.block, vectors))
    multiplications(lambda: pool.pool_layers(vectors))
    ours = multiplications(lambda: pool.pool_layers(vectors))
    at_8, at_512 = (multiplications(partial(pool, hidden)) for hidden in (short, long))
    return [
        finding(
            "At the published sizes the rewrites save most of the head's work.",
            "at least 3.2 x (specification: 590 G to 185 G)",
            published / ours,
            lambda v: v >= 3.2,
            unit="x multiplications",
            note=(
                f"{published / 1e9:.0f} G a sequence in the published order, {ours / 1e9:.0f} G here in eval mode. "
                "Beyond what was specified, the MLP's second matrix is applied to the mean over latents."
            ),
        ),
        finding(
            "Design 5: behind the layer means the head's work does not depend on the number of tokens.",
            "1",
            at_512 / at_8,
            lambda v: v == 1,
            unit="x multiplications, 512 tokens over 8",
        ),
    ]


def _memory() -> list[Finding]:
    """Hosts of 4 and 12 layers on 16 and 256 tokens: what is kept, and how many full hidden states live at once."""
    seen = {(layers, tokens): _streamed(layers, tokens) for layers in (4, 12) for tokens in (16, 256)}
    kept = [numbers / (layers * DIM) for (layers, _), (numbers, _) in seen.items()]
    return [
        finding(
            "With streaming reduction an item keeps one vector a layer, whatever the number of tokens.",
            "1 (x layers x width)",
            max(kept),
            lambda v: v == 1,
            unit="x layers x width",
            note="The largest of hosts of 4 and 12 layers on 16 and 256 tokens; keeping all states would be 256.",
        ),
        finding(
            "With streaming reduction no more full hidden states live at once than a block's input and output.",
            "at most 2",
            float(max(alive for _, alive in seen.values())),
            lambda v: v <= 2,
            unit="hidden states",
            note=f"Without reduction {_streamed(12, 16, reduce=False)[1]} live at once in a host of 12 layers.",
        ),
    ]


@torch.inference_mode()
def _streamed(layers: int, tokens: int, reduce: bool = True) -> tuple[int, int]:
    """Numbers kept for an item, and the most full hidden states that were alive when one was reduced."""
    from transformers import LlamaConfig, LlamaModel

    settings: dict[str, Any] = {"vocab_size": 61, "hidden_size": DIM, "intermediate_size": 40, "num_attention_heads": 3}
    host = LlamaModel(LlamaConfig(**settings, num_hidden_layers=layers)).eval()
    pool = _head(MultiLayerPooling, num_layers=layers)
    states: list[weakref.ref[Tensor]] = []
    alive = []

    def watch(hidden: Tensor, mask: Tensor) -> Tensor:
        states.append(weakref.ref(hidden))
        alive.append(sum(state() is not None for state in states))
        return pool.reduce_layer(hidden, mask) if reduce else hidden

    ids = torch.arange(tokens)[None] % 61
    forward = lambda: (host(ids, use_cache=False).last_hidden_state, None)  # noqa: E731
    features = collect(forward, find_blocks(host, layers), tuple(range(1, layers + 1)), watch)
    return features.hidden.numel(), max(alive)


def _apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def _at_most(claim: str, value: float, bound: float, note: str = "", unit: str = "max abs difference") -> Finding:
    expected = f"at most {bound:g}" if bound else "0"
    return finding(claim, expected, value, lambda v: v <= bound, unit=unit, note=note)
