"""What a frozen model shows the gates of SeerAttention-R: which blocks the queries of a text attended to."""

from __future__ import annotations

import math
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from cenote.attention.block_prefill import Prompt
from cenote.attention.seer_gate import DecodeGate, Rotary
from cenote.ops.block_gate import distillation_loss
from cenote.ops.decode_gate import decode_gate_logits, decode_target

DROP = 0.5
"""Share of a text's first tokens whose queries teach nothing, as in the published script: they see few blocks."""


@dataclass(frozen=True)
class ShownSteps:
    """What a layer showed of texts of one length to a gate that scores blocks for single queries.

    Attributes:
        query: queries without rotary positions from token ``first`` on, ``(batch, heads, rows, head_dim)``.
        key: pooled keys, ``(batch, kv_heads, blocks, key_width)``.
        query_rotary: positions of these queries.
        key_rotary: positions of the blocks' first tokens.
        target: largest attention to each earlier block, rows normalised, ``(batch, kv_heads, rows, blocks)``.
        first: number of the first token whose query teaches.
    """

    query: Tensor
    key: Tensor
    query_rotary: Rotary | None
    key_rotary: Rotary | None
    target: Tensor
    first: int

    @classmethod
    def of(cls, gate: DecodeGate, prompt: Prompt, drop: float = DROP) -> ShownSteps:
        """What the gate learns from in these prompts."""
        query, key = prompt.unrotated
        size, first = gate.block_size, math.floor(drop * key.shape[2])
        query_rotary = key_rotary = None
        if prompt.rotary is not None:
            cos, sin = prompt.rotary
            query_rotary = cos[:, first:].clone(), sin[:, first:].clone()
            key_rotary = cos[:, ::size].clone(), sin[:, ::size].clone()
        target = decode_target(prompt.query, prompt.key, size, prompt.scale)[:, :, first:].clone()
        return cls(query[:, :, first:].clone(), gate.pool(key), query_rotary, key_rotary, target, first)

    def loss(self, gate: DecodeGate, reduction: str = "mean") -> Float[Tensor, ""]:
        """``KL(target || softmax(logits))`` over the rows that are left, before the published factor of 10."""
        query, key = gate.queries(self.query, self.query_rotary), gate.compress(self.key, self.key_rotary)
        logits = decode_gate_logits(query, key, gate.block_size, self.first)
        return distillation_loss(logits, self.target, reduction, drop=0.0)
