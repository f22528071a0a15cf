"""Which key positions a model attends to, whatever a recipe does inside: read off the gradient."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from cenote.attention.host import Host
from cenote.integrations.attention_interface import Attended, AttentionCall, redirected


@dataclass
class Density:
    """Counts of attended and of visible pairs of a query and a key, over layers and query heads."""

    attended: int = 0
    visible: int = 0
    known: bool = True

    @property
    def share(self) -> float | None:
        """Attended over visible; ``None`` where attention could not be followed."""
        return self.attended / self.visible if self.known and self.visible else None


@contextmanager
def watched(model: torch.nn.Module) -> Iterator[Density]:
    """Count within the block; inputs are one row without padding. Enter it inside a recipe's block.

    The output of a head is ``sum_j a_j v_j``: its derivative by an entry of ``v_j`` is ``a_j``, which is not zero where
    position ``j`` is attended to (weights that float32 rounds to zero are no attention). Entries of the values tell the
    query heads of a group apart and, in a prompt, a few evenly spaced queries, so that one backward pass a layer gives
    all of them. Keys that a recipe has dropped count as visible.
    """
    host = Host.of(model)
    attentions = {id(attention) for attention in host.attentions}
    count = Density()

    def attend(call: AttentionCall) -> Attended:
        if id(call.module) not in attentions:
            return call.proceed()
        value = call.value.detach().clone().requires_grad_()
        with torch.enable_grad():
            output, maps = call.proceed(value=value)
        if not output.requires_grad:
            count.known = False
            return output, maps
        queries, heads, width = output.shape[1:]
        groups = heads // value.shape[1]
        picks = torch.linspace(0, queries - 1, max(1, min(queries, width // groups))).long().unique()
        wanted = torch.zeros_like(output)
        for entry, query in enumerate(picks.tolist()):
            for head in range(heads):
                wanted[:, query, head, head % groups * len(picks) + entry] = 1
        weights = torch.autograd.grad(output, value, wanted)[0]
        count.attended += int((weights[..., : groups * len(picks)] != 0).sum())
        count.visible += heads * output.shape[0] * int((picks + call.mask.offset + 1).sum())
        return output.detach(), maps

    with redirected(host.decoder, attend, lazy_mask=True):
        yield count
