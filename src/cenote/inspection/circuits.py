"""The key-query and output-value matrices of attention modules of other libraries."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cenote.ops.circuits import HeadCircuits, split_heads

SEPARATE = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q_lin", "k_lin", "v_lin"), ("q", "k", "v"))
FUSED = ("qkv", "c_attn", "qkv_proj", "Wqkv")
INTERLEAVED = "query_key_value"
"""Fused projections of GPT-NeoX, Falcon and BLOOM, whose rows go head by head."""
OUTPUT = ("o_proj", "out_proj", "proj", "c_proj", "out_lin", "dense", "o", "Wo")
HEADS = ("num_heads", "num_attention_heads", "n_heads")


@torch.no_grad()
def attention_circuits(
    attention: nn.Module,
    num_heads: int | None = None,
    num_key_value_heads: int | None = None,
    scale: float | None = None,
) -> HeadCircuits:
    """Circuits of an attention module of transformers, timm, torch or this library.

    Read are separate projections (Llama-, Qwen-, ViT-, CLIP-, BERT-type modules), fused ones with all queries in front
    (timm, GPT-2, this library, ``nn.MultiheadAttention``), under the names in common use. Where the module (or its
    ``config``) does not say how many heads there are, the caller must. Fused rows that interleave heads (GPT-NeoX,
    Falcon, BLOOM) are refused: split those by hand and call :func:`split_heads`.

    Raises:
        ValueError: no such projections, an unknown number of heads, or widths that the heads do not divide.
    """
    inner = getattr(attention, "self", None) or getattr(attention, "attention", None)
    inner = inner if isinstance(inner, nn.Module) else attention
    heads = num_heads or _setting(inner, HEADS) or _setting(attention, HEADS)
    if not heads:
        raise ValueError(f"{type(attention).__name__} does not say how many heads it has: give num_heads")
    output = _output(attention, inner)
    query, key, value = _projections(inner, heads, num_key_value_heads, output.shape[1])
    if num_key_value_heads is None:
        # The width of the keys says how many heads they have once that of a query's head is known.
        num_key_value_heads = max(1, len(key) * heads // len(query))
    if scale is None:
        own = getattr(inner, "scaling", getattr(inner, "scale", None))
        scale = float(own) if isinstance(own, float | int) else None
    return split_heads(query, key, value, output, heads, num_key_value_heads, scale)


def _projections(inner: nn.Module, heads: int, shared: int | None, output_width: int) -> tuple[Tensor, ...]:
    for names in SEPARATE:
        if all(isinstance(getattr(inner, name, None), nn.Module) for name in names):
            query, key, value = (_weight(getattr(inner, name)) for name in names)
            return query, key, value
    if isinstance(getattr(inner, INTERLEAVED, None), nn.Module):
        raise ValueError(
            f"the rows of {type(inner).__name__}.{INTERLEAVED} interleave heads: call split_heads yourself"
        )
    fused = next((_weight(getattr(inner, n)) for n in FUSED if isinstance(getattr(inner, n, None), nn.Module)), None)
    stored = getattr(inner, "in_proj_weight", None)  # nn.MultiheadAttention
    if fused is None and isinstance(stored, Tensor):
        fused = stored.detach()
    if fused is None:
        raise ValueError(f"{type(inner).__name__} has no query, key and value projections under a known name")
    if len(fused) == 3 * output_width:
        return fused.chunk(3)
    rest = len(fused) - output_width
    if rest <= 0 or rest % 2 or (shared is not None and rest // 2 * heads != output_width * shared):
        raise ValueError(f"a fused projection of width {len(fused)} does not split into queries, keys and values")
    return tuple(fused.split([output_width, rest // 2, rest // 2]))


def _output(attention: nn.Module, inner: nn.Module) -> Tensor:
    places = [inner, attention, getattr(attention, "output", None)]
    for place in places:
        for name in OUTPUT:
            found = getattr(place, name, None)
            if isinstance(found, nn.Sequential | nn.ModuleList) and len(found):
                found = found[0]
            if isinstance(found, nn.Module) and isinstance(getattr(found, "weight", None), Tensor):
                return _weight(found)
    raise ValueError(f"{type(attention).__name__} has no output projection under a known name")


def _weight(linear: Any) -> Tensor:
    weight = linear.weight.detach()
    # GPT-2's Conv1D keeps (in, out).
    return weight.T if type(linear).__name__ == "Conv1D" else weight


def _setting(module: Any, names: tuple[str, ...]) -> int | None:
    for place in (module, getattr(module, "config", None)):
        for name in names:
            value = getattr(place, name, None)
            if isinstance(value, int):
                return value
    return None
