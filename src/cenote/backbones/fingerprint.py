"""A digest that tells two sets of weights apart."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

WHOLE_BYTES = 1 << 30
SAMPLE_VALUES = 1 << 12


def weights_digest(module: nn.Module, config: Mapping[str, Any]) -> str:
    """SHA-256 over the configuration and every named tensor of the state dict, in the order of their names.

    Weights above 1 GiB in all are sampled: of each tensor, some 4096 values at even distance. Two networks that differ
    by training differ in some sampled value; one that was edited by hand in a few places may not.
    """
    state = module.state_dict()
    whole = sum(tensor.numel() * tensor.element_size() for tensor in state.values()) <= WHOLE_BYTES
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name in sorted(state):
        tensor = state[name].detach()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        values = tensor.reshape(-1)
        if not whole:
            values = values[:: max(1, len(values) // SAMPLE_VALUES)]
        # bfloat16 has no numpy type: digest the bytes.
        digest.update(values.contiguous().cpu().view(torch.uint8).numpy())
    return digest.hexdigest()
