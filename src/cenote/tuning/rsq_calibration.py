"""Calibration text as batches of token ids."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from cenote.ops.token_importance import expand_sequences

Calibration = Tensor | Iterable[Mapping[str, Any]]
"""Token ids ``(sequences, tokens)``, or batches with ``input_ids`` and, where there is padding, ``attention_mask``."""


class CalibrationBatch(NamedTuple):
    """Token ids ``(batch, tokens)`` and the mask of real tokens, or ``None`` where all are."""

    ids: Tensor
    mask: Tensor | None

    def inputs(self, device: torch.device) -> dict[str, Tensor | None]:
        """What a transformers model takes."""
        mask = None if self.mask is None else self.mask.long().to(device)
        return {"input_ids": self.ids.to(device), "attention_mask": mask}


def cut_sequences(
    tokens: Int[Tensor, "stream"], length: int, count: int | None = None, seed: int = 0
) -> Int[Tensor, "count length"]:
    """Sequences of a long stream of token ids for calibration.

    Args:
        tokens: one stream.
        length: tokens of a sequence.
        count: stretches drawn at random places; ``None`` for neighbouring ones that cover the stream.
        seed: of the places.

    Raises:
        ValueError: a stream shorter than one sequence.
    """
    if length < 1 or (count is not None and count < 1):
        raise ValueError(f"expected sequences of at least one token, and at least one, got {length} and {count}")
    if len(tokens) < length:
        raise ValueError(f"the calibration text has {len(tokens)} tokens, fewer than one sequence of {length}")
    if count is None:
        return tokens[: len(tokens) // length * length].view(-1, length)
    starts = torch.randint(len(tokens) - length + 1, (count, 1), generator=torch.Generator().manual_seed(seed))
    return tokens[starts + torch.arange(length)]


def calibration_batches(calibration: Calibration, batch_size: int, expansion: int = 1) -> list[CalibrationBatch]:
    """Check the calibration data, expand it and cut it into batches.

    Raises:
        TypeError: something that is not token ids.
        ValueError: no sequence, an empty one, or masks of another shape.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    given = [{"input_ids": calibration}] if isinstance(calibration, Tensor) else list(calibration)
    batches: list[CalibrationBatch] = []
    for each in given:
        if not isinstance(each, Mapping) or "input_ids" not in each:
            raise TypeError(f"expected batches with 'input_ids', got {type(each).__name__}")
        ids, mask = each["input_ids"], each.get("attention_mask")
        if not isinstance(ids, Tensor) or ids.is_floating_point():
            raise TypeError(f"expected token ids as an integer tensor, got {getattr(ids, 'dtype', type(ids).__name__)}")
        if ids.ndim != 2 or not ids.numel():
            raise ValueError(f"expected token ids (sequences, tokens), at least one of each, got {tuple(ids.shape)}")
        real = None if mask is None else torch.as_tensor(mask).bool()
        if real is not None and real.shape != ids.shape:
            raise ValueError(f"expected an attention_mask of shape {tuple(ids.shape)}, got {tuple(real.shape)}")
        if real is not None and not bool(real.any(1).all()):
            raise ValueError("every calibration sequence needs a real token, got one that is all padding")
        if real is not None and bool(real.all()):
            real = None
        if expansion != 1:
            ids, real = (
                expand_sequences(ids, expansion, real),
                None if real is None else real.repeat_interleave(expansion, 0),
            )
        for first in range(0, len(ids), batch_size):
            rows = slice(first, first + batch_size)
            batches.append(CalibrationBatch(ids[rows].cpu(), None if real is None else real[rows].cpu()))
    if not batches:
        raise ValueError("expected at least one calibration sequence, got none")
    return batches


def token_counts(batches: list[CalibrationBatch], vocabulary: int) -> Int[Tensor, "symbols"]:
    """How often each token id occurs, padding aside."""
    counts = torch.zeros(vocabulary, dtype=torch.long)
    for ids, mask in batches:
        counts += (ids.flatten() if mask is None else ids[mask]).bincount(minlength=vocabulary)
    return counts
