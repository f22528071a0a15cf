"""HyLRA's profile of recorded queries and keys, and the layer policy that follows."""

import torch
from torch import Tensor

from cenote.attention.hylra_profile import ChunkSets, LayerStatistics
from cenote.ops.chunk_scores import TokenOrder
from cenote.ops.gather_attention import decode_logits
from cenote.ops.layer_policy import allowed_changes, choose_full_layers, merge_overlap, plan_sources
from golden.cases import Case

SIZES = {"kv_heads", "group", "layers", "head_dim", "steps", "keys", "sharp"}
OPTIONS = {"chunk_size", "sink", "recent", "preserved_tokens", "sparsity", "compute_ratio"}


@torch.no_grad()
def run(case: Case) -> dict[str, Tensor]:
    config = case.config
    if not case.target.startswith("layer-wise sparsity profile"):
        raise ValueError(f"unknown target {case.target!r}")
    unknown = set(config) - SIZES - OPTIONS
    if unknown:
        raise ValueError(f"unknown settings {sorted(unknown)}")
    keys, queries = case.inputs["keys"], case.inputs["queries"]
    kv_heads, layers, total, _ = keys.shape
    steps, group = queries.shape[2:4]
    size = config["chunk_size"]
    sets = ChunkSets(size, config["preserved_tokens"] // size, config["sink"] // size, config["recent"] // size)
    statistics = LayerStatistics(layers, sets)
    for step in range(steps):
        seen = total - (steps - 1) + step
        for layer in range(layers):
            query, key = queries[:, layer, step].flatten(0, 1), keys[:, layer, :seen]
            weights = decode_logits(query[None, :, None], key[None]).softmax(dim=-1)
            mean = weights.unflatten(1, (kv_heads, group)).mean(dim=2)
            statistics.add(layer, mean, TokenOrder.full(1, seen))
    full = choose_full_layers(statistics.ratio, config["sparsity"])
    merged = merge_overlap(statistics.overlap, full)
    allowed = allowed_changes(layers, len(full), config["sparsity"], config["compute_ratio"])
    policy = plan_sources(merged[None], allowed)
    return {
        "ratio90": statistics.ratio,
        "full_layers": torch.tensor(full),
        "overlap": statistics.overlap,
        "merged_overlap": merged,
        "max_changes": torch.tensor([allowed]),
        "changes": torch.tensor([policy.changes]),
        "path_min_sum": torch.tensor([policy.minimum, policy.total]),
        "parent": torch.tensor([-1 if source == layer else source for layer, source in enumerate(policy.sources)]),
    }
