"""Efficient Probing, the thirteen other poolings of its benchmark, k-NN and training."""

import torch
from torch import Tensor

from cenote.pooling.base import Pooling, QueryPooling
from cenote.pooling.registry import pooling_class
from cenote.probe.knn import knn_grid
from golden.adapters import efficient_probing_train

# Class name at the end of the file's target -> pooling name.
POOLINGS = {
    "EfficientProbing": "efficient_probing",
    "ABMILPHead": "abmilp",
    "AttentionPoolingClassifier": "aim",
    "CAEAttentiveBlock": "cae",
    "CAPooling": "cait",
    "CbamPooling": "cbam",
    "AttentionPool2d": "clip",
    "CrossAttention": "coca",
    "DinoViTBlockPooling": "dinovit",
    "SpatialAttention2d": "dolg",
    "SimPool_nolinears": "esimpool",
    "AttentivePooler": "jepa",
    "AttentionPoolLatent": "siglip",
    "SimPool": "simpool",
}


def run(case) -> dict[str, Tensor]:
    if case.case == "train" or case.target.startswith("Sequential("):
        return efficient_probing_train.run(case)
    if case.case == "knn" or "knn" in case.target:
        return _knn(case)
    name = POOLINGS[case.target.rpartition(".")[2]]
    pool = pooling_class(name).from_reference(case.state, **case.config).eval()
    return _pool(case, pool, name)


def _pool(case, pool: Pooling, name: str) -> dict[str, Tensor]:
    mask = case.inputs["mask"].bool() if "mask" in case.inputs else None
    tokens, out = case.inputs["x"], {}
    if pool.attends:
        out["pooled"], weights = pool(tokens, mask, return_weights=True)
        out["attn"] = _official_layout(weights, pool, name, case)
    else:
        out["pooled"] = pool(tokens, mask)
    if "cls" in case.inputs and isinstance(pool, QueryPooling):
        out["pooled_cls"] = pool(tokens, mask, query_tokens=case.inputs["cls"])
    for key in ("pooled", "pooled_cls"):
        if key in out and key in case.outputs:
            # The official output keeps the queries of jepa and the heads of SimPool's power mean as axes.
            out[key] = out[key].reshape(case.outputs[key].shape)
    if "grad" in case.inputs:
        names = {"cls_token": "queries", "v.weight": "value.weight", "v.bias": "value.bias"}
        parameters = dict(pool.named_parameters())
        pool.zero_grad()
        (pool(tokens, mask) * case.inputs["grad"]).sum().backward()
        for key, shape in (
            (k.removeprefix("grad_"), v.shape) for k, v in case.outputs.items() if k.startswith("grad_")
        ):
            out[f"grad_{key}"] = parameters[names[key]].grad.reshape(shape)
    return out


def _official_layout(weights: Tensor, pool: Pooling, name: str, case) -> Tensor:
    """From ``(batch, queries * heads, tokens)`` with heads innermost to what the official layer returns."""
    if name == "abmilp":
        return weights.transpose(1, 2)[:, 1 if pool.content == "patch" else 0 :]
    if name == "dolg":
        return weights.unflatten(2, (round(weights.shape[2] ** 0.5), -1))
    if name in ("simpool", "esimpool", "siglip"):
        return weights.unflatten(1, (-1, pool.num_heads)).transpose(1, 2)
    return weights


def _knn(case) -> dict[str, Tensor]:
    config, inputs = case.config, case.inputs
    rows = knn_grid(
        inputs["train"], inputs["train_labels"], inputs["test"], inputs["test_labels"],
        neighbours=config["k"], temperatures=config["T"], num_classes=config["num_classes"],
    )  # fmt: skip
    return {"top1_top5": torch.tensor([[100 * row.top1, 100 * row.top5] for row in rows])}
