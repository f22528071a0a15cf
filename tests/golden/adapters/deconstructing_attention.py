"""Language models with another kind of attention in each layer: logits, and the maps of the layers that have one."""

import torch
from torch import Tensor

from cenote.integrations.deconstructed_qwen2 import DeconstructedQwen2Config, DeconstructedQwen2ForCausalLM
from golden.cases import Case

SETTINGS = {
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_theta", "tie_word_embeddings", "variants",
    "static_norm", "head_dim", "hidden_act", "initializer_range", "attention_dropout",
}  # fmt: skip
TARGET = "causal LM with per-layer attention variants"
BUFFERS = {"random_embeddings": "model.random_embeddings", "fixed_input_ids": "model.fixed_input_ids"}


@torch.no_grad()
def run(case: Case) -> dict[str, Tensor]:
    if case.target != TARGET:
        raise ValueError(f"unknown target {case.target!r}")
    unknown = set(case.config) - SETTINGS
    if unknown:
        raise ValueError(f"unknown settings {sorted(unknown)}")
    fixed = {ours: case.inputs[theirs] for theirs, ours in BUFFERS.items() if theirs in case.inputs}
    rows = {len(value) for value in fixed.values()}
    config = DeconstructedQwen2Config(
        **case.config, taylor_linear=False, fixed_rows=min(rows, default=None), attn_implementation="eager"
    )
    model = DeconstructedQwen2ForCausalLM(config).eval()
    own = model.state_dict()
    fixed = {name: value[: config.fixed_rows] for name, value in fixed.items() if name in own}
    tied = {"lm_head.weight": case.state["model.embed_tokens.weight"]} if config.tie_word_embeddings else {}
    model.load_state_dict({**tied, **case.state, **fixed})
    mask = case.inputs.get("attention_mask")
    out = model(case.inputs["input_ids"].long(), mask, output_attentions=True, use_cache=False)
    maps = [
        attention
        for attention, variant in zip(out.attentions, config.variants, strict=True)
        if attention is not None and variant != "approximate"
    ]
    results = {"logits": out.logits, **{f"attn{i}": attention for i, attention in enumerate(maps)}}
    if mask is None:
        return results
    return {name: _without_padding(value, mask.bool()) for name, value in results.items()}


def _without_padding(value: Tensor, mask: Tensor) -> Tensor:
    """Padded positions (queries, in a map) set to 0; a fixed map belongs to no item and stays."""
    if value.shape[0] != mask.shape[0]:
        return value
    keep = mask[:, :, None] if value.ndim == 3 else mask[:, None, :, None]
    return value.masked_fill(~keep, 0.0)
