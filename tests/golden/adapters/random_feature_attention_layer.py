"""The layer, its ridge fit, the two-layer network beside it, and the kernel of infinitely many heads."""

import torch
from torch import Tensor

from cenote.mixing.random_feature_attention_layer import RandomFeatureAttentionLayer
from cenote.ops.random_features import attention_scores, mlp_features
from golden.cases import Case

KNOWN = {"d", "n_keys", "heads", "biased", "n_train", "ridge_lambda", "activation"}


@torch.no_grad()
def run(case: Case) -> dict[str, Tensor]:
    if not case.target.startswith("random-feature attention layer"):
        raise ValueError(f"unknown target {case.target!r}")
    unknown = set(case.config) - KNOWN
    if unknown:
        raise ValueError(f"unknown settings {sorted(unknown)}")
    query, keys, targets = (case.inputs[name].double() for name in ("query", "keys", "targets"))
    mask, train, state = case.inputs["mask"].bool(), case.config["n_train"], case.state
    settings = {"biased": case.config["biased"], "activation": case.config.get("activation", "relu")}
    layer = RandomFeatureAttentionLayer.from_reference({k: v.double() for k, v in state.items()}, **settings)
    results = {
        "scores": attention_scores(query, keys, layer.weight),
        "features": layer.features(query, keys, mask),
        "prediction": layer(query, keys, mask),
        "mlp_features": mlp_features(query, keys, state["mlp_weight"].double(), mask),
    }
    if "gram_infinite" in case.outputs:
        results["gram_infinite"] = layer.kernel(query, keys, mask=mask)
    layer.fit(query[:train], keys[:train], targets[:train], mask[:train], penalty=case.config["ridge_lambda"])
    results["ridge_value"] = layer.value
    results["ridge_prediction"] = layer(query[train:], keys[train:], mask[train:])
    return results
