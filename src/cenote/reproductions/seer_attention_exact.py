"""What holds of SeerAttention whatever the weights: limits, padding, the training target."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from cenote.attention.block_prefill import BlockPrefillSession
from cenote.attention.seer_attention import SeerAttention
from cenote.ops.attention_statistics import block_maxima
from cenote.ops.block_gate import block_target
from cenote.ops.block_sparse import block_sparse_attention
from cenote.ops.blocks import block_mask_to_tokens
from cenote.reproductions.base import Finding, at_most
from cenote.reproductions.golden import golden_findings


def exact_findings() -> list[Finding]:
    """The reference file, density 1, padding, the streamed target, both backends' common meaning."""
    return [*golden_findings("seer-attention"), *_limits_and_padding(), *_target(), _sparse_is_masked_dense()]


@torch.no_grad()
def _logits(model: LlamaForCausalLM, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    return model(input_ids=ids, attention_mask=mask, use_cache=False).logits


def _limits_and_padding() -> list[Finding]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=48, intermediate_size=64, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, head_dim=8, initializer_range=0.2, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    lengths = (90, 57, 11)
    ids = torch.randint(2, 64, (3, 90))
    mask = torch.arange(90) >= 90 - torch.tensor(lengths)[:, None]
    recipe = SeerAttention(block_size=8, nz_ratio=0.3, last_block_dense=False)
    recipe = recipe.calibrate(model, [{"input_ids": ids, "attention_mask": mask.long()}], steps=30)
    dense = _logits(model, ids, mask.long())
    away = {}
    for name, every in (("nz_ratio 1", replace(recipe, nz_ratio=1.0)), ("threshold 0", replace(recipe, threshold=0.0))):
        with every(model):
            away[name] = float((_logits(model, ids, mask.long()) - dense)[mask].abs().max())
    with recipe(model) as session:
        together = _logits(model, ids, mask.long())
        single = [_logits(model, ids[row : row + 1, -length:])[0] for row, length in enumerate(lengths)]
    apart = max(
        float((together[row, -length:] - alone).abs().max())
        for row, (length, alone) in enumerate(zip(lengths, single, strict=True))
    )
    assert isinstance(session, BlockPrefillSession)
    note = f"Density {session.density():.2f}; lengths {lengths} padded on the left."
    return [
        *(
            at_most(f"With {name} a model's logits are those of dense attention.", value, 1e-5)
            for name, value in away.items()
        ),
        at_most("The logits of a padded batch are those of single runs.", apart, 1e-4, note=note),
    ]


def _target() -> list[Finding]:
    torch.manual_seed(0)
    query, key = 2 * torch.randn(2, 4, 150, 16), torch.randn(2, 2, 150, 16)
    logits = query @ key.repeat_interleave(2, dim=1).transpose(-1, -2) / 4
    dense = logits.masked_fill(torch.ones(150, 150, dtype=torch.bool).triu(1), float("-inf")).softmax(-1)
    wide = torch.nn.functional.pad(dense, (0, 10, 0, 10)).unflatten(3, (-1, 16)).unflatten(2, (-1, 16))
    target = block_target(query, key, 16)
    return [
        at_most(
            "The block map that is made one row of blocks at a time is the pooled dense map.",
            float((block_maxima(query, key, 16) - wide.amax(dim=(3, 5))).abs().max()),
            1e-6,
        ),
        at_most("Rows of the target sum to 1.", float((target.sum(-1) - 1).abs().max()), 1e-5),
    ]


def _sparse_is_masked_dense() -> Finding:
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 4, 150, 16), torch.randn(2, 2, 150, 16), torch.randn(2, 2, 150, 16)
    blocks = torch.rand(2, 4, 10, 10) < 0.3
    blocks |= torch.eye(10, dtype=torch.bool)
    pairs = block_mask_to_tokens(blocks, 16, 150, 150) & torch.ones(150, 150, dtype=torch.bool).tril()
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key.repeat_interleave(2, dim=1), value.repeat_interleave(2, dim=1), pairs
    )
    found = block_sparse_attention(query, key, value, blocks, 16, backend="torch")
    return at_most(
        "Attention over chosen blocks is dense attention under their mask.", float((found - expected).abs().max()), 1e-5
    )
