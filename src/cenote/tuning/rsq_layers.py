"""A decoder one layer at a time: what its model hands a layer, and what is seen inside while the layer runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cenote.integrations.attention_interface import Attended, AttentionCall, redirected
from cenote.ops.token_importance import attention_received


class Call(NamedTuple):
    """What a model calls one of its layers with."""

    hidden: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Seen(NamedTuple):
    """What a layer did.

    Attributes:
        entered: hidden states in front of the layer.
        output: hidden states behind the layer, ``None`` where it was stopped before.
        inputs: of the watched linear layer, ``(batch, tokens, columns)``.
        received: attention received by each token, summed over heads, ``(batch, tokens)``.
    """

    entered: Tensor
    output: Tensor | None
    inputs: Tensor | None
    received: Tensor | None


class _Stop(Exception):
    """Carries what a model gave a layer, or nothing where a layer has shown enough."""

    def __init__(self, call: Call | None = None) -> None:
        super().__init__()
        self.call = call


class _StandIn(nn.Module):
    """In a layer's place: hands on what it gets, or stops the model and keeps it."""

    def __init__(self, layer: nn.Module, stop: bool) -> None:
        super().__init__()
        self.stop = stop
        if hasattr(layer, "attention_type"):  # some hosts ask the layer which mask it wants
            self.attention_type = layer.attention_type

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.stop:
            raise _Stop(Call(hidden_states, args, kwargs))
        return hidden_states


def decoder_layers(model: Any) -> nn.ModuleList:
    """The list of layers of a causal language model.

    Raises:
        ValueError: it has none.
    """
    layers = getattr(getattr(model, "base_model", None), "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        raise ValueError(
            f"{type(model).__name__} has no list of decoder layers: expected Llama, Mistral, Qwen2 or alike"
        )
    return layers


@torch.no_grad()
def layer_call(model: Any, number: int, inputs: Mapping[str, Tensor | None]) -> Call:
    """What the model's own forward pass gives layer ``number``, the layers before it left out.

    Masks, rotary positions and whatever else a host prepares are made anew for every call and never stored: that costs
    an embedding look-up and keeps one batch's masks in memory.

    Args:
        model: a causal language model.
        number: of the layer.
        inputs: ``input_ids`` or ``inputs_embeds``, and ``attention_mask``.
    """
    decoder = model.base_model
    layers = decoder.layers
    decoder.layers = nn.ModuleList(_StandIn(layer, place == number) for place, layer in enumerate(layers))
    try:
        decoder(**inputs, use_cache=False)
    except _Stop as stop:
        if stop.call is not None:
            return stop.call
    finally:
        decoder.layers = layers
    raise RuntimeError(f"{type(decoder).__name__} never called its layer {number}")


@torch.no_grad()
def run_layer(
    model: Any,
    number: int,
    inputs: Mapping[str, Tensor | None],
    hidden: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    watch: str | None = None,
    attention: bool = False,
    output: bool = True,
) -> Seen:
    """Run one layer inside its model's forward pass, up to where everything asked for has been seen.

    Args:
        model: a causal language model.
        number: of the layer.
        inputs: of the model, as for :func:`layer_call`.
        hidden: the layer's input; by default the embeddings.
        mask: real tokens ``(batch, tokens)``.
        watch: name of a linear layer inside whose input is wanted.
        attention: sum up the attention that tokens receive.
        output: run to the end.
    """
    layer = decoder_layers(model)[number]
    seen: dict[str, Tensor] = {}

    def stop_when_enough() -> None:
        if not output and ("inputs" in seen or watch is None) and ("received" in seen or not attention):
            raise _Stop

    def on_input(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen["inputs"] = args[0]
        stop_when_enough()

    def on_attention(call: AttentionCall) -> Attended:
        visible: Callable[[int, int], Tensor] | None = None if call.mask.plain_causal else call.mask.rows
        seen["received"] = attention_received(call.query, call.key, mask, scaling=call.scaling, visible=visible)
        stop_when_enough()
        return call.proceed()

    result = None
    with ExitStack() as undo:
        undo.enter_context(redirected(model, on_attention, lazy_mask=True) if attention else nullcontext())
        call = layer_call(model, number, inputs)
        if watch is not None:
            undo.callback(layer.get_submodule(watch).register_forward_pre_hook(on_input).remove)
        entered = call.hidden if hidden is None else hidden
        with suppress(_Stop):
            result = layer(entered, *call.args, **call.kwargs)
    if isinstance(result, tuple):  # older hosts return more beside it
        result = result[0]
    return Seen(entered, result if output else None, seen.get("inputs"), seen.get("received"))
