"""Which layers of a decoder should copy an attention map, by how similar the layers' maps are, and what that saves."""

from __future__ import annotations

from itertools import takewhile

import torch
from jaxtyping import Float
from torch import Tensor


def inner_layers(similarity: Float[Tensor, "layers layers"]) -> range:
    """The inner layers of EchoAtt: all but the first and last few whose maps are unlike the other layers'.

    A layer's score is the mean similarity to the others. Sorted scores are cut at the largest gap; the longest run of
    low layers from the front and from the back stays outside. How many layers count as first or last the paper leaves
    open; low layers further in are inner ones here.

    Raises:
        ValueError: fewer than three layers, or a matrix that is not square, finite and symmetric.
    """
    _check(similarity)
    layers = len(similarity)
    scores = (similarity.sum(dim=1) - similarity.diagonal()) / (layers - 1)
    ordered = scores.sort().values
    threshold = ordered[int((ordered[1:] - ordered[:-1]).argmax())]
    low = (scores <= threshold).tolist()
    first = len(list(takewhile(bool, low)))
    last = layers - len(list(takewhile(bool, reversed(low))))
    return range(first, last)


def choose_by_gap(similarity: Float[Tensor, "layers layers"], block_size: int = 2) -> tuple[int, ...]:
    """Layers that share, when the inner layers are cut into blocks of ``block_size`` whose first layer computes.

    Raises:
        ValueError: see :func:`inner_layers`; a block of fewer than two layers.
    """
    if block_size < 2:
        raise ValueError(f"a block that shares has 2 layers at least, got block_size={block_size}")
    inner = inner_layers(similarity)
    return tuple(layer for place, layer in enumerate(inner) if place % block_size)


def choose_by_similarity(similarity: Float[Tensor, "layers layers"], ratio: float) -> tuple[int, ...]:
    """``round(ratio * layers)`` layers that share, added one at a time: each time the one that loses least similarity.

    A shared layer copies from the nearest earlier layer that is not shared, and ``1 - similarity`` to it is lost; a
    layer that becomes shared passes its own followers on to its source.

    Raises:
        ValueError: a ratio that shares no layer, or the first one too; fewer than three layers, or a matrix that is
            not square, finite and symmetric.
    """
    _check(similarity)
    layers = len(similarity)
    count = round(ratio * layers)
    if not 0 < count < layers:
        raise ValueError(f"a ratio of {ratio} shares {count} of {layers} layers: expected 1 to {layers - 1}")
    alike = similarity.tolist()
    chosen: set[int] = set()

    def lost(shared: set[int]) -> float:
        total, source = 0.0, 0
        for layer in range(layers):
            if layer in shared:
                total += 1 - alike[layer][source]
            else:
                source = layer
        return total

    for _ in range(count):
        rest = [layer for layer in range(1, layers) if layer not in chosen]
        chosen.add(min(rest, key=lambda layer: lost(chosen | {layer})))
    return tuple(sorted(chosen))


def removed_parameters(
    shared: int, hidden: int, heads: int, kv_heads: int, head_dim: int, *, bias: bool = False, qk_norm: bool = False
) -> int:
    """Parameters that ``shared`` layers lose with their query and key projections: ``hidden (H + Hk) D`` each.

    Args:
        bias: whether the projections have biases (Qwen2): ``(H + Hk) D`` more.
        qk_norm: whether queries and keys have norms (Qwen3): ``2 D`` more.
    """
    width = (heads + kv_heads) * head_dim
    return shared * (hidden * width + bias * width + qk_norm * 2 * head_dim)


def saved_flops(shared: int, hidden: int, heads: int, kv_heads: int, head_dim: int, keys: int) -> int:
    """Operations that ``shared`` layers save for one token over ``keys`` keys: ``2 hidden (H + Hk) D + 2 keys H D``."""
    return shared * (2 * hidden * (heads + kv_heads) * head_dim + 2 * keys * heads * head_dim)


def _check(similarity: Tensor) -> None:
    square = similarity.ndim == 2 and similarity.shape[0] == similarity.shape[1]
    if not square or not bool(similarity.isfinite().all()):
        raise ValueError(f"expected a finite similarity of layers with layers, got shape {tuple(similarity.shape)}")
    if not torch.allclose(similarity, similarity.T, atol=1e-4):
        raise ValueError("expected a symmetric similarity")
    if len(similarity) < 3:
        raise ValueError(f"an automatic choice of layers needs 3 at least, got {len(similarity)}")
