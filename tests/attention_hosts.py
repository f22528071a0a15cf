"""Small random decoders of the families that recipes serve."""

from __future__ import annotations

from typing import Any

import torch

SIZES = {
    "vocab_size": 64, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": None, "initializer_range": 0.2,
}  # fmt: skip

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma")


def decoder(family: str = "llama", seed: int = 0, **sizes: Any) -> Any:
    """A random causal language model of the family, in eval mode, with weights large enough for attention to matter."""
    import transformers

    name = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "gemma": "Gemma"}[family]
    settings = {**SIZES, **sizes}
    if family == "mistral":
        settings.setdefault("sliding_window", None)
    torch.manual_seed(seed)
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**settings))
    return model.eval().requires_grad_(False)


def padded(lengths: tuple[int, ...], vocab: int = 64, seed: int = 0, left: bool = True) -> tuple[Any, Any]:
    """Random token ids and their mask ``(batch, max(lengths))``, padded on the left (or right)."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.zeros(len(lengths), width, dtype=torch.long)
    mask = torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        part = slice(width - length, width) if left else slice(0, length)
        ids[row, part] = torch.randint(2, vocab, (length,), generator=generator)
        mask[row, part] = 1
    return ids, mask
