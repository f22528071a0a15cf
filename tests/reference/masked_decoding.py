"""Decoding with a full cache in which steps see only what a rule leaves: the plain form of sparse decoding."""

from contextlib import contextmanager

import torch

from cenote.integrations.attention_interface import redirected


@contextmanager
def masked_decoding(model, rule, prefill=False):
    """``rule(layer, weights, seen)`` gets the dense weights of the last call and which keys are visible, both
    ``(batch, heads, queries, keys)``, and gives which keys stay; it is asked in prompts too, and heeded there if
    ``prefill``."""

    def attend(call):
        heads = call.query.shape[1]
        key, value = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (call.key, call.value))
        seen = call.mask.rows(0, call.query.shape[2]).expand(-1, heads, -1, -1)
        logits = call.query @ key.transpose(-1, -2) * call.scaling
        kept = rule(call.module.layer_idx, call, logits, seen)
        if call.mask.offset == 0 and not prefill:
            kept = seen
        weights = logits.masked_fill(~(seen & kept), -1e30).softmax(-1)
        return (weights @ value).transpose(1, 2).contiguous(), None

    with torch.no_grad(), redirected(model.model, attend, lazy_mask=True):
        yield
