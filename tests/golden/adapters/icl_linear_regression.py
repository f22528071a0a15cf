"""Multi-head softmax attention on in-context regression prompts, its circuits, and the reference predictors."""

import torch
from torch import Tensor

from cenote.worlds.linear_regression import Prompts, debiased_gradient_step, gradient_step, ridge
from cenote.worlds.linear_regression_theory import debiased_step, reduced_risk
from cenote.worlds.regression_attention import RegressionAttention, reduced_prediction
from golden.cases import Case

SETTINGS = {"d", "context", "heads", "n_out", "noise_var"}


@torch.no_grad()
def run(case: Case) -> dict[str, Tensor]:
    if not case.target.startswith("multi-head softmax attention on an in-context regression prompt"):
        raise ValueError(f"unknown target {case.target!r}")
    if set(case.config) != SETTINGS:
        raise ValueError(f"unknown or missing settings: {sorted(set(case.config) ^ SETTINGS)}")
    features, length, noise = (case.config[key] for key in ("d", "context", "noise_var"))
    given = {name: each.double() for name, each in case.inputs.items()}  # the reference is in double precision
    prompts = Prompts(given["x"], given["y"], given["x_query"], given["y_query"], given["mask"].bool())
    model = RegressionAttention(features, case.config["heads"], case.config["n_out"]).double()
    model.load_state_dict(case.state)
    prediction, attention = model(prompts, return_attention=True)
    step = debiased_step(features, length, noise)
    return {
        "kq": model.circuits.kq,
        "ov": model.circuits.ov,
        "attention": attention,
        "prediction": prediction,
        "effective_prediction": reduced_prediction(given["omega"], given["mu"], prompts),
        "gd": gradient_step(prompts, step),
        "debiased_gd": debiased_gradient_step(prompts, step),
        "bayes": ridge(prompts, features * noise),
        "approx_loss": reduced_risk(given["mu"], given["omega"], features, length, noise)[None],
        "eta_star": torch.tensor([step]),
    }
