"""COSTARR: its baselines (OpenOOD, GHOST) and its metrics; the score itself has no official code."""

import torch
from torch import Tensor

from cenote.inspection.open_set_ghost import GHOST
from cenote.inspection.open_set_logits import MSP, Energy, MaxLogit
from cenote.inspection.open_set_neighbours import KNN, NNGuide
from cenote.inspection.open_set_vim import ViM
from cenote.ops.open_set import auoscr, auroc, oscr_curve
from golden.cases import Case


def run(case: Case) -> dict[str, Tensor]:
    if "score" in case.inputs:
        return _metrics(case.inputs["score"], case.inputs["pred"], case.inputs["labels"])
    config, inputs = case.config, case.inputs
    head = case.state["weight"], case.state["bias"]
    methods = {
        "msp": MSP(*head),
        "maxlogit": MaxLogit(*head),
        "energy": Energy(*head, temperature=config["energy_temperature"]),
        "knn": KNN(*head, k=config["knn_k"]),
        "nnguide": NNGuide(*head, k=config["nnguide_k"], fraction=config["nnguide_alpha"]),
        "vim": ViM(*head, dim=config["vim_dim"]),
        "ghost": GHOST(*head, pareto=inputs.get("ghost_gpd")),
    }
    for method in methods.values():
        method.fit(inputs["train_features"], inputs["train_labels"])
    features, labels = inputs["features"], inputs["labels"]
    results = {name: method.score(features) for name, method in methods.items()}
    logits = methods["msp"].logits(features)
    predictions = logits.argmax(dim=1)
    curves = {name: oscr_curve(score, predictions, labels) for name, score in results.items()}
    areas = {
        f"metrics.{name}": torch.tensor([auroc(results[name], labels), auoscr(curve)], dtype=torch.float64)
        for name, curve in curves.items()
    }
    return {
        **results, **areas, "logits": logits, "pred": predictions, "vim_alpha": methods["vim"].state["alpha"],
        "ghost_normalised_logit": methods["ghost"].normalised_logit(features),
        "oscr_fpr": curves["maxlogit"].fpr, "oscr_ccr": curves["maxlogit"].ccr,
    }  # fmt: skip


def _metrics(score: Tensor, pred: Tensor, labels: Tensor) -> dict[str, Tensor]:
    curve = oscr_curve(score, pred, labels)
    return {
        "thresholds": curve.thresholds,
        "oscr_fpr": curve.fpr,
        "oscr_ccr": curve.ccr,
        "known_coverage": curve.coverage,
        "auroc": torch.tensor([auroc(score, labels)]),
        "auoscr": torch.tensor([auoscr(curve)], dtype=torch.float64),
    }
