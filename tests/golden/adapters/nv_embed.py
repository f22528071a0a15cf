"""NV-Embed: the latent-attention layer alone, or behind its bidirectional Mistral."""

import torch
from torch import Tensor

from cenote.integrations.nv_embed import load_nv_embed_state
from cenote.pooling.latent_attention import LatentAttention
from golden.cases import Case


@torch.no_grad()
def run(case: Case) -> dict[str, Tensor]:
    mask = case.inputs["pool_mask"].bool()
    if case.target.startswith("LatentAttentionModel"):
        pool = LatentAttention.from_reference(case.state, **case.config).eval()
        hiddens = case.inputs["hiddens"]
        return {"tokens": pool.transform(hiddens), "embedding": pool(hiddens, mask)}
    if case.target.startswith("NVEmbedModel"):
        model, pool = load_nv_embed_state(case.state, case.config)
        attention_mask = case.inputs["attention_mask"]
        states = model(case.inputs["input_ids"], attention_mask=attention_mask).last_hidden_state
        return {"last_hidden_state": states * attention_mask[..., None], "sentence_embeddings": pool(states, mask)}
    raise ValueError(f"unknown target {case.target!r}")
