"""The few hidden dimensions in which a language model's sink tokens have massive activations, found by measurement."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cenote.attention.host import Host

KNOWN = {
    "llama-2-7b": (1415, 2533),
    "llama-2-13b": (2100, 4743),
    "qwen2-7b": (458, 2570),
    "internvl2-8b": (3584,),
}
"""Published sink dimensions by language model (arXiv 2503.03321)."""


@torch.no_grad()
def find_sink_dimensions(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    tau: float = 20.0,
    share: float = 0.5,
) -> tuple[int, ...]:
    """Dimensions whose activation of the first real token exceeds ``tau`` times its RMS in more than ``share`` of the
    middle layers, on average over the inputs. Source: arXiv 2503.03321, whose search is not published.

    The middle layers are those but the first two and the last; a layer's input is what counts.

    Args:
        model: a transformers model with a text decoder.
        batches: what its forward takes, with ``attention_mask`` where there is padding.

    Raises:
        ValueError: no inputs, or no dimension that stands out so far: lower ``tau``, or the model has no sinks.
    """
    host = Host.of(model)
    layers = range(2, host.num_layers - 1) or range(host.num_layers)
    seen: dict[int, Tensor] = {}
    first: list[Tensor] = []

    def note(layer: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = (kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]).float()
            x = x[torch.arange(len(x), device=x.device), first[-1].to(x.device)]
            size = x.abs() / (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()
            seen[layer] = seen.get(layer, torch.zeros(x.shape[-1], device=x.device)) + (size > tau).float().sum(dim=0)

        return hook

    handles = [host.layers[n].register_forward_pre_hook(note(n), with_kwargs=True) for n in layers]
    rows = 0
    try:
        for batch in batches:
            mask = batch.get("attention_mask")
            size = next(iter(batch.values())).shape[0]
            first.append(torch.zeros(size, dtype=torch.long) if mask is None else mask.long().argmax(dim=1))
            rows += size
            model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    if not rows:
        raise ValueError("there is no input to find sink dimensions on")
    found = torch.stack([count / rows for count in seen.values()]).mean(dim=0) > share
    if not bool(found.any()):
        raise ValueError(
            f"no dimension of the first token exceeds {tau} times its RMS in most middle layers: lower tau, or the "
            "model has no massive activations"
        )
    return tuple(found.nonzero().flatten().tolist())
