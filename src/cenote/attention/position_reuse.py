"""Decoding where some layers choose positions of the cache and others attend to what was chosen for them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor

from cenote.attention.base import LayerCall, Session
from cenote.attention.host import Host
from cenote.attention.plan import LayerPlan
from cenote.ops.gather_attention import Positions, gather_attention


class PositionReuse(Session):
    """A layer plan at work. Prompts and steps of several tokens are dense; sets live for one forward pass.

    A reusing layer attends to its own keys and values at its source's positions, as far as they are visible.

    Args:
        host: the model.
        plan: of its layers; full layers are left alone.
    """

    def __init__(self, host: Host, plan: LayerPlan, layers: Iterable[int] | None = None) -> None:
        plan.check(host.num_layers)
        super().__init__(host, (*plan.layers("select"), *plan.layers("reuse")) if layers is None else layers)
        self.plan = plan
        self.chosen: dict[int, Positions] = {}

    def begin(self, kwargs: dict[str, Any]) -> None:
        self.chosen.clear()

    def attend(self, call: LayerCall) -> Float[Tensor, "batch heads queries head_dim"]:
        if not self.sparse(call):
            return call.dense()
        if self.plan.role(call.layer) == "select":
            output, self.chosen[call.layer] = self.select(call)
            return output
        return gather_attention(call.query, call.key, call.value, self.chosen[self.plan.source(call.layer)], call.scale)

    def sparse(self, call: LayerCall) -> bool:
        """Whether this call is to be sparse at all."""
        return call.decoding

    @abstractmethod
    def select(self, call: LayerCall) -> tuple[Float[Tensor, "batch heads 1 head_dim"], Positions]:
        """What a selecting layer attends to, and the positions it hands on."""


def visible_keys(call: LayerCall) -> Bool[Tensor, "batch keys"] | None:
    """Which keys a decoding step sees, or ``None`` where it sees all: without padding and unused places."""
    return call.real if call.padded or call.keys > call.offset + 1 else None
