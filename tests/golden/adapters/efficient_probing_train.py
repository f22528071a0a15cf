"""The training golden of efficient probing: names translated for the probe's stacked head, LARS and schedule."""

import math

import torch

from cenote.pooling import create_pooling
from cenote.probe.heads import Member, StackedReadout
from cenote.probe.optim import LARS, warmup_cosine
from cenote.probe.tasks import Objective

NAMES = {
    "0.cls_token": "pooling.queries",
    "0.v.weight": "pooling.value.weight",
    "0.v.bias": "pooling.value.bias",
    "1.running_mean": "norm.mean",
    "1.running_var": "norm.var",
    "2.weight": "head.weight",
    "2.bias": "head.bias",
}


def run(case):
    config = case.config
    options = {k: config[k] for k in ("dim", "num_queries", "d_out", "qkv_bias") if k in config}
    readout = StackedReadout(
        lambda: create_pooling("efficient_probing", **options), [Member(0.0, 1.0, 0)], config["num_classes"]
    )
    # The query bank already has a leading axis of one; everything else gains the member axis.
    ours = {NAMES[k]: (v if k == "0.cls_token" else v[None]) for k, v in case.state.items() if k in NAMES}
    readout.load(ours)
    batch, accumulate = config["batch_size"], config.get("accum_iter", 1)
    rate = config["base_lr"] * batch * accumulate / 256
    minimum = config.get("min_lr", 0.0) / rate
    optimizer = LARS(readout.params, torch.tensor([rate]), weight_decay=config.get("weight_decay", 0.0))
    optimizer.momentum, optimizer.trust = config["momentum"], config["trust_coefficient"]
    objective = Objective("classification", config["num_classes"])
    x, y = case.inputs["x"], case.inputs["y"]
    steps = math.ceil(len(x) / batch)
    losses, rates = [], []
    readout.train()
    for epoch in range(config["epochs"]):
        for step in range(steps):
            factor = warmup_cosine(epoch + step / steps, config["epochs"], config["warmup_epochs"], minimum)
            part = slice(step * batch, (step + 1) * batch)
            loss = objective.loss(readout(x[part]), y[part])
            grads = torch.autograd.grad(loss.sum(), list(readout.params.values()))
            optimizer.step(dict(zip(readout.params, grads, strict=True)), factor)
            losses.append(loss.detach()[0])
            rates.append(rate * factor)
    readout.eval()
    state = readout.state()
    back = {f"state.{k}": (state[v] if k == "0.cls_token" else state[v][0]) for k, v in NAMES.items() if v in state}
    logits = readout(x[:batch])[0]
    return {"losses": torch.stack(losses), "lrs": torch.tensor(rates), "logits": logits, **back}
