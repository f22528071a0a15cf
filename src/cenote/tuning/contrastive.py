"""Contrastive losses for embedding models, as pure functions of the embeddings, and the choice of hard negatives.

All similarities are cosines, computed in float32 or better. The losses see the rows they are given: over several
devices or accumulated batches, gather the embeddings (with their gradient) first. The number of documents that a
query is told apart from is what "batch size" means here, not the number of rows between two optimiser steps.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cenote.ops.masked import widen


def info_nce(
    queries: Float[Tensor, "queries dim"],
    positives: Float[Tensor, "positives dim"],
    negatives: Float[Tensor, "rows negatives width"] | None = None,
    *,
    temperature: float = 0.05,
    in_batch: bool = True,
    negative_mask: Bool[Tensor, "rows each"] | None = None,
    false_negatives: Bool[Tensor, "queries documents"] | None = None,
) -> Float[Tensor, ""]:
    """InfoNCE, ``mean_i -log softmax_j(cos(q_i, d_j) / temperature)_{j = own positive}``.

    With ``in_batch`` the documents of a query are all positives and all hard negatives of the batch (NV-Embed's first
    stage, retrieval data). Without it they are its own positive and its own hard negatives (second stage: other rows
    of a mixed batch can carry the same label, so they must not count as wrong). Source: "NV-Embed" (arXiv
    2405.17428), which publishes neither code nor temperature for its losses.

    Args:
        queries: ``(queries, dim)``.
        positives: the i-th belongs to the i-th query.
        negatives: hard negatives of each query, ``(queries, negatives, dim)``.
        temperature: divides the cosines; 0.02 to 0.05 is usual.
        in_batch: also tell a query apart from the other queries' documents.
        negative_mask: ``False`` leaves a hard negative out (see :func:`select_hard_negatives`).
        false_negatives: with ``in_batch``, ``True`` leaves a document of the batch out for one query, because it is
            relevant to that query too, ``(queries, documents)``: all positives, then all hard negatives row by row. A
            query's own positive always stays.

    Raises:
        ValueError: unequal numbers of queries and positives, no rows, a temperature that is not positive; without
            ``in_batch``, a query that has no hard negative at all, or ``false_negatives``, which then have no place.
        TypeError: embeddings that are not floating point.
    """
    _check(queries, positives, temperature, "temperature")
    count = queries.shape[0]
    if negatives is not None and (negatives.ndim != 3 or negatives.shape[::2] != queries.shape):
        raise ValueError(f"negatives must be ({count}, negatives, {queries.shape[1]}), got {tuple(negatives.shape)}")
    if negative_mask is not None and (negatives is None or negative_mask.shape != negatives.shape[:2]):
        shape = None if negatives is None else tuple(negatives.shape[:2])
        raise ValueError(
            f"negative_mask must have the shape of the negatives, {shape}, got {tuple(negative_mask.shape)}"
        )
    if not in_batch:
        if false_negatives is not None:
            raise ValueError("false_negatives speak of the batch's documents; without in_batch use negative_mask")
        return _own_negatives_only(queries, positives, negatives, temperature, negative_mask)
    flat = None if negatives is None else negatives.flatten(0, 1)
    documents = count + (0 if flat is None else len(flat))
    keep = None
    if negative_mask is not None:
        keep = torch.cat([negative_mask.new_ones(count), negative_mask.flatten()]).expand(count, -1)
    if false_negatives is not None:
        if tuple(false_negatives.shape) != (count, documents):
            raise ValueError(f"false_negatives must be ({count}, {documents}), got {tuple(false_negatives.shape)}")
        own = torch.eye(count, documents, dtype=torch.bool, device=false_negatives.device)
        keep = ~false_negatives | own if keep is None else keep & (~false_negatives | own)
    return _against_all(queries, positives, flat, 1 / temperature, keep)


def hard_negative_nll(
    queries: Float[Tensor, "queries dim"],
    positives: Float[Tensor, "positives dim"],
    negatives: Float[Tensor, "negatives width"] | None = None,
    *,
    scale: float = 20.0,
) -> Float[Tensor, ""]:
    """Cross-entropy of every query against all positives and one pool of hard negatives, cosines times ``scale``.

    Source: "Pooling And Attention: What Are Effective Designs For LLM-Based Embedding Models?" (arXiv 2409.02727),
        where 20 is the scale that ran. The same as :func:`info_nce` at ``temperature = 1 / scale``, with any number
        of negatives.

    Raises:
        ValueError: unequal numbers of queries and positives, no rows, a width that differs, a scale that is not
            positive.
        TypeError: embeddings that are not floating point.
    """
    _check(queries, positives, scale, "scale")
    if negatives is not None and (negatives.ndim != 2 or negatives.shape[1] != queries.shape[1]):
        raise ValueError(f"negatives must be (negatives, {queries.shape[1]}), got {tuple(negatives.shape)}")
    return _against_all(queries, positives, negatives, scale, None)


class HardNegatives(NamedTuple):
    """Chosen candidates of each query, best first.

    Attributes:
        chosen: numbers of the candidates, ``(queries, top_k)``.
        valid: ``False`` where a query had fewer than ``top_k`` acceptable candidates.
    """

    chosen: Int[Tensor, "queries top_k"]
    valid: Bool[Tensor, "queries top_k"]


def select_hard_negatives(
    scores: Float[Tensor, "queries candidates"],
    positive_scores: Float[Tensor, "rows"],
    *,
    top_k: int,
    margin: float = 0.95,
) -> HardNegatives:
    """The ``top_k`` candidates that a teacher scores highest, below ``margin`` of the positive's own score
    ("TopK-PercPos").

    A candidate is acceptable if ``score < s - (1 - margin) |s|`` with s the score of the positive, which is
    ``margin * s`` for a positive s and keeps its sense for a negative one. What scores higher is likely a positive
    nobody labelled. Source: "NV-Embed" (arXiv 2405.17428).

    Args:
        scores: teacher scores of the candidates; ``-inf`` excludes one.
        positive_scores: teacher score of each query's positive.
        top_k: how many to keep.
        margin: fraction of the positive's score, in (0, 1].

    Raises:
        ValueError: a positive score that is missing (not one a query, or not finite), a margin outside (0, 1], NaN
            scores, ``top_k`` below 1 or above the number of candidates.
    """
    if not 0 < margin <= 1:
        raise ValueError(f"margin must lie in (0, 1], got {margin}")
    if positive_scores.shape[0] != scores.shape[0]:
        raise ValueError(
            f"expected one positive score for each of {scores.shape[0]} queries, got {len(positive_scores)}"
        )
    if not bool(positive_scores.isfinite().all()):
        rows = (~positive_scores.isfinite()).nonzero().flatten().tolist()
        raise ValueError(f"every query needs the finite score of its positive, missing in row(s) {rows[:10]}")
    if bool(scores.isnan().any()):
        raise ValueError("candidate scores must not be NaN; give -inf to exclude a candidate")
    if not 1 <= top_k <= scores.shape[1]:
        raise ValueError(f"top_k must lie in 1..{scores.shape[1]} (the candidates), got {top_k}")
    limit = positive_scores - (1 - margin) * positive_scores.abs()
    best = scores.masked_fill(scores >= limit[:, None], float("-inf")).topk(top_k, dim=1)
    return HardNegatives(best.indices, best.values > float("-inf"))


def _check(queries: Tensor, positives: Tensor, factor: float, name: str) -> None:
    for kind, x in (("queries", queries), ("positives", positives)):
        if not x.is_floating_point():
            raise TypeError(f"{kind} must be floating-point embeddings, got {x.dtype}")
    if queries.ndim != 2 or queries.shape != positives.shape:
        raise ValueError(
            f"queries and positives must match one to one, got {tuple(queries.shape)} and {tuple(positives.shape)}"
        )
    if queries.shape[0] == 0:
        raise ValueError("expected at least one query, got none")
    if not factor > 0:
        raise ValueError(f"{name} must be positive, got {factor}")


def _unit(x: Tensor) -> Tensor:
    return F.normalize(widen(x), dim=-1)


def _against_all(
    queries: Tensor, positives: Tensor, negatives: Tensor | None, scale: float, keep: Tensor | None
) -> Tensor:
    with torch.autocast(queries.device.type, enabled=False):
        documents = _unit(positives) if negatives is None else torch.cat([_unit(positives), _unit(negatives)])
        logits = scale * _unit(queries) @ documents.T
        if keep is not None:
            logits = logits.masked_fill(~keep, float("-inf"))
        return F.cross_entropy(logits, torch.arange(len(queries), device=queries.device))


def _own_negatives_only(
    queries: Tensor, positives: Tensor, negatives: Tensor | None, temperature: float, keep: Tensor | None
) -> Tensor:
    bare = [] if negatives is None else (~keep.any(dim=1)).nonzero().flatten().tolist() if keep is not None else []
    if negatives is None or negatives.shape[1] == 0 or bare:
        where = f"row(s) {bare[:10]} have none" if bare else "there are none"
        raise ValueError(f"without in-batch documents every query needs a hard negative of its own, but {where}")
    with torch.autocast(queries.device.type, enabled=False):
        unit = _unit(queries)
        documents = torch.cat([_unit(positives)[:, None], _unit(negatives)], dim=1)
        logits = torch.einsum("qd,qmd->qm", unit, documents) / temperature
        if keep is not None:
            logits = logits.masked_fill(~F.pad(keep, (1, 0), value=True), float("-inf"))
        return F.cross_entropy(logits, torch.zeros(len(queries), dtype=torch.long, device=queries.device))
