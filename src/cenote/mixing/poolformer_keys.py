"""Key names of PoolFormer checkpoints: the official code's (which are this library's), timm's and transformers'.

Each converter takes a state dict and gives a new one with the same tensors under other names.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, Literal

from torch import Tensor

State = Mapping[str, Tensor]
Format = Literal["official", "timm", "transformers"]

# One row for each kind of layer: its names in the three formats. {i} is a stage, {j} a block; blocks.{i} and
# reduce.{i} (the convolution in front of a stage) stand for network.{2i} and network.{2i - 1}.
_LAYERS = (
    ("patch_embed.proj", "stem.conv", "poolformer.encoder.patch_embeddings.0.projection"),
    ("reduce.{i}.proj", "stages.{i}.downsample.conv", "poolformer.encoder.patch_embeddings.{i}.projection"),
    ("norm", "head.norm", "norm"),
    ("head", "head.fc", "classifier"),
)
# Parameters of a block, behind its own name.
_BLOCKS = ("blocks.{i}.{j}", "stages.{i}.blocks.{j}", "poolformer.encoder.block.{i}.{j}")
_PARTS = (
    ("norm1", "norm1", "before_norm"),
    ("norm2", "norm2", "after_norm"),
    ("mlp.fc1", "mlp.fc1", "output.conv1"),
    ("mlp.fc2", "mlp.fc2", "output.conv2"),
)
_SCALES = (
    ("layer_scale_1", "layer_scale1.scale", "layer_scale_1"),
    ("layer_scale_2", "layer_scale2.scale", "layer_scale_2"),
)
_FORMATS: tuple[Format, ...] = ("official", "timm", "transformers")


def convert(state: State, source: Format, target: Format) -> dict[str, Tensor]:
    """A PoolFormer's state dict in other names.

    timm's ``poolformer_*`` puts its last norm behind the mean over cells and the others in front of it, so the same
    weights give equal features but unequal logits there; transformers' logits are the official ones. ``encoder.*``
    without ``poolformer.`` in front (a transformers model without a head) is read as well.

    Raises:
        ValueError: unknown format, or a key that only one format has: position maps, mixers with weights, the norms
            of dense outputs.
    """
    wrong = {source, target} - set(_FORMATS)
    if wrong:
        raise ValueError(f"formats are {', '.join(_FORMATS)}, got {', '.join(sorted(map(repr, wrong)))}")
    one, other = _FORMATS.index(source), _FORMATS.index(target)
    converted: dict[str, Tensor] = {}
    for key, value in state.items():
        full = f"poolformer.{key}" if source == "transformers" and key.startswith("encoder.") else key
        converted[_rename(full, one, other)] = value
    return converted


def official_to_timm(state: State) -> dict[str, Tensor]:
    """For ``timm.create_model("poolformer_s12").load_state_dict``; see :func:`convert`."""
    return convert(state, "official", "timm")


def timm_to_official(state: State) -> dict[str, Tensor]:
    """From ``timm.create_model("poolformer_s12").state_dict()``; see :func:`convert`."""
    return convert(state, "timm", "official")


def official_to_transformers(state: State) -> dict[str, Tensor]:
    """For ``PoolFormerForImageClassification``; see :func:`convert`."""
    return convert(state, "official", "transformers")


def transformers_to_official(state: State) -> dict[str, Tensor]:
    """From ``PoolFormerForImageClassification`` or ``PoolFormerModel``; see :func:`convert`."""
    return convert(state, "transformers", "official")


def key_format(state: State) -> Format:
    """Which format the keys are in; ``ValueError`` if in none."""
    first: dict[str, Format] = {"patch_embed.": "official", "stem.": "timm"}
    first |= {"poolformer.encoder.": "transformers", "encoder.patch_embeddings.": "transformers"}
    for start, found in first.items():
        if any(key.startswith(start) for key in state):
            return found
    raise ValueError(f"these are no keys of a PoolFormer: {', '.join(sorted(state)[:4])} ...")


def settings_from_state(state: State) -> dict[str, Any]:
    """What a state dict in official keys tells of the network: settings of ``StagedMetaFormer``.

    Mixers that have weights are found (attention with heads of 32 channels, as published; fully connected layers on
    a square grid), the others are taken for ``pool``: say ``mixers="identity"`` yourself. Window and norm leave no
    trace either: the norm is taken for ``layer`` where there is attention and for ``group`` elsewhere, as published.

    Raises:
        ValueError: keys that are not those of a staged network.
    """
    if "patch_embed.proj.weight" not in state:
        raise ValueError("expected official keys, patch_embed.proj.weight among them")
    blocks: dict[int, int] = {}
    for key in state:
        if found := re.match(r"network\.(\d+)\.(\d+)\.", key):
            place, block = int(found[1]), int(found[2])
            blocks[place] = max(blocks.get(place, 0), block + 1)
    places = sorted(blocks)
    if not places:
        raise ValueError("expected official keys, network.0.0.norm1.weight among them")
    inner = [state[f"network.{place}.0.mlp.fc1.weight"] for place in places]
    mixers = tuple(_mixer(state, place) for place in places)
    positions = tuple(
        None if (grid := state.get(f"network.{place - 1}.pos_embed")) is None else (grid.shape[2], grid.shape[3])
        for place in places
    )
    gaps = [range(start + 1, end) for start, end in pairwise(places)]
    return {
        "layers": tuple(blocks[place] for place in places),
        "dims": tuple(weight.shape[1] for weight in inner),
        "mlp_ratio": tuple(weight.shape[0] / weight.shape[1] for weight in inner),
        "mixers": mixers,
        "positions": positions,
        "downsamples": (*(any(f"network.{n}.proj.weight" in state for n in gap) for gap in gaps), False),
        "norm": "layer" if any("attention" in mixer for mixer in mixers) else "group",
        "layer_scale": 1e-5 if f"network.{places[0]}.0.layer_scale_1" in state else None,
        "in_channels": state["patch_embed.proj.weight"].shape[1],
        "num_classes": state["head.weight"].shape[0] if "head.weight" in state else 0,
        "fork_feat": f"norm{places[0]}.weight" in state,
    }


def _mixer(state: State, place: int) -> str:
    if f"network.{place}.0.token_mixer.qkv.weight" in state:
        return "softmax_attention(head_dim=32)"
    fully = state.get(f"network.{place}.0.token_mixer.fc.weight")
    if fully is None:
        return "pool"
    side = math.isqrt(fully.shape[0])
    if side * side != fully.shape[0]:
        raise ValueError(
            f"a fully connected mixer of {fully.shape[0]} cells is on no square grid: give mixers yourself"
        )
    return f"spatial_fc(grid=({side}, {side}))"


def _rename(key: str, one: int, other: int) -> str:
    numbered = re.sub(r"^network\.(\d+)", _count_stages, key) if one == 0 else key
    for pattern, templates in _RULES[one]:
        if found := pattern.fullmatch(numbered):
            written = templates[other].format(**{name: int(text) for name, text in found.groupdict().items()})
            return re.sub(r"^(blocks|reduce)\.(\d+)", _count_places, written) if other == 0 else written
    raise ValueError(f"a PoolFormer has no {key!r} that both {_FORMATS[one]} and {_FORMATS[other]} names know")


def _count_stages(found: re.Match[str]) -> str:
    """``network.N``, which counts stages and the convolutions between them, by stage."""
    place = int(found[1])
    return f"reduce.{(place + 1) // 2}" if place % 2 else f"blocks.{place // 2}"


def _count_places(found: re.Match[str]) -> str:
    return f"network.{2 * int(found[2]) - (found[1] == 'reduce')}"


def _rules(one: int) -> list[tuple[re.Pattern[str], tuple[str, ...]]]:
    kinds = [f".{kind}" for kind in ("weight", "bias")]
    rows = [tuple(name + kind for name in row) for row in _LAYERS for kind in kinds]
    parts = [*(tuple(name + kind for name in row) for row in _PARTS for kind in kinds), *_SCALES]
    rows += [tuple(f"{block}.{part}" for block, part in zip(_BLOCKS, row, strict=True)) for row in parts]
    return [(re.compile(re.sub(r"\\\{(\w)\\\}", r"(?P<\1>\\d+)", re.escape(row[one]))), row) for row in rows]


_RULES = [_rules(one) for one in range(len(_FORMATS))]
