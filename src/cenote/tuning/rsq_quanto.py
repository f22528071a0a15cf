"""Quantised weights as optimum-quanto keeps them, with codes and scales handed over as they are."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cenote.tuning.rsq_linear import QuantizedLinear


def _quanto() -> Any:
    try:
        import optimum.quanto
    except ImportError:
        raise ImportError("layout 'quanto' needs optimum-quanto: pip install optimum-quanto") from None
    return optimum.quanto


def quanto_weight(linear: QuantizedLinear, group_size: int | None) -> Any:
    """A ``WeightQBitsTensor`` of the same values: ``scale * (code - zero)`` with the zero point as integer shift.

    quanto chooses the size of its groups from the width of the layer and has no place for another, so scales are
    repeated where our groups are larger.

    Args:
        linear: of at most 4 bits; 3 are kept in 4.
        group_size: quanto's for this layer, ``None`` for whole rows.

    Raises:
        ValueError: more than 4 bits, columns out of order, or groups that cross quanto's.
    """
    if linear.bits > 4:
        raise ValueError(f"optimum-quanto packs 2 and 4 bits, got {linear.bits}: use layout 'packed'")
    weight = linear.unpack()
    width = group_size or linear.columns
    firsts = weight.group.view(-1, width)
    if not bool((firsts == firsts[:, :1]).all()):
        raise ValueError(
            f"optimum-quanto has groups of {width} columns for {linear.name}, which cross groups of this quantisation: "
            "use layout 'packed'"
        )
    quanto = _quanto()
    scale, zero = (value[:, firsts[:, 0]].reshape(-1, 1) for value in (weight.scale, weight.zero))
    codes: Tensor = weight.codes.reshape(-1, width)
    qtype = quanto.qint2 if linear.bits == 2 else quanto.qint4
    size = torch.Size((linear.rows, linear.columns))
    return quanto.WeightQBitsTensor(
        qtype, 0, group_size, size, (linear.columns, 1), codes, scale.to(linear.scale.dtype), zero.to(torch.int8)
    )


def save_quanto(model: Any, linears: Sequence[QuantizedLinear], folder: Path) -> None:
    """Write ``model.safetensors``, ``quanto_qmap.json`` and the configuration, as quanto's own models are written.

    Raises:
        ValueError: see :func:`quanto_weight`.
    """
    quanto = _quanto()
    state, kinds = {}, {}
    named = {each.name: each for each in linears}
    seen: set[int] = set()
    for name, value in model.state_dict().items():
        if (name.rpartition(".")[0] in named and name.endswith(".weight")) or value.data_ptr() in seen:
            continue
        seen.add(value.data_ptr())
        state[name] = value.detach().cpu().contiguous()
    for name, each in named.items():
        source = model.get_submodule(name)
        kind = "qint2" if each.bits == 2 else "qint4"
        with torch.device("meta"):
            empty = nn.Linear(source.in_features, source.out_features, bias=False, dtype=each.scale.dtype)
            holder = quanto.QLinear.qcreate(empty, weights=quanto.qtypes[kind], device="meta")
        weight = quanto_weight(each, holder.weight_group_size)
        weight.save_to_state_dict(state, f"{name}.weight.", False)
        state |= {
            f"{name}.{scale}": torch.ones((), dtype=each.scale.dtype) for scale in ("input_scale", "output_scale")
        }
        kinds[name] = {"weights": kind, "activations": "none"}
    save_file(
        {name: value.contiguous() for name, value in state.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    (folder / "quanto_qmap.json").write_text(json.dumps(kinds, indent=2) + "\n")
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = model.dtype
    config.save_pretrained(folder)


def load_quanto(folder: Path) -> nn.Module:
    """The model of :func:`save_quanto`, its weights packed in memory."""
    return _quanto().QuantizedModelForCausalLM.from_pretrained(str(folder))._wrapped.eval()
