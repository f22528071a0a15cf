"""flash-linear-attention's Triton kernels in the place of our chunk forms, where there are a GPU and the library."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

KERNELS = ("linear_attn", "simple_gla", "gla", "delta_rule", "gated_delta_rule", "gated_delta_product")
"""Those that are used: ``fla.ops.NAME.chunk_NAME``."""


def usable(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernels take this: half precision on CUDA, outside torch.compile (they cannot be traced)."""
    return device.type == "cuda" and dtype in (torch.bfloat16, torch.float16) and not torch.compiler.is_compiling()


@cache
def find(kernel: str) -> Callable[..., Any] | None:
    """The kernel of that name, or ``None`` without the library."""
    if kernel not in KERNELS:
        raise ValueError(f"unknown kernel {kernel!r}; there are {', '.join(KERNELS)}")
    try:
        return getattr(importlib.import_module(f"fla.ops.{kernel}"), f"chunk_{kernel}", None)
    except ImportError:
        return None


def run(
    function: Callable[..., Any],
    query: Float[Tensor, "batch heads tokens key_dim"],
    key: Float[Tensor, "batch heads pairs key_dim"],
    value: Float[Tensor, "batch heads pairs value_dim"],
    settings: Mapping[str, Any],
    state: Float[Tensor, "batch heads key_dim value_dim"],
    scale: float,
    dtype: torch.dtype,
) -> tuple[Float[Tensor, "batch heads tokens value_dim"], Float[Tensor, "batch heads key_dim value_dim"]]:
    """Outputs in float32 and the state after them, from a kernel that works in ``dtype`` with tokens before heads.

    Gates among the ``settings`` are turned the same way and stay float32; a decay that forgets everything is held
    back, as ours is, since the kernels subtract sums of logarithms.
    """
    turned = (x.transpose(1, 2).to(dtype).contiguous() for x in (query, key, value))
    given = {
        name: setting.clamp(min=-120.0).transpose(1, 2).contiguous() if isinstance(setting, Tensor) else setting
        for name, setting in settings.items()
    }
    q, k, v = turned
    out, after = function(q=q, k=k, v=v, scale=scale, initial_state=state, output_final_state=True, **given)
    return out.transpose(1, 2).float(), after.float()
