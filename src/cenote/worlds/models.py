"""A small network for worlds of symbols."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from cenote.mixing.base import MixerContext
from cenote.mixing.metaformer import MetaFormer


class SequenceModel(nn.Module):
    """Symbols through a :class:`cenote.mixing.MetaFormer` to logits over the symbols, at every position.

    Args:
        vocabulary: number of symbols.
        dim: token width.
        depth: number of blocks.
        mixers: pattern of mixers, ``"delta_rule, softmax_attention"``.
        max_length: adds a learned position embedding for this many tokens; ``None`` for none.
        classes: number of answers where it is not the vocabulary.
        init_std: standard deviation of symbol and position embeddings. At 1 a symbol stands out beside what the mixers
            add to it (a few tenths at the start); far below, the first block drowns it and circuits that need two
            blocks, such as recall, form late or not at all. The head's weights always start at 0.02.
        **stack: further settings of :class:`cenote.mixing.MetaFormer`.
    """

    def __init__(
        self,
        vocabulary: int,
        dim: int,
        depth: int,
        mixers: str,
        *,
        max_length: int | None = None,
        classes: int | None = None,
        causal: bool = True,
        init_std: float = 1.0,
        **stack: Any,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, dim)
        self.position = None if max_length is None else nn.Parameter(init_std * torch.randn(max_length, dim))
        self.stack = MetaFormer(dim, depth, mixers, causal=causal, **stack)
        self.head = nn.Linear(dim, classes or vocabulary, bias=False)
        nn.init.normal_(self.embedding.weight, std=init_std)
        nn.init.normal_(self.head.weight, std=0.02)

    def forward(
        self,
        symbols: Int[Tensor, "batch tokens"],
        mask: Tensor | None = None,
        context: MixerContext | None = None,
    ) -> Float[Tensor, "batch tokens classes"]:
        """Logits at every position."""
        tokens = self.embedding(symbols)
        if self.position is not None:
            if symbols.shape[1] > len(self.position):
                raise ValueError(f"built for {len(self.position)} positions, got {symbols.shape[1]}")
            tokens = tokens + self.position[: symbols.shape[1]]
        return self.head(self.stack(tokens, mask, context))
