"""The norms of a block, for tokens and for feature maps."""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn

NormKind = Literal["layer", "group", "rms", "batch", "none"]


class LayerNormChannel(nn.LayerNorm):
    """Layer norm of a feature map over its channels, at each cell by itself."""

    def forward(self, input: Float[Tensor, "batch dim height width"]) -> Float[Tensor, "batch dim height width"]:
        return super().forward(input.movedim(1, -1)).movedim(-1, 1)


def make_norm(kind: NormKind, dim: int, layout: Literal["tokens", "map"], eps: float = 1e-5) -> nn.Module:
    """A norm of width ``dim``.

    ``"layer"`` is over the channels of each token or cell, ``"group"`` over channels and cells of a whole map (one
    group, PoolFormer's), ``"rms"`` without mean, ``"batch"`` over items and cells, ``"none"`` nothing.

    Raises:
        ValueError: a norm that the layout does not have.
    """
    kinds: dict[tuple[str, str], type[nn.Module]] = {
        ("layer", "tokens"): nn.LayerNorm, ("rms", "tokens"): nn.RMSNorm,
        ("layer", "map"): LayerNormChannel, ("batch", "map"): nn.BatchNorm2d,
    }  # fmt: skip
    if kind == "none":
        return nn.Identity()
    if kind == "group" and layout == "map":
        return nn.GroupNorm(1, dim, eps=eps)
    if (kind, layout) not in kinds:
        raise ValueError(f"there is no norm {kind!r} for {layout}; there are layer, rms, none (tokens), "
                         "layer, group, batch, none (map)")  # fmt: skip
    return kinds[kind, layout](dim, eps=eps)
