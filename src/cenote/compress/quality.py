"""How near a method stays to the dense model: next-token distributions, and facts planted in the context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from cenote.compress.methods import Ready
from cenote.compress.teacher_forced import teacher_forced_logits, text_nll
from cenote.worlds.planted_facts import PlantedFactsBatch

MIN_RETRIEVAL = 0.2
"""Share of the facts that the dense model must find for retrieval to say anything."""


@dataclass(frozen=True)
class TextQuality:
    """Of the decoded tokens: perplexity, and agreement and divergence (nats) from the dense model."""

    perplexity: float
    agreement: float
    kl: float


def decoded_logits(
    ready: Ready, ids: Int[Tensor, "rows tokens"], steps: int
) -> Float[Tensor, "rows predictions vocabulary"]:
    """Logits for the last ``steps`` tokens, decoded one by one, and for the one behind them."""
    with ready.at(ids.shape[1]) as model:
        return teacher_forced_logits(model, ids, prompt=ids.shape[1] - steps).float().cpu()


def text_quality(
    logits: Float[Tensor, "rows predictions vocabulary"],
    dense: Float[Tensor, "rows predictions vocabulary"],
    ids: Int[Tensor, "rows tokens"],
) -> TextQuality:
    """Compare a method's next-token distributions with the dense model's on the same tokens."""
    own, other = logits.log_softmax(dim=-1), dense.log_softmax(dim=-1)
    kl = (other.exp() * (other - own)).sum(dim=-1).mean()
    agreement = (logits.argmax(dim=-1) == dense.argmax(dim=-1)).float().mean()
    perplexity = text_nll(logits, ids.cpu()).mean().exp()
    return TextQuality(float(perplexity), float(agreement), max(0.0, float(kl)))


def retrieval(
    ready: Ready, documents: dict[int, PlantedFactsBatch], depths: Sequence[float], device: torch.device, rows: int
) -> dict[str, dict[str, float]]:
    """Share of the last questions answered right in every token, by length and depth.

    The question is decoded token by token behind the document, as its tokens have to look the answer up; each answer
    token sees the right ones before it.

    Args:
        documents: by length; those of each depth take turns, in the order of ``depths``.
        rows: documents that run together.
    """
    grid: dict[str, dict[str, float]] = {}
    for length, batch in documents.items():
        answers = batch.answer_positions[:, -1]
        start = int((answers[:, 0] - batch.question_lengths[:, -1]).min())
        right = []
        with ready.at(length) as model:
            for first in range(0, len(answers), rows):
                part = slice(first, first + rows)
                logits = teacher_forced_logits(model, batch.input_ids[part, :-1].to(device), prompt=start).cpu()
                place = (answers[part] - start).unsqueeze(-1).expand(-1, -1, logits.shape[-1])
                guess = logits.gather(1, place).argmax(dim=-1)
                right.append((guess == batch.targets[part, -1]).all(dim=-1))
        hits = torch.cat(right).float().view(-1, len(depths)).mean(dim=0).tolist()
        grid[str(length)] = {f"{depth:g}": hit for depth, hit in zip(depths, hits, strict=True)}
    return grid


def grid_mean(grid: dict[str, dict[str, float]]) -> float | None:
    """Mean over all cells, or ``None`` where there are none."""
    cells = [value for cells in grid.values() for value in cells.values()]
    return float(np.mean(cells)) if cells else None


def share_kept(perplexity: float, dense_perplexity: float, found: float | None, dense_found: float | None) -> float:
    """``min(dense perplexity / perplexity, found / dense found)``, the second where the dense model finds enough."""
    text = dense_perplexity / perplexity
    if found is None or dense_found is None or dense_found < MIN_RETRIEVAL:
        return text
    return min(text, found / dense_found)
