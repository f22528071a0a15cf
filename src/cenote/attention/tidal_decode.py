"""TidalDecode: in a decoding step one layer chooses, per head, the positions that the following layers attend to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor

from cenote.attention.base import LayerCall, Recipe, refuse_unserved
from cenote.attention.cache_correction import CacheCorrection
from cenote.attention.host import Host
from cenote.attention.plan import LayerPlan
from cenote.attention.position_reuse import PositionReuse, visible_keys
from cenote.ops.gather_attention import Positions, decode_logits, topk_positions, weigh_values


@dataclass(frozen=True)
class TidalDecode(Recipe):
    """Position-persistent sparse attention (Yang et al. 2024, arXiv 2410.05076) for decoding.

    A selecting layer attends to all keys and hands on ``I = top-k(q K^T)`` for each query head; a reusing layer gives
    ``softmax(q K_I^T / sqrt(d)) V_I`` with its own queries, keys and values. Layers below ``sparse_layer_start`` are
    dense, the one at ``sparse_layer_start`` selects, and so does each correction layer; all others reuse the sets of
    the last layer that selected. Prompts and continuations of several tokens are dense, so that assisted decoding is
    checked densely. Sets live for one step. Nothing is learnt.

    Other than in the official code, the masks are applied before the choice and never chosen by, sets are kept as
    positions instead of masks, and key-value heads may be shared (a group's query heads have a set each).

    Args:
        budget: positions a head may attend to: a number, or a share of the row's tokens below 1.
        sparse_layer_start: first selecting layer, counted from 0.
        correction_layer: where the choice is made anew: a layer, several, or none (``()``). If not given, the layer at
            two fifths of the model, which is the published 13 of 32; the paper tunes it on a retrieval test.
        plan: roles of the layers, instead of the two settings above: ``("full", "select", 1, 1)``.
        always_newest: count the newest token into every set, as the published kernels do and the published accuracy
            code does not.
        correction_interval: rerun the last so many decoded tokens densely, in one pass, and overwrite their keys and
            values in all layers, whenever so many have been decoded; never if not given. 1 keeps the cache as dense
            decoding would have it.

    Raises:
        ValueError: a budget below 1 that is no share, or other settings that cannot be meant.
    """

    name = "tidal_decode"

    budget: int | float = 256
    sparse_layer_start: int = 2
    correction_layer: int | tuple[int, ...] | None = None
    plan: LayerPlan | tuple[str | int, ...] | None = None
    always_newest: bool = False
    correction_interval: int | None = None

    def __post_init__(self) -> None:
        number = isinstance(self.budget, int) and not isinstance(self.budget, bool) and self.budget >= 1
        if not number and not (isinstance(self.budget, float) and 0 < self.budget < 1):
            raise ValueError(f"budget must be a number of positions from 1 on or a share below 1, got {self.budget!r}")
        if self.sparse_layer_start < 0:
            raise ValueError(f"sparse_layer_start must be a layer, counted from 0; got {self.sparse_layer_start}")
        if self.correction_interval is not None and self.correction_interval < 1:
            raise ValueError(f"correction_interval must be at least 1 token, got {self.correction_interval}")
        wrong = [layer for layer in self._corrections() if layer <= self.sparse_layer_start]
        if wrong:
            raise ValueError(f"correction layers must follow sparse_layer_start {self.sparse_layer_start}, got {wrong}")
        if isinstance(self.plan, tuple):
            object.__setattr__(self, "plan", LayerPlan(self.plan))

    @property
    def needs_state(self) -> bool:  # type: ignore[override]
        return self.correction_interval is not None

    def _corrections(self) -> tuple[int, ...]:
        given = self.correction_layer
        return given if isinstance(given, tuple) else () if given is None else (given,)

    def plan_for(self, num_layers: int) -> LayerPlan:
        """The roles of a model's layers.

        Raises:
            ValueError: layers that the model does not have, or a model too small for any layer to be sparse.
        """
        if isinstance(self.plan, LayerPlan):
            self.plan.check(num_layers)
            return self.plan
        start, corrections = self.sparse_layer_start, self._corrections()
        if start >= num_layers:
            raise ValueError(f"sparse_layer_start must be one of the model's {num_layers} layers, got {start}")
        if self.correction_layer is None:
            middle = max(round(num_layers * 13 / 32), start + 1)
            corrections = (middle,) if middle < num_layers - 1 else ()
        return LayerPlan.from_selectors(num_layers, range(start), (start, *corrections))

    def start(self, host: Host) -> TidalDecodeSession:
        plan = self.plan_for(host.num_layers)
        refuse_unserved(self.name, host, plan.layers("select") + plan.layers("reuse"), "declare them full in the plan")
        return TidalDecodeSession(host, plan, self)


class TidalDecodeSession(PositionReuse):
    """:class:`TidalDecode` at work. ``chosen`` holds the last pass's sets by the layer that chose them."""

    def __init__(self, host: Host, plan: LayerPlan, recipe: TidalDecode) -> None:
        super().__init__(host, plan)
        self.recipe = recipe
        interval = recipe.correction_interval
        self.correction = None if interval is None else CacheCorrection(host, interval)

    def begin(self, kwargs: dict[str, Any]) -> None:
        super().begin(kwargs)
        if self.correction is not None:
            self.correction.begin(kwargs)

    def finish(self) -> None:
        if self.correction is not None:
            self.correction.finish()

    def attend(self, call: LayerCall) -> Float[Tensor, "batch heads queries head_dim"]:
        if self.correction is not None:
            self.correction.padding = call.call.mask.padding
        return super().attend(call)

    def sparse(self, call: LayerCall) -> bool:
        if not call.decoding or (self.correction is not None and self.correction.running):
            return False
        # With room for everything the dense form says the same and is faster.
        return isinstance(self.recipe.budget, float) or self.recipe.budget <= call.offset

    def select(self, call: LayerCall) -> tuple[Float[Tensor, "batch heads 1 head_dim"], Positions]:
        seen, budget = visible_keys(call), self.recipe.budget
        logits = decode_logits(call.query, call.key, call.scale)
        if seen is not None:
            logits = logits.masked_fill(~seen.unsqueeze(1), float("-inf"))
        output = weigh_values(logits.softmax(dim=-1), call.value)
        if self.recipe.always_newest:
            logits[..., call.offset] = float("inf")
        room: int | Tensor = budget if isinstance(budget, int) else share_of(budget, call, seen)
        return output, topk_positions(logits, room, seen)


def share_of(share: float, call: LayerCall, seen: Bool[Tensor, "batch keys"] | None) -> int | Int[Tensor, "batch"]:
    """That share of each row's tokens, rounded, at least 1."""
    if seen is None:
        return max(1, round(share * call.keys))
    return (share * seen.sum(dim=1).double()).round().long().clamp(min=1)
