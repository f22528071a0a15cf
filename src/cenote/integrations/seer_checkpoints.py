"""Published gates of SeerAttention: ``attn_gate_weights.pth`` and the ``config.json`` beside it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cenote.attention.seer_attention import SeerAttention
from cenote.attention.seer_decode import SeerDecode

WEIGHTS, CONFIG = "attn_gate_weights.pth", "config.json"
PREFIX = "seerattn_"
NAMES = {
    "mask_linear_q.weight": "query.weight",
    "mask_linear_k.weight": "key.weight",
    "attngate_linear_q.weight": "query.weight",
    "attngate_linear_k.weight": "key.weight",
    "attngate_qnorm.weight": "query_norm.weight",
    "attngate_knorm.weight": "key_norm.weight",
}
"""Published names of a gate's weights and those of :mod:`cenote.attention.seer_gate`, of both variants."""
_KEY = re.compile(r"(?:model\.)?(?:language_model\.)?layers\.(\d+)\.self_attn\.attn_gate\.(.+)")


@dataclass(frozen=True)
class PublishedGates:
    """What a published folder holds.

    Attributes:
        base_model: name of the model that the gates were trained on.
        decode: whether they are gates of the decode variant.
        settings: the ``seerattn_*`` entries of ``config.json`` without that prefix.
        gates: weights by ``"<layer>.<parameter>"``.
    """

    base_model: str
    decode: bool
    settings: dict[str, Any]
    gates: dict[str, Tensor]


def gate_states(state: Mapping[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    """Published weights by layer, under the names of the modules of :mod:`cenote.attention.seer_gate`.

    The decode variant's query projection comes as ``(kv_heads, group, head_dim, hidden_size)`` and leaves as
    ``(heads, head_dim, hidden_size)``.

    Raises:
        ValueError: a key that no gate has.
    """
    states: dict[int, dict[str, Tensor]] = {}
    for key, weight in state.items():
        match = _KEY.fullmatch(key)
        if match is None or match[2] not in NAMES:
            raise ValueError(
                f"{key!r} is no weight of a gate: expected layers.<number>.self_attn.attn_gate.<{_known()}>"
            )
        states.setdefault(int(match[1]), {})[NAMES[match[2]]] = weight.flatten(0, 1) if weight.ndim == 4 else weight
    return dict(sorted(states.items()))


def read_published(folder: str | os.PathLike[str]) -> PublishedGates:
    """Read a published folder, of either variant.

    Raises:
        ValueError: files that are missing or unreadable, a configuration without ``base_model``, keys that no gate has.
    """
    path = Path(folder)
    try:
        config = json.loads((path / CONFIG).read_text())
        state = torch.load(path / WEIGHTS, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ValueError(f"published gates are a folder with {WEIGHTS} and {CONFIG}: {error}") from None
    except Exception as error:  # a damaged torch file fails in many ways
        raise ValueError(f"{path} holds no published gates: {error}") from error
    if not isinstance(config, dict) or not config.get("base_model"):
        raise ValueError(f"{path / CONFIG} names no base_model: gates fit the model that they were trained on only")
    if not isinstance(state, dict) or not all(isinstance(weight, Tensor) for weight in state.values()):
        raise ValueError(f"{path / WEIGHTS} holds no dictionary of tensors")
    if not state:
        raise ValueError(f"{path / WEIGHTS} holds no weights")
    settings = {key.removeprefix(PREFIX): value for key, value in config.items() if key.startswith(PREFIX)}
    gates = {
        f"{layer}.{name}": weight for layer, weights in gate_states(state).items() for name, weight in weights.items()
    }
    return PublishedGates(config["base_model"], any("attngate_" in key for key in state), settings, gates)


def load_seer_attention(folder: str | os.PathLike[str], **changes: Any) -> SeerAttention:
    """The recipe of a published folder of the prefill variant; whether its gates fit is checked against the model.

    Args:
        folder: with ``attn_gate_weights.pth`` and ``config.json``.
        **changes: settings of the recipe in place of the published ones, such as ``nz_ratio``.

    Raises:
        ValueError: gates of the decode variant, an unknown ``sparsity_method`` or none of its value, and as
            :func:`read_published`.
    """
    published = read_published(folder)
    if published.decode:
        raise ValueError(f"{folder} holds gates of the decode variant (SeerAttention-R): use load_seer_decode")
    given = published.settings
    method = given.get("sparsity_method", "threshold")
    if method not in ("threshold", "nz_ratio"):
        raise ValueError(f"sparsity_method must be 'threshold' or 'nz_ratio', got {method!r}")
    names = {
        "gate_block_size": "block_size", "gate_hidden_size": "hidden_size", "gate_type": "gate_type",
        "gate_force_double": "force_double", "last_block_dense": "last_block_dense", method: method,
    }  # fmt: skip
    settings = {ours: given[theirs] for theirs, ours in names.items() if given.get(theirs) is not None}
    if method not in settings and not {"threshold", "nz_ratio"} & changes.keys():
        raise ValueError(f"{folder} chooses blocks by {method} and gives none: pass nz_ratio or threshold")
    recipe = SeerAttention(**{"threshold": None, **settings}, gates=published.gates)
    if "nz_ratio" in changes:
        changes = {"threshold": None, **changes}
    return replace(recipe, **changes)


def load_seer_decode(folder: str | os.PathLike[str], **changes: Any) -> SeerDecode:
    """The recipe of a published folder of the decode variant; whether its gates fit is checked against the model.

    Args:
        folder: with ``attn_gate_weights.pth`` and ``config.json``.
        **changes: settings of the recipe in place of the published ones, such as ``token_budget``.

    Raises:
        ValueError: gates of the prefill variant, an unknown ``sparsity_method``, and as :func:`read_published`.
    """
    published = read_published(folder)
    if not published.decode:
        raise ValueError(f"{folder} holds gates of the prefill variant: use load_seer_attention")
    given = published.settings
    method = given.get("sparsity_method", "token_budget")
    # The published configuration class knows no "token_budget" and writes "nz_ratio", which no decoding uses, instead.
    if method not in ("threshold", "token_budget", "nz_ratio"):
        raise ValueError(f"sparsity_method must be 'threshold' or 'token_budget', got {method!r}")
    names = {
        "gate_block_size": "block_size", "gate_hidden_size": "hidden_size", "k_seq_pooling_type": "key_pooling",
        "q_head_pooling_type": "query_pooling", "use_qk_norm": "qk_norm", "use_rope": "rotary",
        "token_budget": "token_budget", "start_layer": "start_layer",
    }  # fmt: skip
    if method == "threshold":
        names["threshold"] = "threshold"
    settings = {ours: given[theirs] for theirs, ours in names.items() if given.get(theirs) is not None}
    if "token_budget" in changes:
        changes = {"threshold": None, **changes}
    return SeerDecode(**{**settings, "gates": published.gates, **changes})


def _known() -> str:
    return "|".join(NAMES)
