"""Additive-angular-margin softmax (ArcFace): classes as directions, pulled apart by an angle."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from cenote.ops.masked import widen

SINE_FLOOR = 1e-7
"""Smallest squared sine, about the rounding of a cosine near 1: the root's gradient stays finite."""


class MarginOutput(NamedTuple):
    """What the loss gives.

    Attributes:
        loss: mean cross-entropy over items and heads.
        probabilities: softmax of the logits with their margin, mean over heads, without gradient, ``(batch, classes)``.
    """

    loss: Float[Tensor, ""]
    probabilities: Float[Tensor, "batch classes"]


def speaker_vectors(
    embedding: Float[Tensor, "batch dim"], num_heads: int = 1
) -> Float[Tensor, "batch {num_heads} width"]:
    """An embedding as ``num_heads`` equal parts of unit length; clips are scored by the cosine of like parts.

    Raises:
        ValueError: ``num_heads`` does not divide the width.
    """
    if num_heads < 1 or embedding.shape[-1] % num_heads:
        raise ValueError(f"num_heads must divide the embedding width {embedding.shape[-1]}, got {num_heads}")
    return F.normalize(widen(embedding).unflatten(-1, (num_heads, -1)), dim=-1)


def additive_angular_margin(
    cosine: Float[Tensor, "batch heads classes"],
    labels: Int[Tensor, "batch"],
    margin: float = 0.2,
    scale: float = 30.0,
) -> Float[Tensor, "batch heads classes"]:
    """Logits ``scale * cos(angle)``, where the angle of an item's own class counts as ``margin`` radians larger.

    Where ``angle + margin`` would pass 180 degrees, ``cos(angle) - margin sin(margin)`` continues the fall.

    Args:
        cosine: between an item and each class.
        labels: own class of each item.
        margin: in radians, from 0 to below pi.
        scale: factor of the cosines, positive.

    Raises:
        ValueError: a margin or scale outside its range, or a label outside ``0..classes - 1``.
    """
    if not 0 <= margin < math.pi or not scale > 0:
        raise ValueError(f"expected a margin in [0, pi) and a positive scale, got margin={margin}, scale={scale}")
    classes = cosine.shape[-1]
    if not torch.compiler.is_compiling() and not bool(((labels >= 0) & (labels < classes)).all()):
        raise ValueError(f"labels must lie in 0..{classes - 1}, got {labels.min().item()} to {labels.max().item()}")
    index = labels.long()[:, None, None].expand(-1, cosine.shape[1], 1)
    own = cosine.gather(-1, index)
    sine = (1 - own.square()).clamp(min=SINE_FLOOR).sqrt()
    moved = torch.where(
        own > math.cos(math.pi - margin),
        own * math.cos(margin) - sine * math.sin(margin),
        own - margin * math.sin(math.pi - margin),
    )
    return scale * cosine.scatter(-1, index, moved)


class AAMSoftmax(nn.Module):
    """Cross-entropy of :func:`additive_angular_margin` over the cosines of embeddings and learned class directions.

    With several heads the embedding is cut into as many parts, each with its own directions, and the cross-entropies
    are averaged. Computed in float32 or better. Sources: "ArcFace: Additive Angular Margin Loss for Deep Face
    Recognition" (arXiv 1801.07698); as used for L-TDNN (arXiv 2409.07770). Otherwise than in the official code, the
    squared sine has a floor of 1e-7, so that an embedding right on its class direction has a finite gradient.

    Args:
        dim: width of the embeddings.
        num_classes: number of classes, at least 2.
        num_heads: parts of the embedding; must divide ``dim``.
        margin: in radians, from 0 (scaled cosine softmax) to below pi.
        scale: factor of the cosines.
    """

    def __init__(
        self, dim: int, num_classes: int, num_heads: int = 1, margin: float = 0.2, scale: float = 30.0
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads must divide dim, got num_heads={num_heads} for dim={dim}")
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {num_classes}")
        if not 0 <= margin < math.pi or not scale > 0:
            raise ValueError(f"expected a margin in [0, pi) and a positive scale, got margin={margin}, scale={scale}")
        self.dim, self.margin, self.scale = dim, margin, scale
        self.weight = nn.Parameter(torch.empty(num_heads, dim // num_heads, num_classes))
        nn.init.xavier_uniform_(self.weight)

    def cosines(self, embedding: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch heads classes"]:
        """Cosine of each part of an embedding and each class direction."""
        if embedding.ndim != 2 or embedding.shape[1] != self.dim:
            raise ValueError(f"expected embeddings (batch, {self.dim}), got shape {tuple(embedding.shape)}")
        with torch.autocast(embedding.device.type, enabled=False):
            parts = speaker_vectors(embedding, len(self.weight))
            return torch.einsum("bhk,hkc->bhc", parts, F.normalize(widen(self.weight), dim=1))

    def forward(self, embedding: Float[Tensor, "batch dim"], labels: Int[Tensor, "items"]) -> MarginOutput:
        """Loss and probabilities; ``ValueError`` for another width, another number of labels or labels out of
        range."""
        if labels.shape != embedding.shape[:1]:
            raise ValueError(f"expected one label an item, got {tuple(labels.shape)} for {len(embedding)} items")
        logits = additive_angular_margin(self.cosines(embedding), labels, self.margin, self.scale)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.long().repeat_interleave(logits.shape[1]))
        return MarginOutput(loss, logits.detach().softmax(dim=-1).mean(dim=1))

    @classmethod
    def from_reference(cls, state_dict: dict[str, Tensor], **config: Any) -> AAMSoftmax:
        """From the official key ``aam_softmax.weight`` (heads, dim / heads, classes); ``config`` takes
        ``aam_margin`` and ``aam_scale``, checks ``num_loss_heads`` and ``num_classes``, and passes over the rest."""
        if "aam_softmax.weight" not in state_dict:
            raise ValueError("not a checkpoint of this loss: it has no aam_softmax.weight")
        weight = state_dict["aam_softmax.weight"]
        heads, width, classes = weight.shape
        for word, size in (("num_loss_heads", heads), ("num_classes", classes)):
            if config.get(word, size) != size:
                raise ValueError(f"{word}={config[word]} contradicts the weights, which have {size}")
        loss = cls(heads * width, classes, heads, config.get("aam_margin", 0.2), config.get("aam_scale", 30.0))
        loss.load_state_dict({"weight": weight})
        return loss
