"""What a model predicts when a text is decoded token by token, as sparse decoding has to be judged."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from cenote.attention.host import cache_argument
from cenote.ops.rotary import real_positions


@torch.no_grad()
def teacher_forced_logits(
    model: Any,
    ids: Int[Tensor, "batch tokens"],
    mask: Bool[Tensor, "batch tokens"] | None = None,
    prompt: int = 1,
    positions: Int[Tensor, "batch tokens"] | None = None,
    cache: Cache | None = None,
) -> Float[Tensor, "batch predictions vocabulary"]:
    """Logits of a pass over the first ``prompt`` columns and of one step for each column behind them.

    There are ``tokens - prompt + 1``: entry ``i`` is what the model says behind column ``prompt - 1 + i``, having been
    given the text's own tokens so far. Entries but the last predict ``ids[:, prompt:]``. Within a recipe's block the
    steps are decoding steps, as those of ``generate``.

    Args:
        model: a causal language model of transformers.
        ids: tokens; rows shorter than others are padded on the left.
        mask: the real ones; all if not given.
        prompt: columns of the first pass.
        positions: of the tokens; counted among the real ones of each row if not given.
        cache: a growing one if not given. What it holds already is not run again: with all of the prompt but its last
            column in it, each column from there on is a step, and :meth:`crop` makes it ready for another recipe.

    Raises:
        ValueError: a prompt outside 1 to ``tokens``, a row without a real token in it, or a cache that holds all of it.
    """
    tokens = ids.shape[1]
    if not 1 <= prompt <= tokens:
        raise ValueError(f"prompt must lie between 1 and {tokens} tokens, got {prompt}")
    mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
    if not bool(mask[:, :prompt].any(dim=1).all()):
        raise ValueError(f"a row has no real token among the first {prompt}: pad on the left, or give a longer prompt")
    ids, mask = ids.to(model.device), mask.to(model.device)
    given = None if bool(mask.all()) else mask.long()
    places = real_positions(mask) if positions is None else positions.to(model.device)
    cache = DynamicCache(config=model.config) if cache is None else cache
    first, held = int(cache.get_seq_length()), cache_argument(cache)
    if first >= prompt:
        raise ValueError(f"the cache holds {first} tokens, so nothing is left of a prompt of {prompt}")
    logits = []
    for last in range(prompt, tokens + 1):
        new = slice(first if last == prompt else last - 1, last)
        output = model(
            input_ids=ids[:, new], attention_mask=None if given is None else given[:, :last],
            position_ids=places[:, new], use_cache=True, logits_to_keep=1, **held,
        )  # fmt: skip
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


def text_nll(
    logits: Float[Tensor, "batch predictions vocabulary"], ids: Int[Tensor, "batch tokens"]
) -> Float[Tensor, "batch predicted"]:
    """Negative log-likelihood in nats of the text's last tokens under :func:`teacher_forced_logits`.

    The exponential of its mean is the perplexity by decoding.
    """
    said = logits[:, :-1].float().log_softmax(dim=-1)
    targets = ids[:, -said.shape[1] :, None].to(said.device)
    return -said.gather(-1, targets).squeeze(-1)
