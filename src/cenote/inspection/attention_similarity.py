"""Which layers of a decoder attend alike, beside how alike their maps would be anyway."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cenote.attention.echo_att_similarity import measure_similarity
from cenote.attention.host import Host
from cenote.files import write_whole
from cenote.ops.layer_sharing import choose_by_gap, choose_by_similarity, inner_layers, removed_parameters

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class AttentionSimilarity:
    """How alike the layers of a model attend on some texts.

    Causal maps are alike whatever a model has learnt: the first rows have few places to look at. Judge ``similarity``
    against the two baselines.

    Attributes:
        similarity: cosine of two layers' maps, ``(layers, layers)``, mean over samples.
        shuffled: the same of a copy of the model whose query and key weights are shuffled, entry by entry: what their
            scale, causality and the embeddings alone bring about.
        uniform: cosine of each layer's map with equal attention to all that is visible, ``(layers,)``.
        samples, tokens: how much text was read.
    """

    similarity: Tensor
    shuffled: Tensor
    uniform: Tensor
    samples: int
    tokens: int

    @property
    def scores(self) -> Float[Tensor, " layers"]:
        """Mean similarity of each layer to the others."""
        return _to_others(self.similarity)

    @property
    def inner(self) -> tuple[int, ...]:
        """Layers between the unlike ones at either end; see :func:`~cenote.ops.layer_sharing.inner_layers`."""
        return tuple(inner_layers(self.similarity))

    def choose(self, ratio: float | Literal["auto"] = "auto", block_size: int = 2) -> tuple[int, ...]:
        """Layers to share: ``round(ratio * layers)`` of them by similarity, or blocks of the inner layers.

        Raises:
            ValueError: fewer than three layers; a ratio that shares none or all.
        """
        if isinstance(ratio, str):
            if ratio != "auto":
                raise ValueError(f"ratio must be a number or 'auto', got {ratio!r}")
            return choose_by_gap(self.similarity, block_size)
        return choose_by_similarity(self.similarity, ratio)

    def frame(self) -> pd.DataFrame:
        """One row a layer: its score, those of the baselines, and its similarity to the layer before it."""
        import pandas as pd

        before = [float("nan"), *self.similarity.diagonal(offset=1).tolist()]
        return pd.DataFrame(
            {
                "layer": range(len(self.similarity)),
                "to_others": self.scores.tolist(),
                "to_previous": before,
                "shuffled_to_others": _to_others(self.shuffled).tolist(),
                "to_uniform": self.uniform.tolist(),
            }
        )

    def plot(self) -> Any:
        """Both matrices side by side, a matplotlib figure.

        Raises:
            ImportError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise ImportError("drawing needs matplotlib: pip install matplotlib") from None
        figure = Figure(figsize=(8, 3.8), layout="constrained")
        axes = figure.subplots(1, 2)
        for axis, values, words in zip(
            axes, (self.similarity, self.shuffled), ("trained", "query and key weights shuffled"), strict=True
        ):
            image = axis.imshow(values, vmin=0, vmax=1, cmap="viridis")
            axis.set_title(words, fontsize=9)
            axis.set_xlabel("layer", fontsize=8)
        figure.colorbar(image, ax=axes, label="cosine of attention maps", shrink=0.8)
        return figure

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything as JSON."""
        held = {name: getattr(self, name).tolist() for name in ("similarity", "shuffled", "uniform")}
        write_whole(Path(path), json.dumps({**held, "samples": self.samples, "tokens": self.tokens}) + "\n")


def attention_similarity_of_layers(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor]], *, head_mean: bool = False, seed: int = 0
) -> AttentionSimilarity:
    """Compare the attention maps of a decoder's layers on these texts, a batch at a time.

    ``mean over samples of <A_i, A_j> / (|A_i| |A_j|)``, maps flattened over heads and positions, padding left out
    (arXiv 2409.14595). No map is kept whole.

    Args:
        model: a transformers decoder.
        batches: ``input_ids`` and, where there is padding, ``attention_mask``; read twice.
        head_mean: compare means over heads.
        seed: of the shuffled weights.

    Raises:
        ValueError: see :func:`cenote.attention.echo_att_similarity.measure_similarity`.
    """
    batches = list(batches)
    found = measure_similarity(model, batches, head_mean=head_mean)
    chance = measure_similarity(_shuffled(model, seed), batches, head_mean=head_mean)
    return AttentionSimilarity(found.layers, chance.layers, found.uniform, found.samples, found.tokens)


def removed_by_sharing(model: nn.Module, shared: int) -> int:
    """Parameters that the model loses when so many layers share; see :func:`~cenote.ops.layer_sharing`."""
    host = Host.of(model)
    attention = host.attentions[0]
    return removed_parameters(
        shared, host.config.hidden_size, host.num_heads, host.num_kv_heads, host.head_dim,
        bias=attention.q_proj.bias is not None, qk_norm=hasattr(attention, "q_norm"),
    )  # fmt: skip


def _to_others(similarity: Tensor) -> Tensor:
    return (similarity.sum(dim=1) - similarity.diagonal()) / max(1, len(similarity) - 1)


@torch.no_grad()
def _shuffled(model: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    twin = copy.deepcopy(model)
    for attention in Host.of(twin).attentions:
        for part in (attention.q_proj, attention.k_proj):
            order = torch.randperm(part.weight.numel(), generator=generator).to(part.weight.device)
            part.weight.copy_(part.weight.flatten()[order].view_as(part.weight))
    return twin
