"""A toy in which it is known which blocks matter: keys planted for the queries of later blocks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cenote.attention.seer_gate import PrefillGate
from cenote.attention.seer_training import Shown, train_gates
from cenote.ops.block_gate import block_target
from cenote.ops.rotary import rotate

HEADS, DIM, TOKENS, BLOCK, SLOW = 2, 32, 1024, 32, 4
STRENGTH = 6.0


def planted_losses(seed: int, steps: int = 150) -> list[float]:
    """Losses of a gate, ten times the mean of a row's divergence, that sees a new draw of 1024 tokens every step."""
    torch.manual_seed(seed)
    gate = PrefillGate(HEADS, HEADS, DIM, BLOCK)
    places = torch.arange(TOKENS)[None]
    ones = torch.ones(1, 1, TOKENS, DIM)
    # Rotating ones gives cos - sin and cos + sin in the two halves.
    less, more = rotate(ones, places)[0, 0].chunk(2, dim=-1)
    cos, sin = (torch.cat([part, part], dim=-1) for part in ((more + less) / 2, (more - less) / 2))
    rotary = (cos[None, ::BLOCK], sin[None, ::BLOCK])
    seen = []
    for _ in range(steps):
        query, key = planted_tokens()
        target = block_target(rotate(query, places), rotate(key, places), BLOCK)
        seen.append({"0": Shown(*gate.pool(query, key), rotary, target)})
    return train_gates(nn.ModuleDict({"0": gate}), seen, steps=steps, learning_rate=1e-2, seed=seed)


def planted_tokens() -> tuple[Tensor, Tensor]:
    """Noise in which all queries of a block share a direction with one key of an earlier block.

    The direction lies in the slowest channels, whose rotation over the whole length is small.
    """
    query, key = torch.randn(2, 1, HEADS, TOKENS, DIM)
    slow = torch.cat([torch.arange(DIM // 2 - SLOW, DIM // 2), torch.arange(DIM - SLOW, DIM)])
    for head in range(HEADS):
        for block in range(1, TOKENS // BLOCK):
            direction = torch.zeros(DIM)
            direction[slow] = nn.functional.normalize(torch.randn(2 * SLOW), dim=0) * STRENGTH
            token = int(torch.randint(block * BLOCK, ()))
            query[0, head, block * BLOCK : (block + 1) * BLOCK] += direction
            key[0, head, token] += direction
    return query, key
