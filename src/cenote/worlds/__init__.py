"""Small generated worlds, and the networks trained on them in minutes, in which a claim can be watched."""

import importlib
from typing import Any

_PLACES = {
    "AssociativeRecall": "recall",
    "CharacterText": "characters",
    "ContextClassification": "context_classification",
    "FixedOffsetCopy": "copying",
    "InductionNetwork": "induction",
    "LinearRegression": "linear_regression",
    "ListOps": "listops",
    "PlantedFacts": "planted_facts",
    "RegressionAttention": "regression_attention",
    "SequenceModel": "models",
    "Sequences": "base",
    "World": "base",
    "fit_regression": "regression_attention",
    "fit_sequences": "training",
    "sequence_accuracy": "training",
    "train_induction": "induction_training",
}

__all__ = sorted(_PLACES)


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(importlib.import_module(f"cenote.worlds.{_PLACES[name]}"), name)
    raise AttributeError(f"module 'cenote.worlds' has no attribute {name!r}")
