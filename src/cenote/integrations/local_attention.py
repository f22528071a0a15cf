"""Local regression as an attention implementation of transformers: the host's own queries, keys, values and cache."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

from cenote.ops.gates import share_heads
from cenote.ops.local_regression import local_constant, local_polynomial

_UNKNOWN = ("softcap", "s_aux", "position_bias")
"""What some hosts change their scores by."""


def register_local_attention(name: str = "local_linear", *, degree: Literal[0, 1] = 1, **settings: Any) -> str:
    """Give transformers an attention implementation of this name, for ``model.set_attn_implementation(name)``.

    A host's weights stay as they are: ``degree=0`` computes what its softmax attention does, ``degree=1`` follows the
    slope of the values as well, the less the larger the ridge. Keys of equal norm are what it is meant for. Works for
    hosts that use transformers' attention interface, with a cache, padding, sliding windows and shared key and value
    heads; without dropout. Source: "Test-time regression" (arXiv 2501.12352).

    Args:
        name: of the implementation.
        degree: 0 for :func:`cenote.ops.local_regression.local_constant`, 1 for
            :func:`cenote.ops.local_regression.local_polynomial`.
        **settings: of that function, such as ``ridge=1.0``.

    Returns:
        The name.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    def forward(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        is_causal: bool | None = None,
        sliding_window: int | None = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        unknown = [other for other in _UNKNOWN if others.get(other) is not None]
        if dropout or unknown:
            raise ValueError(f"{name} cannot do what {type(module).__name__} asks for: {unknown or 'dropout'}")
        causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
        heads = query.shape[1]
        # A pair is there if any query sees it: later ones and those beyond the window are hidden by number.
        seen = None if attention_mask is None else attention_mask.any(dim=2).expand(len(query), heads, -1)
        window = sliding_window if causal else None
        fit: Any = local_polynomial if degree else local_constant
        out = fit(
            query, share_heads(key, heads), share_heads(value, heads), seen,
            causal=causal, scale=scaling, window=window, **settings,
        )  # fmt: skip
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register(name, forward)
    AttentionMaskInterface.register(name, sdpa_mask)
    return name
