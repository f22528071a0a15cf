"""How similar the attention maps of a model's layers are on some inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from cenote.attention.host import Host
from cenote.integrations.attention_interface import Attended, AttentionCall, redirected
from cenote.ops.attention_statistics import map_similarity


@dataclass
class SimilaritySum:
    """A running mean over samples.

    Attributes:
        layers: similarity of layers with layers.
        uniform: similarity of each layer with equal attention to everything that it sees.
        samples, tokens: how many went in.
    """

    layers: Tensor
    uniform: Tensor
    samples: int = 0
    tokens: int = 0


def layer_similarity(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], *, head_mean: bool = False
) -> Float[Tensor, "layers layers"]:
    """Mean over samples of the cosine similarity of two layers' attention maps, flattened over heads and positions.

    See :func:`measure_similarity`.
    """
    return measure_similarity(model, batches, head_mean=head_mean).layers


@torch.no_grad()
def measure_similarity(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], *, head_mean: bool = False, chunk: int = 64
) -> SimilaritySum:
    """The similarities of layers on these inputs, a batch at a time and ``chunk`` rows of the maps at a time.

    Args:
        model: a transformers decoder; put into eval mode meanwhile.
        batches: ``input_ids (batch, tokens)`` and, where there is padding, ``attention_mask``. Padding is left out.
        head_mean: compare the means over heads instead of all heads.

    Raises:
        ValueError: no sample, no token in a row, padding without a mask, layers whose attention is not causal softmax
            (sliding windows count as causal while the inputs are no longer than they are).
    """
    host = Host.of(model)
    total = SimilaritySum(torch.zeros(host.num_layers, host.num_layers), torch.zeros(host.num_layers))
    training = model.training
    model.eval()
    try:
        for batch in batches:
            ids, mask = _checked(batch, host)
            maps, scale = _query_key(model, host, ids, mask)
            query, key = maps[0]
            # Zero queries make equal logits: attention to everything that a token sees, in equal parts.
            maps.append((torch.zeros_like(query), key))
            alike = map_similarity(maps, mask, scale=scale, head_mean=head_mean, chunk=chunk).sum(dim=0).cpu()
            total.layers += alike[:-1, :-1]
            total.uniform += alike[:-1, -1]
            total.samples += len(ids)
            total.tokens += ids.numel() if mask is None else int(mask.sum())
    finally:
        model.train(training)
    if not total.samples:
        raise ValueError("expected a sample at least, got no batches")
    total.layers /= total.samples
    total.uniform /= total.samples
    return total


def _checked(batch: Mapping[str, Any], host: Host) -> tuple[Tensor, Bool[Tensor, "batch tokens"] | None]:
    ids, given = batch["input_ids"], batch.get("attention_mask")
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        raise ValueError("input_ids must be a tensor (batch, tokens): pad samples of different length and give a mask")
    device = next(host.decoder.parameters()).device
    ids = ids.to(device)
    if given is None:
        pad = getattr(host.config, "pad_token_id", None)
        if pad is not None:
            real = ids != pad
            inside = (real.cumsum(dim=1) > 0) & (real.flip(1).cumsum(dim=1) > 0).flip(1)
            lengths = inside.sum(dim=1)
            if bool((lengths != lengths[0]).any()):
                raise ValueError("the samples end in padding of different length: give their attention_mask")
    elif given.shape != ids.shape:
        raise ValueError(f"attention_mask has shape {tuple(given.shape)}, input_ids {tuple(ids.shape)}")
    mask = None if given is None else given.to(device).bool()
    if mask is not None and not bool(mask.any(dim=1).all()):
        raise ValueError("a sample has no real token")
    for layer, why in host.unserved().items():
        window = getattr(host.attentions[layer], "sliding_window", None)
        if not window or window < ids.shape[1]:
            raise ValueError(f"the maps of layer {layer} ({why}) cannot be compared: expected causal softmax attention")
    return ids, mask


def _query_key(
    model: nn.Module, host: Host, ids: Tensor, mask: Tensor | None
) -> tuple[list[tuple[Tensor, Tensor]], float]:
    """Queries and keys of every layer, positions rotated in, from one pass; and the factor on their product."""
    numbers = {id(attention): layer for layer, attention in enumerate(host.attentions)}
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    scales: set[float] = set()

    def listen(call: AttentionCall) -> Attended:
        layer = numbers.get(id(call.module))
        if layer is not None:
            seen[layer] = call.query, call.key
            scales.add(call.query.shape[-1] ** -0.5 if call.scaling is None else call.scaling)
        return call.proceed()

    arguments = {} if mask is None else {"attention_mask": mask.long()}
    with redirected(host.decoder, listen):
        host.decoder(input_ids=ids, use_cache=False, **arguments)
    if len(seen) != host.num_layers or len(scales) != 1:
        raise ValueError("expected every layer to make attention of its own, all with one factor on the logits")
    return [seen[layer] for layer in range(host.num_layers)], scales.pop()
