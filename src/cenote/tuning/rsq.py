"""RSQ: rotate a model, weigh calibration tokens by importance, quantise layer by layer."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from cenote.ops.gptq import normalize_importance
from cenote.ops.quantizer import GridSettings
from cenote.tuning.rsq_calibration import Calibration, CalibrationBatch, calibration_batches
from cenote.tuning.rsq_importance import Importance
from cenote.tuning.rsq_layers import decoder_layers
from cenote.tuning.rsq_linear import QuantizedLinear
from cenote.tuning.rsq_result import RSQResult
from cenote.tuning.rsq_resume import WorkFolder
from cenote.tuning.rsq_rotation import (
    ROTATIONS,
    TRANSFORMS,
    check_full,
    check_rotatable,
    random_rotation,
    rotate_model,
)
from cenote.tuning.rsq_stages import LINEARS, LayerQuantizer, check_linears

METHODS = ("rsq", "gptq", "rtn")
MARK = "cenote_quantization"


@torch.no_grad()
def quantize_rsq(
    model: Any,
    calibration: Calibration | None = None,
    bits: int = 3,
    *,
    method: str = "rsq",
    importance: str | Importance | Float[Tensor, "sequences tokens"] = "attncon",
    weighted: Sequence[str] | None = None,
    rotation: str = "residual",
    transform: str = "hadamard",
    center_embeddings: bool = False,
    expansion: int = 1,
    group_size: int | None = None,
    symmetric: bool = True,
    clip_search: bool = True,
    act_order: bool = False,
    static_groups: bool = True,
    block_size: int = 128,
    damping: float = 0.01,
    batch_size: int = 8,
    seed: int = 0,
    work_folder: str | Path | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> RSQResult:
    """Quantise the linear layers of a Llama, Mistral, Qwen2 or Qwen3 model in place.

    Rotate the residual stream; then for each decoder layer weigh each calibration token by its importance there, gather
    ``H = (2 / n) sum w_t X_t^T X_t`` for each of {k, v, q}, {o}, {up, gate}, {down} with the earlier ones already
    quantised, and run GPTQ with it. Inputs are caught while the model's own layers run. Held beside the model are one
    copy of the hidden states (on the CPU), one batch inside one layer, and the Hessians of one group. Weights stay
    ordinary floating-point tensors, on a grid of ``2^bits`` levels; embeddings, norms and head are not quantised.

    Source: "RSQ: Learning from Important Tokens Leads to Better Quantized LLMs" (arXiv 2503.01820). Different from the
    official code: embeddings are not centred, the rotation holds for every number of heads, equal scores weigh 1
    instead of dividing by zero, padding has no weight, token frequencies belong to the sequence they are used for,
    damping is added again to the matrix it failed on, and only the residual stream is rotated unless
    ``rotation="full"``, whose other transforms serve quantised activations.

    Args:
        model: a transformers causal language model; changed in place, so pass a copy to keep it.
        calibration: token ids ``(sequences, tokens)`` or batches with ``input_ids`` and ``attention_mask``; not needed
            for ``"rtn"``. :func:`cenote.tuning.rsq_calibration.cut_sequences` makes them of a long stream.
        bits: 2 to 8.
        method: ``"rsq"``, ``"gptq"`` (every token weighs the same) or ``"rtn"`` (each weight to the nearest level).
        importance: a rule's name, an :class:`~cenote.tuning.rsq_importance.Importance` or ready weights
            ``(sequences, tokens)``, in the order of the calibration sequences.
        weighted: names of linear layers (``"v_proj"``, ...) that the importance is for; ``None`` for all seven.
        rotation: ``"residual"``, ``"none"`` or ``"full"`` (with online Hadamards, which only the layout
            ``"packed"`` saves).
        transform: ``"hadamard"`` with random signs, or a random ``"orthogonal"`` matrix, which every width has.
        center_embeddings: as the official code; changes the function of a model with RMSNorm.
        expansion: rolled copies of each calibration sequence (the paper takes 8); calibration costs as many times more.
        group_size: columns that share a scale; ``None`` for whole rows.
        symmetric: grid around 0.
        clip_search: try 80 widths of each grid.
        act_order: take columns of large Hessian diagonal first.
        static_groups: with ``act_order``, fit the grids of neighbouring columns beforehand.
        block_size: columns of a GPTQ block.
        damping: share of the mean of the Hessian's diagonal that is added to it.
        batch_size: sequences that run through a layer together.
        seed: of the rotation.
        work_folder: finished layers are written here; the same call after an interruption, on a fresh model, goes on
            from there and gives the same bits.
        progress: called with a line of text for each layer.

    Returns:
        The model and its codes, scales and errors.

    Raises:
        TypeError: calibration data or importance of the wrong kind.
        ValueError: settings out of range, a model that is quantised already or not served, groups that do not divide
            the columns, importance that does not fit, or a work folder of another run.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if rotation not in ROTATIONS or transform not in TRANSFORMS:
        raise ValueError(
            f"expected rotation of {ROTATIONS} and transform of {TRANSFORMS}, got {rotation!r}, {transform!r}"
        )
    if block_size < 1 or damping <= 0:
        raise ValueError(f"block_size must be at least 1 and damping above 0, got {block_size} and {damping}")
    started = time.perf_counter()
    grid = GridSettings(bits, symmetric, clip_search, group_size)
    layers = decoder_layers(model)
    if getattr(model.config, "quantization_config", None) is not None or hasattr(model.config, MARK):
        raise ValueError(f"this {type(model).__name__} is quantised already: start from the original weights")
    grid = replace(grid, dtype=check_linears(model, layers, grid))
    if isinstance(importance, str):
        importance = Importance(importance)
    names = _weighted_names(weighted)
    settings: dict[str, Any] = {
        "method": method, "bits": bits, "group_size": group_size, "symmetric": symmetric, "clip_search": clip_search,
        "rotation": rotation, "transform": transform, "center_embeddings": center_embeddings, "seed": seed,
    }  # fmt: skip
    options = {
        "block_size": block_size, "damping": damping, "act_order": act_order,
        "static_groups": static_groups and act_order,
    }  # fmt: skip
    batches: list[CalibrationBatch] = []
    rule: Importance | list[Tensor] = Importance("equal")
    if method != "rtn":
        if calibration is None:
            raise ValueError(f"method {method!r} needs calibration data: token ids (sequences, tokens)")
        batches = calibration_batches(calibration, batch_size, expansion)
        if method == "rsq":
            rule = importance if isinstance(importance, Importance) else _ready_weights(importance, batches, expansion)
        said = vars(rule) if isinstance(rule, Importance) else "given"
        settings |= {"importance": said, "weighted": sorted(names), "expansion": expansion, "batch_size": batch_size}
        settings |= options
    hidden = model.get_input_embeddings().weight.shape[1]
    q = None if rotation == "none" else random_rotation(hidden, transform, seed)
    if q is not None and rotation == "full":
        check_full(check_rotatable(model))
    elif q is not None:
        check_rotatable(model)
    folder = None if work_folder is None else WorkFolder(work_folder, model, settings, batches, rule)
    if q is not None:
        rotate_model(model, q, rotation, center_embeddings=center_embeddings)
    run = LayerQuantizer(model, grid, batches, rule, names, options)
    linears: list[QuantizedLinear] = []
    for number in range(len(layers)):
        done = None if folder is None else folder.read(number)
        if done is not None:
            run.restore(done)
            said = f"read from {work_folder}"
        else:
            done = run.quantize(number)
            if folder is not None:
                folder.write(number, done)
            said = "error " + ", ".join(f"{each.name.rpartition('.')[2]} {each.error:.2g}" for each in done)
        progress(f"layer {number + 1} of {len(layers)}: {said}")
        linears += done
        if number + 1 < len(layers):
            run.advance(number)
    setattr(model.config, MARK, {"method": method, "bits": bits, "rotation": rotation})
    return RSQResult(model, settings, tuple(linears), time.perf_counter() - started)


def quantize_gptq(
    model: Any, calibration: Calibration, bits: int = 3, *, rotation: str = "none", **options: Any
) -> RSQResult:
    """Plain GPTQ, every token weighing the same; :func:`quantize_rsq` with ``method="gptq"`` and no rotation."""
    return quantize_rsq(model, calibration, bits, method="gptq", rotation=rotation, **options)


def quantize_rtn(model: Any, bits: int = 3, *, rotation: str = "none", **options: Any) -> RSQResult:
    """Each weight to the nearest level, without calibration; :func:`quantize_rsq` with ``method="rtn"``."""
    return quantize_rsq(model, None, bits, method="rtn", rotation=rotation, **options)


def _weighted_names(weighted: Sequence[str] | None) -> set[str]:
    known = {name.rpartition(".")[2] for name in LINEARS}
    if weighted is None:
        return known
    if unknown := set(weighted) - known:
        raise ValueError(
            f"weighted names linear layers, of {', '.join(sorted(known))}, got {', '.join(sorted(unknown))}"
        )
    return set(weighted)


def _ready_weights(importance: Any, batches: list[CalibrationBatch], expansion: int) -> list[Tensor]:
    if not isinstance(importance, Tensor):
        raise TypeError(f"importance must be a rule's name, an Importance or a tensor, got {type(importance).__name__}")
    if expansion != 1:
        raise ValueError(
            "ready importance is for the sequences as they are given: expand them before, with expansion=1"
        )
    rows, widths = sum(len(batch.ids) for batch in batches), {batch.ids.shape[1] for batch in batches}
    expected, shape = (rows, *sorted(widths)), tuple(importance.shape)
    if shape != expected:
        raise ValueError(f"expected importance of shape {expected} for the calibration set, got {shape}")
    parts = list(importance.float().split([len(batch.ids) for batch in batches]))
    for part, batch in zip(parts, batches, strict=True):
        normalize_importance(part, batch.mask)
    return parts
