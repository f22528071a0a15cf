"""Efficient probing from stored features against the official runner, which runs the frozen backbone in every epoch.

A ViT-S/16 at 224 pixels with random weights. The official runner pays ``epochs x (backbone + head step)`` per image for
one (learning rate, seed) at a time; ours pays the backbone once, and in each epoch a step of the stack of all members.
The pieces are measured on one batch and added up, for the whole default grid of efficient probing (which the ratio is
about) and for a single fit, whose gain cannot exceed the number of epochs.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import timm
import torch
import torch.nn.functional as F
from common import finish
from published import published
from torch import nn

from cenote.allocator import keep_freed_memory
from cenote.probe.heads import BN_EPS
from cenote.probe.plan import Host, plan
from cenote.probe.tasks import Objective
from cenote.probe.train import Group, Schedule
from cenote.types import Features, Grid

EPOCHS, IMAGES, BATCH, CLASSES = 90, 1000, 32, 100


def seconds(call: Callable[[], Any], repeats: int) -> float:
    """Median after one warm-up."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def main() -> None:
    keep_freed_memory()
    torch.manual_seed(0)
    backbone = timm.create_model("vit_small_patch16_224", pretrained=False, num_classes=0).eval()
    images, targets = torch.randn(BATCH, 3, 224, 224), torch.randint(CLASSES, (BATCH,))
    with torch.no_grad():
        hidden = backbone.forward_features(images)
        extraction = seconds(lambda: backbone.forward_features(images), 3) / BATCH
    stored = Features(hidden[:, None], torch.ones(hidden.shape[:2], dtype=torch.bool), (12,), Grid(14, 14), 1)
    host = Host(hidden.shape[-1], (12,), Grid(14, 14), 1, "image", True)
    (candidate,) = plan("efficient_probing", host, 12, (12,), "auto", 3, None, None)
    objective = Objective("classification", CLASSES)
    pooling, _ = published(candidate, host.dim, 0)  # type: ignore[misc]
    head = nn.Sequential(pooling, nn.BatchNorm1d(host.dim, affine=False, eps=BN_EPS), nn.Linear(host.dim, CLASSES))
    optimizer = torch.optim.AdamW(head.parameters())

    def official() -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(head(hidden[:, 1:]), targets).backward()
        optimizer.step()

    head_step = seconds(official, 5) / BATCH
    rows = []
    for fits, members in (("default grid", candidate.members), ("a single fit", candidate.members[:1])):
        group = Group.create(replace(candidate, members=members), host.dim, objective, Schedule(EPOCHS, 5), True)
        step = seconds(lambda group=group: group.step(stored, targets, 0.01), 5) / BATCH
        theirs = len(members) * EPOCHS * (extraction + head_step)
        ours = extraction + EPOCHS * step
        rows.append(
            {
                "fits": fits,
                "members": len(members),
                "epochs": EPOCHS,
                "images": IMAGES,
                "backbone ms/image": 1e3 * extraction,
                "official head ms/image": 1e3 * head_step,
                "our step ms/image": 1e3 * step,
                "official s": theirs * IMAGES,
                "ours s": ours * IMAGES,
                "ratio": theirs / ours,
            }
        )
    finish(
        "probe from the store: EP on a ViT-S, 90 epochs",
        "the backbone in every epoch",
        50,
        rows,
        rows[0]["ratio"],
        __doc__,
    )


if __name__ == "__main__":
    if "OMP_WAIT_POLICY" not in os.environ:
        # Waiting threads that spin make either side many times slower on few cores; read when torch loads.
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "OMP_WAIT_POLICY": "passive"})
    main()
