"""Prompts attending to blocks that a rule of thumb picks: what a learned gate is compared with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from cenote.attention.block_prefill import BlockPrefill, Prompt, Scorer
from cenote.attention.host import Host
from cenote.ops.block_gate import block_logits, quest_bounds
from cenote.ops.blocks import num_blocks, pool_blocks


@dataclass(frozen=True)
class BlockHeuristic(BlockPrefill):
    """Prompts attend to the blocks that a rule of thumb scores highest; nothing is learnt.

    ``"mean_pooled"``: inner product of the blocks' mean queries and keys. ``"quest"``: the upper bound of
    :func:`~cenote.ops.block_gate.quest_bounds`. ``"local"``: the nearest blocks. ``"random"``: any blocks, drawn anew
    for each layer and length. Baselines of SeerAttention (arXiv 2410.13276) at equal density.

    Args:
        rule: one of those.
        seed: of ``"random"``.

    Raises:
        ValueError: an unknown rule, or settings of :class:`~cenote.attention.block_prefill.BlockPrefill` out of range.
    """

    name: ClassVar[str] = "block_heuristic"

    rule: str = "mean_pooled"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rule not in ("mean_pooled", "quest", "local", "random"):
            raise ValueError(f"rule must be 'mean_pooled', 'quest', 'local' or 'random', got {self.rule!r}")

    def scorer(self, host: Host, layers: list[int]) -> Scorer:
        rules: dict[str, Callable[[Prompt], Tensor]] = {
            "mean_pooled": self._mean_pooled, "quest": self._quest, "local": self._local, "random": self._random
        }  # fmt: skip
        return rules[self.rule]

    def _mean_pooled(self, prompt: Prompt) -> Tensor:
        query, key = (pool_blocks(x, self.block_size).float() for x in (prompt.query, prompt.key))
        return block_logits(query, key) * (prompt.scale * query.shape[-1] ** 0.5)

    def _quest(self, prompt: Prompt) -> Tensor:
        return quest_bounds(prompt.query, prompt.key, self.block_size) * prompt.scale

    def _local(self, prompt: Prompt) -> Tensor:
        batch, heads, tokens, _ = prompt.query.shape
        places = torch.arange(num_blocks(tokens, self.block_size), device=prompt.query.device)
        return -(places[:, None] - places).abs().float().expand(batch, heads, -1, -1)

    def _random(self, prompt: Prompt) -> Tensor:
        batch, heads, tokens, _ = prompt.query.shape
        blocks = num_blocks(tokens, self.block_size)
        # One draw for all rows of a batch, so that a row does not depend on its place.
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + prompt.layer)
        scores = torch.rand(heads, blocks, blocks, generator=generator)
        return scores.to(prompt.query.device).expand(batch, -1, -1, -1)
