"""How SeerAttention's gates learn: the frozen model shows its own attention, and the gates predict it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cenote.attention.base import LayerCall, Recipe, Session
from cenote.attention.block_prefill import Prompt, prompts
from cenote.attention.host import Host
from cenote.attention.seer_decode_training import ShownSteps
from cenote.attention.seer_gate import DecodeGate, PrefillGate, Rotary
from cenote.ops.block_gate import block_target, distillation_loss

if TYPE_CHECKING:
    from cenote.attention.seer_learning import GatedRecipe

FACTOR = 10.0
"""Published weight of the loss."""


@dataclass(frozen=True)
class Shown:
    """What a layer showed of prompts of one length: all that its gate reads, and what the gate is to say.

    Attributes:
        query: pooled queries, ``(batch, heads, blocks, query_width)``.
        key: pooled keys, ``(batch, kv_heads, blocks, key_width)``.
        rotary: positions of the blocks' first tokens.
        target: largest attention of each pair of blocks, rows normalised, ``(batch, heads, blocks, blocks)``.
    """

    query: Tensor
    key: Tensor
    rotary: Rotary | None
    target: Tensor

    @classmethod
    def of(cls, gate: PrefillGate, prompt: Prompt) -> Shown:
        """What the gate learns from in these prompts."""
        size, rotary = gate.block_size, None
        if prompt.rotary is not None:
            rotary = (prompt.rotary[0][:, ::size].clone(), prompt.rotary[1][:, ::size].clone())
        target = block_target(prompt.query, prompt.key, size, prompt.scale)
        return cls(*gate.pool(*prompt.unrotated), rotary, target)

    def loss(self, gate: PrefillGate, reduction: str = "mean") -> Float[Tensor, ""]:
        """``KL(target || softmax(logits))``, before the published factor of 10."""
        return distillation_loss(gate.score(self.query, self.key, self.rotary), self.target, reduction)


Observation = Mapping[str, Shown | ShownSteps]
"""What the layers showed of prompts of one length, by the layer's number."""


@torch.no_grad()
def observe(
    model: nn.Module, recipe: GatedRecipe, gates: nn.ModuleDict, batch: Mapping[str, Tensor]
) -> list[Observation]:
    """Run the model densely and keep, of every layer with a gate, what the gate's training needs.

    A gate reads pooled queries and keys, which its weights do not change; so the model runs once over an input however
    often the gates learn from it, and what is kept is smaller than the input by the size of a block.

    Args:
        model: the frozen model.
        recipe: whose gates they are.
        gates: by the layer's number.
        batch: ``input_ids`` and maybe ``attention_mask``, as the model takes them; ``labels`` are left out.

    Returns:
        One observation, or one a row where rows have padding.
    """
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with _Watching(gates)(model) as session:
        model(**inputs, use_cache=False)
    assert isinstance(session, _WatchingSession)
    return [*session.seen]


def gate_loss(gates: nn.ModuleDict, observation: Observation, reduction: str = "mean") -> Float[Tensor, ""]:
    """Ten times the sum over layers of :func:`~cenote.ops.block_gate.distillation_loss`."""
    losses = [shown.loss(gates[layer], reduction) for layer, shown in observation.items()]  # type: ignore[arg-type]
    return FACTOR * torch.stack(losses).sum()


def train_gates(
    gates: nn.ModuleDict,
    observations: Sequence[Observation],
    *,
    steps: int,
    learning_rate: float,
    warmup: int = 20,
    reduction: str = "row",
    seed: int = 0,
) -> list[float]:
    """AdamW with warm-up and a cosine down to 0, one observation a step in a shuffled order, in place.

    Returns:
        The loss before each step.

    Raises:
        ValueError: nothing observed.
    """
    if not observations:
        raise ValueError("gates learn from what the model shows on inputs: got no batches")
    gates.requires_grad_(True)
    optimiser = torch.optim.AdamW(gates.parameters(), lr=learning_rate, weight_decay=0.0)
    rates = torch.optim.lr_scheduler.LambdaLR(
        optimiser,
        lambda step: min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * min(step / max(steps, 1), 1.0))),
    )
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    losses = []
    for _ in range(steps):
        order = order or torch.randperm(len(observations), generator=generator).tolist()
        with torch.enable_grad():
            loss = gate_loss(gates, observations[order.pop()], reduction)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        rates.step()
        losses.append(loss.item())
    return losses


@dataclass(frozen=True)
class _Watching(Recipe):
    """Attends as the model does and notes what gates learn from."""

    name: ClassVar[str] = "seer_attention's training"

    gates: nn.ModuleDict

    def start(self, host: Host) -> _WatchingSession:
        return _WatchingSession(host, self)


class _WatchingSession(Session):
    def __init__(self, host: Host, watching: _Watching) -> None:
        super().__init__(host, [int(layer) for layer in watching.gates])
        self.watching = watching
        self.seen: list[dict[str, Shown | ShownSteps]] = []

    def begin(self, kwargs: dict[str, Any]) -> None:
        self.seen = []

    def attend(self, call: LayerCall) -> Float[Tensor, "batch heads queries head_dim"]:
        gate = self.watching.gates[str(call.layer)]
        for number, (_, prompt) in enumerate(prompts(call)):
            if number == len(self.seen):
                self.seen.append({})
            self.seen[number][str(call.layer)] = (
                ShownSteps.of(gate, prompt) if isinstance(gate, DecodeGate) else Shown.of(gate, prompt)  # type: ignore[arg-type]
            )
        return call.dense()
