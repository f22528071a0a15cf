"""EchoAtt's distillation losses between a student with shared attention maps and its teacher."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from cenote.attention.host import Host
from cenote.attention.plan import LayerPlan
from cenote.ops.distillation import Direction, divergence_loss, hard_label_loss, hidden_state_loss

WEIGHTS = (0.25, 0.25, 0.5)
"""The paper's weights of L_I, L_S and L_H."""


@dataclass(frozen=True)
class EchoAttLosses:
    """One step's losses, scalars.

    Attributes:
        intermediate: L_I, mean squared error of the hidden states behind each block of shared layers, mean of blocks;
            0 without such a block.
        soft: L_S, divergence of the next-token distributions.
        hard: L_H, cross-entropy against the teacher's likeliest token.
        total: their weighted sum.
    """

    intermediate: Tensor
    soft: Tensor
    hard: Tensor
    total: Tensor


def block_ends(plan: LayerPlan) -> tuple[int, ...]:
    """The last follower of every source, where hidden states of student and teacher are compared."""
    ends = (plan.followers(layer) for layer in range(len(plan)))
    return tuple(followers[-1] for followers in ends if followers)


def echo_att_losses(
    student_logits: Float[Tensor, "batch tokens vocabulary"],
    teacher_logits: Float[Tensor, "batch tokens vocabulary"],
    student_states: Sequence[Float[Tensor, "batch tokens dim"]],
    teacher_states: Sequence[Float[Tensor, "batch tokens dim"]],
    mask: Bool[Tensor, "batch tokens"] | None = None,
    *,
    weights: tuple[float, float, float] = WEIGHTS,
    direction: Direction = "reverse",
) -> EchoAttLosses:
    """``a L_I + b L_S + g L_H``, means over the real tokens (arXiv 2409.14595).

    The paper writes a squared norm in L_I, which grows with the width; here it is a mean over entries.

    Args:
        student_states, teacher_states: hidden states behind the last layer of each block.
        weights: ``(a, b, g)``.
        direction: of L_S: ``"reverse"`` is KL(student || teacher), as printed; ``"forward"`` the other way round.

    Raises:
        ValueError: unequal numbers of states, weights that are negative or not three, no real token.
    """
    if len(student_states) != len(teacher_states):
        raise ValueError(f"got {len(student_states)} states of the student and {len(teacher_states)} of the teacher")
    if len(weights) != 3 or min(weights) < 0:
        raise ValueError(f"expected three weights of at least 0, got {weights}")
    pairs = zip(student_states, teacher_states, strict=True)
    behind = [hidden_state_loss(ours, theirs, mask) for ours, theirs in pairs]
    intermediate = torch.stack(behind).mean() if behind else student_logits.new_zeros((), dtype=torch.float32)
    soft = divergence_loss(student_logits, teacher_logits, mask, direction=direction)
    hard = hard_label_loss(student_logits, teacher_logits, mask)
    a, b, g = weights
    return EchoAttLosses(intermediate, soft, hard, a * intermediate + b * soft + g * hard)


def distillation_losses(
    student: nn.Module,
    teacher: nn.Module,
    batch: Mapping[str, Tensor],
    *,
    weights: tuple[float, float, float] = WEIGHTS,
    direction: Direction = "reverse",
) -> EchoAttLosses:
    """:func:`echo_att_losses` of one batch: the student's pass with gradients, the teacher's without and in eval mode.

    Args:
        student: what :func:`~cenote.integrations.echo_att_model.share_attention` makes, possibly wrapped for training.
        teacher: the model it was made of.
        batch: ``input_ids`` and, where there is padding, ``attention_mask``.

    Raises:
        ValueError: models with unequal numbers of layers, or what :func:`echo_att_losses` refuses.
    """
    ours, theirs = Host.of(student), Host.of(teacher)
    if ours.num_layers != theirs.num_layers:
        raise ValueError(f"the student has {ours.num_layers} layers, the teacher {theirs.num_layers}: expected equal")
    ends = block_ends(ours.config.layer_plan)
    mask = batch.get("attention_mask")
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask") if batch.get(name) is not None}
    training = teacher.training
    teacher.eval()
    try:
        with torch.no_grad(), behind_layers(theirs, ends) as teacher_states:
            teacher_logits = teacher(**inputs, use_cache=False).logits
    finally:
        teacher.train(training)
    with behind_layers(ours, ends) as student_states:
        student_logits = student(**inputs, use_cache=False).logits
    return echo_att_losses(
        student_logits, teacher_logits, student_states, teacher_states, None if mask is None else mask.bool(),
        weights=weights, direction=direction,
    )  # fmt: skip


@contextmanager
def behind_layers(host: Host, layers: Iterable[int]) -> Iterator[list[Tensor]]:
    """Hidden states behind these layers in the last forward pass within the block, in the layers' order.

    A host's own ``hidden_states`` have the last norm in the last layer's, which these have not.
    """
    states: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        states.append(output[0] if isinstance(output, tuple) else output)

    hooks = [host.layers[layer].register_forward_hook(keep) for layer in layers]
    hooks.append(host.decoder.register_forward_pre_hook(lambda *_: states.clear()))
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()
