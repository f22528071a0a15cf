"""The few types that pass between rooms.

Axis order is the same everywhere: hidden states ``(batch, layers, tokens, dim)``, tokens ``(batch, tokens, dim)``,
attention weights ``(batch, heads, queries, keys)``. Masks are boolean, ``True`` marks a real token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

Tokens = Float[Tensor, "batch tokens dim"]
Hidden = Float[Tensor, "batch layers tokens dim"]
Mask = Bool[Tensor, "batch tokens"]

TokenChoice = Literal["class", "patches", "both"]
Modality = Literal["image", "text", "audio", "graph"]
Task = Literal["classification", "multilabel", "regression"]
JudgedTask = Literal["verification", "similarity", "retrieval", "clustering"]
"""Tasks that judge vectors by each other instead of by a head's output."""
JUDGED_TASKS: tuple[JudgedTask, ...] = ("verification", "similarity", "retrieval", "clustering")


class Audio(NamedTuple):
    """A clip as it was recorded.

    Attributes:
        samples: one channel, between -1 and 1, ``(samples,)`` float32.
        rate: samples a second.
    """

    samples: Float[np.ndarray, "samples"]
    rate: int


class Grid(NamedTuple):
    """Rows and columns of the patch grid that follows the prefix tokens."""

    height: int
    width: int


@dataclass(frozen=True)
class Features:
    """What a backbone returns and a feature store keeps.

    Attributes:
        hidden: hidden states, ``(batch, layers, tokens, dim)``.
        mask: ``(batch, tokens)``, ``True`` for a real token.
        layers: which hidden state each entry of the layer axis is (0 = embeddings, n = after block n).
        grid: the patch grid behind the prefix tokens, or ``None`` for sequences.
        prefix: number of non-patch tokens in front (class token, registers).
        pooled: the encoder's own pooled output ``(batch, pooled_dim)`` where it has one.
    """

    hidden: Float[Tensor, "batch layers tokens dim"]
    mask: Bool[Tensor, "batch tokens"]
    layers: tuple[int, ...]
    grid: Grid | None = None
    prefix: int = 0
    pooled: Float[Tensor, "batch pooled_dim"] | None = None

    def tokens(self, choice: TokenChoice = "both", layer: int = -1) -> tuple[Tensor, Tensor]:
        """Tokens of one entry of the layer axis and their mask, ``(batch, tokens', dim)`` and ``(batch, tokens')``."""
        hidden, mask = self.select(choice)
        return hidden[:, layer], mask

    def select(self, choice: TokenChoice = "both") -> tuple[Tensor, Tensor]:
        """The chosen tokens of every kept layer: ``(batch, layers, tokens', dim)`` and their mask.

        ``"class"`` is the first token, ``"patches"`` all but the prefix, ``"both"`` everything.
        Prefix tokens are counted from the left of the row, so sequences must be padded on the right.
        """
        if choice == "both":
            return self.hidden, self.mask
        if choice == "class":
            if self.prefix < 1:
                raise ValueError("this backbone has no class token: choose tokens='patches' or 'both'")
            return self.hidden[:, :, :1], self.mask[:, :1]
        if choice == "patches":
            return self.hidden[:, :, self.prefix :], self.mask[:, self.prefix :]
        raise ValueError(f"tokens must be 'class', 'patches' or 'both', got {choice!r}")

    def to(self, device: torch.device | str) -> Features:
        """The same features on another device."""
        pooled = None if self.pooled is None else self.pooled.to(device)
        return Features(self.hidden.to(device), self.mask.to(device), self.layers, self.grid, self.prefix, pooled)


def resolve_layers(spec: str | int | Sequence[int], num_layers: int) -> tuple[int, ...]:
    """Turn ``"last" | "all" | "12,18" | [12, -1]`` into hidden-state numbers.

    Hidden state 0 is the embedding output, n the output of block n, ``num_layers`` the last; negative numbers count
    from the end; ``"all"`` means blocks 1 to ``num_layers``.
    """
    if spec == "last":
        return (num_layers,)
    if spec == "all":
        return tuple(range(1, num_layers + 1))
    try:
        numbers = (
            [int(part) for part in spec.split(",")]
            if isinstance(spec, str)
            else [spec]
            if isinstance(spec, int)
            else list(spec)
        )
    except ValueError:
        raise ValueError(f"layers must be 'last', 'all' or numbers such as '12,18', got {spec!r}") from None
    resolved = tuple(n + num_layers + 1 if n < 0 else n for n in numbers)
    wrong = [n for n in resolved if not 0 <= n <= num_layers]
    if wrong or not resolved:
        raise ValueError(f"layer numbers must lie in 0..{num_layers} (or -1 for the last), got {spec!r}")
    return resolved
