"""Heads with learned latents in the published order of operations, on the library's own parameters.

Nothing is computed once that the official codes compute for every sequence, nothing is folded, and means come last.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from cenote.pooling.cross_block import LatentBlock


def tokens_read(block: LatentBlock, tokens: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
    """NV-Embed's layer before its mean: tokens ask, latents answer."""
    latents = block.latents.expand(tokens.shape[0], -1, -1)
    read = _attention(block, block.token_norm(tokens), block.latent_norm(latents)) + tokens
    return _mlp(block, read) + read


def latents_read(
    block: LatentBlock,
    inputs: Float[Tensor, "batch inputs dim"],
    mask: Bool[Tensor, "batch inputs"] | None = None,
) -> Float[Tensor, "batch dim"]:
    """The trainable head of "Pooling And Attention": latents ask, tokens or layer vectors answer."""
    latents = block.latents.expand(inputs.shape[0], -1, -1)
    read = _attention(block, block.latent_norm(latents), block.token_norm(inputs), mask) + latents
    return (_mlp(block, read) + read).mean(dim=1)


def multiplications(call: Callable[[], Any]) -> int:
    """Multiply-adds of the matrix products in ``call()``; works on the meta device too."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return counter.get_total_flops() // 2


def _attention(block: LatentBlock, asking: Tensor, read: Tensor, mask: Tensor | None = None) -> Tensor:
    keys, values = block.key_value(read).chunk(2, dim=-1)
    q, k, v = (x.unflatten(-1, (block.num_heads, -1)).transpose(1, 2) for x in (block.query(asking), keys, values))
    scores = q @ k.mT / block.head_dim**0.5
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], float("-inf"))
    return block.out((scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2))


def _mlp(block: LatentBlock, x: Tensor) -> Tensor:
    a, g = block.mlp_in(block.mlp_norm(x)).chunk(2, dim=-1)
    return block.mlp_out(a * F.gelu(g))
