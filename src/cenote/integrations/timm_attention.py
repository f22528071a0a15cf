"""An attention core of our own in timm's vision transformers, put on and taken off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from cenote.integrations.attention_core import Call, Core


def is_timm_vit(model: Any) -> bool:
    """Whether this is a ``VisionTransformer`` of timm; timm need not be installed."""
    kinds = {(kind.__module__, kind.__name__) for kind in type(model).__mro__}
    return ("timm.models.vision_transformer", "VisionTransformer") in kinds


@contextmanager
def timm_attention_core(model: Any, core: Core) -> Iterator[None]:
    """Run the attention of a timm ``VisionTransformer`` through ``core``; class and register tokens count as text.

    Patch tokens are brought into the core's order before the first block and back after the last. While the core is
    on, the parameters of a block's attention are found under ``attn.inner``.

    Raises:
        ValueError: blocks with another attention than timm's ``Attention``.
    """
    blocks = list(model.blocks)
    for number, block in enumerate(blocks):
        attn = getattr(block, "attn", None)
        if (type(attn).__module__, type(attn).__name__) != ("timm.layers.attention", "Attention"):
            raise ValueError(f"block {number} must have timm's Attention, got {type(attn).__name__}")
    run = _Run(model, core)
    with ExitStack() as undo:
        for number, block in enumerate(blocks):
            undo.callback(setattr, block, "attn", block.attn)
            block.attn = _Attention(run, number, block.attn)
        hooks = [
            model.patch_embed.register_forward_pre_hook(run.begin),
            blocks[0].register_forward_pre_hook(run.before),
            blocks[-1].register_forward_hook(run.after),
        ]
        for hook in hooks:
            undo.callback(hook.remove)
        yield


class _Run:
    """What the blocks of one model share while the core is on it."""

    def __init__(self, model: Any, core: Core) -> None:
        self.core, self.prefix, self.patches = core, model.num_prefix_tokens, model.patch_embed
        self.call = Call((1, 1, 1), 0, None, -1)

    def begin(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        height, width = self.patches.dynamic_feat_size(tuple(args[0].shape[-2:]))
        shape = (1, height, width)
        self.call = Call(shape, self.prefix, self.core.order(shape), self.call.number + 1)

    def before(self, block: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (self.call.permute(args[0], 1, self.prefix), *args[1:])

    def after(self, block: nn.Module, args: Any, output: Tensor) -> Tensor:
        return self.call.restore(output, 1, self.prefix)


class _Attention(nn.Module):
    """timm's projections around the core."""

    def __init__(self, run: _Run, layer: int, inner: Any) -> None:
        super().__init__()
        self.run, self.layer, self.inner = run, layer, inner
        self.training = inner.training

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        run, inner = self.run, self.inner
        if attn_mask is not None or is_causal:
            raise ValueError("this attention is bidirectional and takes no mask, causal or other")
        if run.core.dense(self.layer, run.call):
            return inner(x)
        if self.training and inner.attn_drop.p:
            raise ValueError("this attention has no dropout: put the model in eval mode")
        qkv = inner.qkv(x).unflatten(-1, (3, inner.num_heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = (part.roll(-run.prefix, dims=2) for part in qkv.unbind(0))
        out = run.core.attend(inner.q_norm(query), inner.k_norm(key), value, None, run.call)
        out = inner.norm(out.roll(run.prefix, dims=2).transpose(1, 2).flatten(2))
        if inner.gate is not None:
            out = out * inner.gate(x).sigmoid()
        return inner.proj_drop(inner.proj(out))
