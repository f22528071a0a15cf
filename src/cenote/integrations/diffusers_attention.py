"""An attention core of our own in the video and image transformers of diffusers, put on and taken off."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cenote.integrations.attention_core import Call, Core
from cenote.integrations.diffusers_attention_hosts import HOSTS, Host


@contextmanager
def attention_core(model: nn.Module, core: Core) -> Iterator[None]:
    """Run the self-attention (Wan) or joint attention (the others) of a diffusers transformer through ``core``.

    Tokens and rotary tables are brought into the core's order once, before the first block, and back after the last,
    so that the model's input and output stay as they are. Cross-attention and text refiners are left alone. On
    leaving, also by an exception, the processors that were there are there again and every hook is gone.

    Serves ``WanTransformer3DModel``, ``HunyuanVideoTransformer3DModel``, ``CogVideoXTransformer3DModel`` and
    ``FluxTransformer2DModel``.

    Raises:
        TypeError: another model.
        ValueError: a model with other attention processors than its own, or one that cannot be reordered.
    """
    host = _host(model)
    layers = host.layers(model)
    originals = [layer.processor for layer in layers]
    for layer in originals:
        if type(layer).__name__ != host.processor:
            raise ValueError(f"{type(model).__name__} must use {host.processor}, got {type(layer).__name__}")
        if getattr(layer, "_parallel_config", None) is not None:
            raise ValueError("context parallelism splits the tokens that block-sparse attention needs together")
    run = _Run(host, core)
    with ExitStack() as undo:
        for number, (layer, original) in enumerate(zip(layers, originals, strict=True)):
            undo.callback(layer.set_processor, original)
            layer.set_processor(_Processor(run, number, original))
        hooks = [model.register_forward_pre_hook(run.begin, with_kwargs=True), *host.reorder(model, run.now)]
        for hook in hooks:
            undo.callback(hook.remove)
        yield


class _Run:
    """What the layers of one model share while the core is on it."""

    def __init__(self, host: Host, core: Core) -> None:
        self.host, self.core = host, core
        self.call: Call | None = None
        self.timestep = float("inf")

    def begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        bound = inspect.signature(model.forward).bind(*args, **kwargs)
        shape, text_len = self.host.read(model, bound.arguments)
        order = self.core.order(shape)
        if order is not None:
            self.host.check_reorder(model, bound.arguments)
        # Time falls while denoising goes on, so a rise is the beginning of the next sample.
        timestep = float(torch.as_tensor(bound.arguments["timestep"]).max())
        fresh = self.call is None or timestep > self.timestep
        number = 0 if fresh or self.call is None else self.call.number + 1
        self.timestep = timestep
        self.call = Call(shape, text_len, order, number, self.host.first_frame)
        self.host.permute_arguments(bound.arguments, self.call)
        return (), dict(bound.arguments)

    def now(self) -> Call:
        if self.call is None:
            raise RuntimeError("a block of the transformer ran outside a call of the transformer")
        return self.call


class _Processor:
    """The attention of one layer: the host's projections around the core."""

    def __init__(self, run: _Run, layer: int, original: Any) -> None:
        self.run, self.layer, self.original = run, layer, original

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Any:
        run, call, host = self.run, self.run.now(), self.run.host
        if run.core.dense(self.layer, call):
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        parts = host.project(attn, hidden_states, encoder_hidden_states, image_rotary_emb)
        text_valid = host.text_valid(attention_mask, call.text_len)
        shift = call.text_len if host.text_first else 0  # the core takes the visual tokens first
        query, key, value = (x.roll(-shift, dims=1).transpose(1, 2) if shift else x.transpose(1, 2) for x in parts)
        out = run.core.attend(query, key, value, text_valid, call).transpose(1, 2).flatten(2)
        out = out.roll(shift, dims=1) if shift else out
        return host.finish(attn, out, encoder_hidden_states)


def _host(model: nn.Module) -> Host:
    kind = type(model)
    if kind.__name__ not in HOSTS or not kind.__module__.startswith("diffusers."):
        known = f"{', '.join(sorted(HOSTS))} of diffusers or a VisionTransformer of timm"
        raise TypeError(f"expected one of {known}, got {kind.__name__}")
    return HOSTS[kind.__name__]
