"""Attention calls of a running transformers model, sent through code of ours.

The only place of the library that touches transformers' attention and mask interfaces for that.

transformers looks an attention function and a mask function up by the name in a model's configuration. Within
:func:`redirected` that name is ours, so that every call of the model passes through a stack of handlers, the one
entered last first, and what no handler answers reaches the implementation that the model had before. Nothing of a
model or its class is overwritten; leaving the block restores the configuration.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

_NAME = "cenote"
_STACKS: dict[int, _Stack] = {}
"""What calls of a configuration go through, by its ``id``."""

Attended = tuple[Tensor, Tensor | None]
"""What a host wants back: outputs ``(batch, queries, heads, head_dim)`` and, where they exist, the maps."""


class HostMask:
    """Who sees whom, as the host said it, worked out only in the form and for the rows that are asked for.

    A causal mask of 16 thousand tokens has 268 million entries, and a fused kernel needs none of them.

    Attributes:
        ndim: 4, for hosts that ask whether a mask is prepared already.
    """

    ndim = 4

    def __init__(self, arguments: dict[str, Any] | None = None, ready: Tensor | None = None) -> None:
        self._arguments, self._ready = arguments, ready
        self._forms: dict[str, Any] = {}

    @property
    def known(self) -> bool:
        """Whether the host described its mask; not so for a ready-made tensor or for no mask at all."""
        return self._arguments is not None

    @cached_property
    def plain_causal(self) -> bool:
        """Whether it hides later tokens and padding and nothing else."""
        from transformers.masking_utils import causal_mask_function

        return self.known and self._of("mask_function") is causal_mask_function and self._of("kv_offset", 0) == 0

    @property
    def given(self) -> Tensor | None:
        """The mask that the model was called with, ``(batch, keys)``, if any."""
        return self._of("attention_mask")

    @property
    def offset(self) -> int:
        """Place of the first query among the keys."""
        return int(self._of("q_offset", 0)) - int(self._of("kv_offset", 0))

    @cached_property
    def padding(self) -> Bool[Tensor, "batch keys"] | None:
        """Which keys are real, as far as the host's two-dimensional mask goes, or ``None`` where it hides none."""
        from transformers.masking_utils import prepare_padding_mask

        given = self._of("attention_mask")
        if given is None:
            return None
        mask: Any = prepare_padding_mask(given, self._of("kv_length"), self._of("kv_offset", 0))
        keys = self._of("kv_length")
        mask = mask[:, self._of("kv_offset", 0) :][:, :keys].bool()
        return None if bool(mask.all()) else mask

    def rows(self, first: int, last: int) -> Bool[Tensor, "batch 1 rows keys"]:
        """Which keys the queries ``first`` to ``last - 1`` see."""
        if self._ready is not None:
            part = self._ready[:, :, first:last]
            return part if part.dtype == torch.bool else part > torch.finfo(part.dtype).min / 2
        from transformers.masking_utils import sdpa_mask

        arguments = dict(self._arguments or {}, q_length=last - first, q_offset=self._of("q_offset", 0) + first)
        arguments |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        rows: Any = sdpa_mask(**arguments)
        return rows

    def form(self, implementation: str) -> Any:
        """The mask as an implementation of transformers wants it."""
        if self._arguments is None:
            return self._ready
        if implementation not in self._forms:
            from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

            self._forms[implementation] = ALL_MASK_ATTENTION_FUNCTIONS[implementation](**self._arguments)
        return self._forms[implementation]

    def _of(self, name: str, default: Any = None) -> Any:
        return (self._arguments or {}).get(name, default)


@dataclass(frozen=True)
class AttentionCall:
    """One call of a layer's attention.

    Attributes:
        module: the host's attention module.
        query: ``(batch, heads, queries, head_dim)``, behind rotary positions.
        key: ``(batch, kv_heads, keys, head_dim)``, with those of the cache.
        value: as ``key``.
        mask: who sees whom.
        scaling: factor on the logits.
        settings: whatever else the host passed (dropout, softcap, position_ids, ...).
    """

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: HostMask
    scaling: float | None
    settings: dict[str, Any]
    stack: _Stack = field(repr=False)
    depth: int = 0

    @property
    def implementation(self) -> str:
        """What the model ran before any handler."""
        return self.stack.implementation

    def proceed(self, implementation: str | None = None, **changes: Any) -> Attended:
        """What the next handler makes of the call, at last the model's own implementation.

        Args:
            implementation: run this one instead of the model's own at the end.
            **changes: attributes of the call to replace, such as ``query``.
        """
        call = replace(self, **changes) if changes else self
        if call.depth:
            below = replace(call, depth=call.depth - 1)
            return call.stack.handlers[below.depth](below)
        return call.stack.run(call, implementation or call.implementation)


Handler = Callable[[AttentionCall], Attended]


@dataclass
class _Stack:
    before: str | None
    handlers: list[Handler] = field(default_factory=list)
    lazy: int = 0
    mask_forms: list[str] = field(default_factory=list)

    @property
    def implementation(self) -> str:
        return self.before or "eager"

    def run(self, call: AttentionCall, implementation: str) -> Attended:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        eager = getattr(sys.modules[type(call.module).__module__], "eager_attention_forward", None)
        if eager is None and implementation == "eager":
            raise ValueError(f"{type(call.module).__name__} has no eager attention")
        run: Any = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager)  # type: ignore[arg-type]
        settings = dict(call.settings)
        if call.scaling is not None:
            settings["scaling"] = call.scaling
        return run(call.module, call.query, call.key, call.value, call.mask.form(implementation), **settings)


@contextmanager
def redirected(
    model: nn.Module, handler: Handler, *, lazy_mask: bool = False, implementation: str | None = None
) -> Iterator[None]:
    """Within the block, send every attention call of the model to the handler.

    Args:
        model: a transformers model, or a part of one: all configurations of its modules are redirected.
        handler: gets an :class:`AttentionCall`; ``call.proceed()`` passes it on.
        lazy_mask: let the host carry a :class:`HostMask` instead of a tensor. Decoders of language models do.
        implementation: what masks are to be made for while they are tensors, where it is not the model's own.

    Raises:
        ValueError: a model that does not call transformers' attention interface.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    if not getattr(model, "_supports_attention_backend", False):
        raise ValueError(f"{type(model).__name__} does not call transformers' attention interface")
    AttentionInterface.register(_NAME, _attend)
    AttentionMaskInterface.register(_NAME, _mask)
    configs: dict[int, Any] = {
        id(module.config): module.config for module in model.modules() if hasattr(module, "config")
    }
    entered: list[int] = []
    try:
        for number, config in configs.items():
            stack = _STACKS.setdefault(number, _Stack(config._attn_implementation))
            entered.append(number)
            stack.handlers.append(handler)
            stack.lazy += lazy_mask
            stack.mask_forms += [implementation] if implementation else []
            config._attn_implementation_internal = _NAME
        yield
    finally:
        for number in entered:
            stack = _STACKS[number]
            stack.handlers.remove(handler)
            stack.lazy -= lazy_mask
            if implementation:
                stack.mask_forms.remove(implementation)
            if not stack.handlers:
                configs[number]._attn_implementation_internal = _STACKS.pop(number).before


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, *,
    scaling: float | None = None, **settings: Any,
) -> Attended:  # fmt: skip
    stack = _STACKS[id(module.config)]
    mask = attention_mask if isinstance(attention_mask, HostMask) else HostMask(ready=attention_mask)
    call = AttentionCall(module, query, key, value, mask, scaling, settings, stack, len(stack.handlers))
    return call.proceed()


def _mask(*, config: Any = None, **arguments: Any) -> Any:
    stack = _STACKS[id(config)]
    if isinstance(arguments.get("attention_mask"), HostMask):  # prepared by ``generate`` already
        return arguments["attention_mask"]
    if isinstance(arguments.get("q_offset"), Tensor):  # a static cache's own counter, which its first layer advances
        arguments["q_offset"] = arguments["q_offset"].clone()
    mask = HostMask({**arguments, "config": config})
    return mask if stack.lazy else mask.form(stack.mask_forms[-1] if stack.mask_forms else stack.implementation)
