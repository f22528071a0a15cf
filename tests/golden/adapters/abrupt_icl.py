"""The two-layer attention-only classifier: forward, loss and one step of plain SGD."""

import torch
import torch.nn.functional as F
from torch import Tensor

from cenote.worlds.induction import InductionNetwork
from cenote.worlds.induction_training import sgd_step
from golden.cases import Case

STREAM = {"K", "L", "N", "Nmax", "D", "B", "p_B", "p_C", "eps", "flip_labels"}  # of the inputs, which are given
SETTINGS = STREAM | {"lr", "w_decay", "layers", "mlp_layers"}


def run(case: Case) -> dict[str, Tensor]:
    if not case.target.startswith("two-layer attention-only classifier"):
        raise ValueError(f"unknown target {case.target!r}")
    if set(case.config) != SETTINGS:
        raise ValueError(f"unknown or missing settings: {sorted(set(case.config) ^ SETTINGS)}")
    config, inputs, targets = case.config, case.inputs["inputs"].double(), case.inputs["labels"].long()
    network = InductionNetwork(
        inputs.shape[-1], config["L"], config["D"], config["layers"], config["mlp_layers"]
    ).double()
    network.load_state_dict(case.state)
    trace = network.trace(inputs)
    loss = F.cross_entropy(trace.logits, targets)
    results = {
        "logits": trace.logits.detach(),
        "loss": loss.detach()[None],
        "accuracy": (trace.logits.argmax(dim=1) == targets).float().mean()[None],
        **{f"attn.{layer}": weights[:, 0] for layer, weights in enumerate(trace.attention)},
        **{f"resid.{layer + 1}": tokens for layer, tokens in enumerate(trace.residuals)},
    }
    parameters = list(network.parameters())
    sgd_step(parameters, torch.autograd.grad(loss, parameters), config["lr"], config["w_decay"])
    with torch.no_grad():
        results["loss_after_step"] = F.cross_entropy(network(inputs), targets)[None]
    return results | {f"updated.{name}": weight for name, weight in network.state_dict().items()}
