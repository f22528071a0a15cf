"""HyLRA: a plan made once for a model says which layers attend fully, which choose chunks of keys and which reuse."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cenote.attention.base import LayerCall, Recipe, refuse_unserved
from cenote.attention.host import Host
from cenote.attention.hylra_hashes import KeyHashes
from cenote.attention.hylra_profile import ChunkSets, profile_layers, token_order
from cenote.attention.plan import LayerPlan
from cenote.attention.position_reuse import PositionReuse, visible_keys
from cenote.ops.chunk_scores import TokenOrder, best_chunks, chunk_positions, chunk_scores
from cenote.ops.gather_attention import Positions, decode_logits, gather_attention
from cenote.ops.layer_policy import allowed_changes, check_sparsity, plan_sources_with_overlap
from cenote.ops.sign_hashes import random_orthogonal
from cenote.specs import unknown_name


@dataclass(frozen=True)
class HyLRA(Recipe):
    """Decoding in which layers share a choice of key chunks. Prompts, and steps of several tokens, are dense.

    In every step a *select* layer scores all keys and keeps, for each key and value head, the ``top_k / chunk_size``
    best chunks, the ``first`` first and ``last`` last among them; the score of a chunk is the sum over its tokens of
    ``softmax(q K^T / sqrt(d))``, averaged over the query heads of the group. It attends to those, and each *reuse*
    layer to its own keys and values at its source's positions. *Full* layers are dense. The newest token is in the last
    chunk, so every layer sees it. Chunks count a row's real tokens, so that padding moves nothing. Source: "HyLRA:
    Hybrid Layer Reuse Attention for Efficient Long-Context Inference" (arXiv 2602.00777) and the plug-in that its
    authors published.

        recipe = HyLRA(top_k=512, chunk_size=64).calibrate(model, [tokenizer(long_text, return_tensors="pt")])
        with recipe(model):
            model.generate(**inputs)

    :meth:`calibrate` makes the plan: the layers whose attention is most spread out become full, and
    a dynamic program chooses sources for the others by how much the layers' choices overlap.

    Other than the official code: scores are exact unless ``scoring="hash"``; the same zones of first and last chunks
    hold when measuring and when decoding; texts of a batch count as further steps, batches as calibration sets; more
    changes are allowed where some layer would otherwise reuse a full one; the length threshold holds for each row.

    Args:
        plan: a :class:`~cenote.attention.plan.LayerPlan` or its roles; ``None`` until calibrated.
        top_k: tokens that select and reuse layers attend to, a multiple of ``chunk_size``.
        chunk_size: tokens a chunk.
        first: chunks at the beginning that are always kept.
        last: chunks at the end that are always kept, the newest, maybe short one among them.
        threshold: rows of at most so many tokens, the new one included, attend densely.
        scoring: ``"attention"`` as above; ``"hash"`` takes the sign bits of keys and of the mean query of a group
            behind a random rotation, and the least Hamming distance in a chunk.
        seed: of that rotation.
        sparsity: share of the layers that need not be full, for :meth:`calibrate`.
        compute_ratio: share of those that may select.
        steps: decoding steps that :meth:`calibrate` measures a text for.
        merge: over key and value heads, the ``"min"`` of overlaps or, for models whose heads are shards of one latent
            cache, their ``"mean"``.
        profile: what :meth:`calibrate` measured: ``ratio`` (layers,), ``overlap`` (sets, layers, layers) with full
            layers taken out, ``path`` (least and summed overlap of the plan) and ``changes`` (used, allowed).
        note: what :meth:`calibrate` had to change.

    Raises:
        ValueError: settings out of range; on entering, a plan of the wrong length or none, a source that does not
            select, or layers with sliding windows that are not full.
    """

    name: ClassVar[str] = "hylra"

    plan: LayerPlan | Sequence[Literal["full", "select"] | int] | None = None
    top_k: int = 2048
    chunk_size: int = 64
    first: int = 1
    last: int = 4
    threshold: int = 2048
    scoring: Literal["attention", "hash"] = "attention"
    seed: int = 0
    sparsity: float = 0.9
    compute_ratio: float = 0.3
    steps: int = 32
    merge: Literal["min", "mean"] = "min"
    profile: dict[str, Tensor] = field(default_factory=dict, compare=False, repr=False)
    note: str = ""

    def __post_init__(self) -> None:
        if self.plan is not None and not isinstance(self.plan, LayerPlan):
            object.__setattr__(self, "plan", LayerPlan(tuple(self.plan)))
        if self.chunk_size < 1 or self.top_k < 1 or self.top_k % self.chunk_size:
            raise ValueError(f"chunk_size must divide top_k, got {self.chunk_size} and {self.top_k}")
        if self.last < 1:
            raise ValueError(f"last must be at least 1, the newest token is in the last chunk; got {self.last}")
        if self.threshold < 0:
            raise ValueError(f"threshold must not be negative, got {self.threshold}")
        if self.scoring not in ("attention", "hash"):
            raise ValueError(f"scoring must be 'attention' or 'hash', got {self.scoring!r}")
        if self.merge not in ("min", "mean"):
            raise ValueError(f"merge must be 'min' or 'mean', got {self.merge!r}")
        _ = self.sets
        check_sparsity(self.sparsity)
        allowed_changes(1, 0, self.sparsity, self.compute_ratio)

    @property
    def needs_state(self) -> bool:  # type: ignore[override]
        """Codes of the keys are kept with them."""
        return self.scoring == "hash"

    @property
    def sets(self) -> ChunkSets:
        """How chunks are chosen."""
        return ChunkSets(self.chunk_size, self.top_k // self.chunk_size, self.first, self.last)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> HyLRA:
        """A published plan with its settings, one of :data:`PRESETS`, with changes; scores are hashed as there."""
        if name not in PRESETS:
            raise unknown_name("preset", name, PRESETS)
        return cls(**{"scoring": "hash", "chunk_size": 128, **PRESETS[name], **changes})

    def calibrate(self, model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> HyLRA:
        """The recipe with a plan for this model, from greedy generations that go on with these texts.

        A recipe that has a plan keeps it; ``dataclasses.replace(recipe, plan=None)`` takes it away.

        Args:
            model: a causal language model that generates.
            batches: ``input_ids`` and ``attention_mask`` (padded on the left) of texts that have more than ``top_k``
                tokens; each batch is a calibration set. Layers with sliding windows become full.

        Raises:
            ValueError: no batches, or texts that are too short.
        """
        if self.plan is not None:
            return self
        measured = profile_layers(model, batches, self.sets, self.steps)
        full = measured.full_layers(self.sparsity)
        overlap = measured.merged(full, self.merge)
        allowed = allowed_changes(overlap.shape[-1], len(full), self.sparsity, self.compute_ratio)
        policy = plan_sources_with_overlap(overlap, allowed)
        note = ""
        if policy.max_changes > allowed:
            note = (
                f"{allowed} changes of source left some layer without overlap with its source; "
                f"{policy.max_changes} were allowed instead"
            )
            warnings.warn(f"HyLRA: {note}", stacklevel=2)
        roles = [
            "full" if layer in full else "select" if source == layer else source
            for layer, source in enumerate(policy.sources)
        ]
        profile = {
            "ratio": measured.ratio.mean(dim=(0, 1)),
            "overlap": overlap,
            "path": torch.tensor([policy.minimum, policy.total]),
            "changes": torch.tensor([policy.changes, policy.max_changes]),
        }
        return dataclasses.replace(self, plan=LayerPlan(tuple(roles)), profile=profile, note=note)

    def start(self, host: Host) -> PositionReuse:
        if self.plan is None:
            raise ValueError("HyLRA has no plan yet: calibrate it, take a preset, or give it one")
        assert isinstance(self.plan, LayerPlan)
        session = _ChunkReuse(host, self.plan, self)
        refuse_unserved("HyLRA", host, session.layers, "make them full in the plan")
        return session


class _ChunkReuse(PositionReuse):
    """HyLRA's choices at work."""

    def __init__(self, host: Host, plan: LayerPlan, recipe: HyLRA) -> None:
        super().__init__(host, plan)
        self.recipe = recipe
        self.keep = recipe.top_k // recipe.chunk_size
        self.order: TokenOrder | None = None
        self.projection: Tensor | None = None

    def begin(self, kwargs: dict[str, Any]) -> None:
        super().begin(kwargs)
        self.order = None

    def sparse(self, call: LayerCall) -> bool:
        if not call.decoding:
            return False
        self.order = self.order or token_order(call)
        return self.order.longest > self.recipe.threshold

    def select(self, call: LayerCall) -> tuple[Float[Tensor, "batch heads 1 head_dim"], Positions]:
        recipe, order = self.recipe, self.order
        assert order is not None
        chunks = -(-order.lengths // recipe.chunk_size)
        # Rows up to the threshold keep every chunk: dense attention, whatever else is in the batch.
        keep = torch.where(order.lengths > recipe.threshold, self.keep, chunks)
        kept = best_chunks(self.score(call, order), keep, chunks, recipe.first, recipe.last)
        positions = chunk_positions(kept, recipe.chunk_size, order)
        return gather_attention(call.query, call.key, call.value, positions, call.scale), positions

    def score(self, call: LayerCall, order: TokenOrder) -> Float[Tensor, "batch kv_heads chunks"]:
        """How much each chunk matters to the query heads of each key and value head."""
        if self.recipe.scoring == "attention":
            logits = decode_logits(call.query, call.key, call.scale)
            visible = visible_keys(call)
            if visible is not None:
                logits = logits.masked_fill(~visible.unsqueeze(1), float("-inf"))
            weights = logits.softmax(dim=-1).unflatten(1, (-1, call.groups)).mean(dim=2)
            return chunk_scores(weights, self.recipe.chunk_size, "sum", order)
        if self.projection is None:
            self.projection = random_orthogonal(call.key.shape[-1], self.recipe.seed).to(call.key.device)
        hashes = KeyHashes.of(call, self.projection)
        mean = call.query.float().unflatten(1, (-1, call.groups)).mean(dim=2)
        return chunk_scores(-hashes.distance(mean).float(), self.recipe.chunk_size, "max", order)


def _published(layers: int, full: Iterable[int], select: Iterable[int]) -> LayerPlan:
    return LayerPlan.from_selectors(layers, full, select)


PRESETS: dict[str, dict[str, Any]] = {
    "qwen3-4b": {
        "plan": _published(36, range(7), [*range(7, 18), 19, 30, 31, 35]),
        "top_k": 2048,
        "threshold": 2048,
    },
    "qwen3-32b": {
        "plan": _published(64, [*range(7), 61, 62, 63], [7, 8, 10, *range(12, 21), 24, 30, 32, 33, 34, 36, 38, 39, 45]),
        "top_k": 8192,
        "threshold": 32768,
    },
    "deepseek-r1": {
        "plan": _published(61, range(6), [*range(6, 10), 12, *range(14, 22), 24, 25, 26, 34, 49]),
        "top_k": 4096,
        "threshold": 4096,
    },
    "qwen3-coder-30b-a3b": {
        "plan": _published(48, range(3), [*range(3, 8), 10, 11, 13, 18, 19, 32, 34, 44]),
        "top_k": 2048,
        "threshold": 2048,
    },
}
"""The authors' plans by model, from the configurations in their repository, with chunks of 128 tokens.

The one for Qwen3-Coder marks its layers the other way round from the rest; read as the rest is, its first layers
would reuse what nothing chose yet.
"""
