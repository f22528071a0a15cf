"""What HyLRA measures of a model before it plans: how spread out each layer attends, and how alike layers choose."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cenote.attention.base import LayerCall, Recipe, Session
from cenote.attention.host import Host
from cenote.ops.chunk_scores import TokenOrder, best_chunks, chunk_scores, common_members, set_overlap, spread
from cenote.ops.gather_attention import decode_logits
from cenote.ops.layer_policy import choose_full_layers, merge_overlap


@dataclass(frozen=True)
class ChunkSets:
    """Which chunks a query chooses, and of which kind its attention is.

    Args:
        chunk_size: tokens a chunk.
        keep: chunks to choose.
        first: of them always so many at the beginning.
        last: and so many at the end, the last one maybe short.

    Raises:
        ValueError: less than one token or chunk, or more chunks that are always chosen than there is room for.
    """

    chunk_size: int
    keep: int
    first: int = 1
    last: int = 4

    def __post_init__(self) -> None:
        if self.chunk_size < 1 or self.keep < 1 or self.first < 0 or self.last < 0:
            raise ValueError(f"expected chunks of at least one token and at least one chunk, got {self}")
        if self.first + self.last >= self.keep:
            raise ValueError(
                f"the {self.first} first and {self.last} last chunks are always chosen: of {self.keep} none is left"
            )

    def measure(
        self, weights: Float[Tensor, "batch heads keys"], order: TokenOrder
    ) -> tuple[Float[Tensor, "batch heads"], Tensor]:
        """Spread of each row of attention, and its chosen chunks as a mask ``(batch, heads, chunks)``.

        Raises:
            ValueError: a row that does not have more chunks than are to be chosen.
        """
        chunks = -(-order.lengths // self.chunk_size)
        fewest = int(chunks.min())
        if fewest <= self.keep:
            raise ValueError(f"a calibration text has {fewest} chunks: expected more than the {self.keep} to choose")
        mass = chunk_scores(weights, self.chunk_size, "sum", order)
        kept = best_chunks(mass, torch.full_like(chunks, self.keep), chunks, self.first, self.last)
        return spread(mass, chunks), kept.to_mask(mass.shape[-1])


class LayerStatistics:
    """Spread and overlap over the steps of one calibration set. No attention map outlives its layer's turn.

    Args:
        num_layers: of the model.
        sets: how chunks are chosen.
        skipped: layers that are not measured: their spread is 1, and they overlap with no other.
    """

    def __init__(self, num_layers: int, sets: ChunkSets, skipped: Iterable[int] = ()) -> None:
        self.num_layers, self.sets = num_layers, sets
        self.measured = [layer for layer in range(num_layers) if layer not in set(skipped)]
        self._now: dict[int, tuple[Tensor, Tensor]] = {}
        self._ratios: list[Tensor] = []
        self._common: Tensor | None = None

    def add(self, layer: int, weights: Float[Tensor, "batch kv_heads keys"], order: TokenOrder) -> None:
        """One layer's attention in a step, averaged over the query heads of each key and value head."""
        self._now[layer] = self.sets.measure(weights, order)
        if len(self._now) < len(self.measured):
            return
        ratio, chosen = (torch.stack([self._now[each][part] for each in self.measured], dim=2) for part in (0, 1))
        self._now.clear()
        wide = ratio.new_ones(*ratio.shape[:2], self.num_layers)
        wide[:, :, self.measured] = ratio
        self._ratios.append(wide)
        common = common_members(chosen).sum(dim=0)
        self._common = common if self._common is None else self._common + common

    @property
    def ratio(self) -> Float[Tensor, "series steps layers"]:
        """Spread: share of the chunks that holds up to 90 % of the attention; a series is a head of one text."""
        if not self._ratios:
            raise ValueError("no calibration steps: nothing was measured")
        return torch.stack(self._ratios, dim=2).flatten(0, 1)

    @property
    def overlap(self) -> Float[Tensor, "kv_heads layers layers"]:
        """Mean over steps and texts of ``|S_i and S_j| / |S_j|`` for ``i < j``; 1 on the diagonal, 0 below."""
        if self._common is None:
            raise ValueError("no calibration steps: nothing was measured")
        found = set_overlap(self._common)
        overlap = torch.eye(self.num_layers, dtype=found.dtype, device=found.device).repeat(len(found), 1, 1)
        index = torch.tensor(self.measured, device=found.device)
        overlap[:, index[:, None], index] = found
        return overlap


@dataclass(frozen=True)
class LayerProfile:
    """The measurements on a model.

    Attributes:
        ratio: ``(series, steps, layers)``, see :attr:`LayerStatistics.ratio`; series of all calibration sets.
        overlap: ``(sets, kv_heads, layers, layers)``, one for each batch of calibration texts.
        unserved: layers that must stay full, being no plain causal attention.
    """

    ratio: Float[Tensor, "series steps layers"]
    overlap: Float[Tensor, "sets kv_heads layers layers"]
    unserved: tuple[int, ...] = ()

    def full_layers(self, sparsity: float) -> tuple[int, ...]:
        """The layers that attend too widely, see :func:`cenote.ops.layer_policy.choose_full_layers`."""
        return choose_full_layers(self.ratio, sparsity, self.unserved)

    def merged(self, full: tuple[int, ...], how: str = "min") -> Float[Tensor, "sets layers layers"]:
        """One matrix for each calibration set, see :func:`cenote.ops.layer_policy.merge_overlap`."""
        return torch.stack([merge_overlap(each, full, how) for each in self.overlap])


@dataclass(frozen=True)
class _Measuring(Recipe):
    """Dense attention, with each decoding step measured."""

    name: ClassVar[str] = "hylra_profile"
    sets: ChunkSets = ChunkSets(64, 32)

    def start(self, host: Host) -> _Measured:
        return _Measured(host, LayerStatistics(host.num_layers, self.sets, host.unserved()))


class _Measured(Session):
    def __init__(self, host: Host, statistics: LayerStatistics) -> None:
        super().__init__(host, statistics.measured)
        self.statistics = statistics
        self._order: TokenOrder | None = None

    def begin(self, kwargs: dict[str, Any]) -> None:
        self._order = None

    def attend(self, call: LayerCall) -> Float[Tensor, "batch heads queries head_dim"]:
        if call.decoding:
            self._order = self._order or token_order(call)
            logits = decode_logits(call.query, call.key, call.scale).masked_fill(~call.real.unsqueeze(1), float("-inf"))
            weights = logits.softmax(dim=-1).unflatten(1, (-1, call.groups)).mean(dim=2)
            self.statistics.add(call.layer, weights, self._order)
        return call.dense()


def token_order(call: LayerCall) -> TokenOrder:
    """Where the real tokens of the call are."""
    if call.padded:
        return TokenOrder.of(call.real)
    return TokenOrder.full(call.query.shape[0], call.offset + call.queries, call.key.device)


def profile_layers(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor]], sets: ChunkSets, steps: int = 32
) -> LayerProfile:
    """Let the model go on with each batch of texts for ``steps`` tokens, densely and greedily, and measure the steps.

    Args:
        model: a causal language model that generates.
        batches: ``input_ids`` and ``attention_mask`` (padded on the left); each batch is a calibration set.
        sets: how chunks are chosen.
        steps: decoding steps to measure.

    Raises:
        ValueError: no batch, fewer than one step, texts with too few chunks or padded on the right, a model that
            does not generate, or without any layer of plain causal attention.
    """
    host = Host.of(model)
    unserved = tuple(host.unserved())
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if not hasattr(model, "generate"):
        raise ValueError(f"{type(model).__name__} does not generate: calibrate the model with its language-model head")
    if len(unserved) == host.num_layers:
        raise ValueError("the model has no layer of plain causal attention to profile")
    ratios, overlaps = [], []
    for batch in batches:
        batch = {"attention_mask": torch.ones_like(batch["input_ids"]), **batch}
        if not bool(batch["attention_mask"][:, -1].all()):
            raise ValueError("calibration texts must be padded on the left, as generation wants them")
        # The first new token comes of the prompt's own pass, so ``steps`` decoding steps make one token more.
        wanted = {"max_new_tokens": steps + 1, "min_new_tokens": steps + 1, "do_sample": False, "num_beams": 1}
        with torch.no_grad(), _Measuring(sets)(model) as session:
            model.generate(**batch, **wanted, use_cache=True)  # type: ignore[operator]
        assert isinstance(session, _Measured)
        ratios.append(session.statistics.ratio)
        overlaps.append(session.statistics.overlap)
    if not ratios:
        raise ValueError("no calibration batches: nothing to profile")
    return LayerProfile(torch.cat(ratios), torch.stack(overlaps), unserved)
