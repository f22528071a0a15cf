"""Any token mixer in the place of a pretrained network's attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from cenote.mixing.base import Mixer, MixerContext, RecurrentMixer
from cenote.mixing.registry import create_mixer, expand_pattern
from cenote.types import Grid

_NAMES = ("self_attn", "attention", "attn", "self_attention")
"""What hosts call the self-attention of a block; where it holds a module ``self``, that is the attention proper."""
_PREFIX_TOKENS = {"cls_token", "class_embedding", "distillation_token"}
"""What transformers' vision models call the parameters that stand in front of the patches, one token each."""


class HostedMixer(nn.Module):
    """A mixer that is called as the host calls its attention.

    Padding is read from whatever mask the host hands over; a transformers cache carries the state of a recurrent
    mixer. Attention weights are not returned.

    Args:
        mixer: takes the place of the attention.
        layer: the attention's place in a cache.
        shared: the context of all replaced layers.
        pair: whether the host expects ``(output, weights)``.
        causal: whether the host's own attention is causal.
    """

    def __init__(self, mixer: Mixer, layer: int, shared: Replacement, pair: bool, causal: bool) -> None:
        super().__init__()
        self.mixer, self.layer_idx, self.pair, self.is_causal = mixer, layer, pair, causal
        self._shared = [shared]  # in a list, so that the mixers of other layers do not become children

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *positional: Any,
        cache: Any = None,
        past_key_values: Any = None,
        layer_past: Any = None,
        attn_mask: Tensor | None = None,
        mask: Tensor | None = None,
        **others: Any,
    ) -> Any:
        # Hosts and versions of transformers have their own names for these two.
        cache = next((each for each in (cache, past_key_values, layer_past) if each is not None), None)
        mask = next((each for each in (attention_mask, attn_mask, mask) if each is not None), None)
        context = self._shared[0].context_of(hidden_states)
        if cache is None:
            real = None
            if mask is not None:
                from cenote.integrations.mixer_cache import real_tokens

                real = real_tokens(mask, hidden_states.shape[1])
            mixed = self.mixer(hidden_states, real, context)
        else:
            mixed = self._continue(hidden_states, mask, cache, context)
        return (mixed, None) if self.pair else mixed

    def _continue(self, hidden: Tensor, mask: Tensor | None, cache: Any, context: MixerContext) -> Tensor:
        from cenote.integrations.mixer_cache import mixer_layer, real_tokens

        if not isinstance(self.mixer, RecurrentMixer):
            raise ValueError(f"{type(self.mixer).__name__} has no state to keep: call the host with use_cache=False")
        place = mixer_layer(getattr(cache, "self_attention_cache", cache), self.layer_idx)
        mixed, state = self.mixer.chunk(hidden, place.state, real_tokens(mask, hidden.shape[1]), context)
        place.advance(state, hidden.shape[1])
        return mixed


class Replacement(AbstractContextManager["Replacement"]):
    """What :func:`replace_mixer` did: the mixers by layer, the context that they are given, and the way back.

    Attributes:
        mixers: the new mixer of each replaced layer.
        context: what mixers may need; change it between calls for segment ids and the like. Grid and prefix are
            filled in from the host where it tells, embeddings at every call.
    """

    def __init__(self, model: nn.Module, context: MixerContext) -> None:
        self.model, self.context = model, context
        self.mixers: dict[int, Mixer] = {}
        self._before: list[tuple[nn.Module, str, nn.Module]] = []
        self._embeddings: Tensor | None = None
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def context_of(self, hidden: Tensor) -> MixerContext:
        """The context of one call."""
        return self.context if self._embeddings is None else self.context.replace(embeddings=self._embeddings)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the new mixers, for training them alone."""
        for mixer in self.mixers.values():
            yield from mixer.parameters()

    def restore(self) -> None:
        """Put the host's own attention back, the very modules that were there."""
        for parent, name, module in self._before:
            setattr(parent, name, module)
        for hook in self._hooks:
            hook.remove()
        self._before, self._hooks, self.mixers, self._embeddings = [], [], {}, None

    def __exit__(self, *exception: object) -> None:
        self.restore()

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles of the host take along: not the last call's embeddings, which hold its graph."""
        return {**self.__dict__, "_embeddings": None}

    def _keep_embeddings(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._embeddings = args[0] if args else kwargs["hidden_states"]


def replace_mixer(
    model: nn.Module,
    mixer: str | Sequence[str] | Callable[[int, nn.Module], Mixer],
    layers: Sequence[int] | None = None,
    *,
    context: MixerContext | None = None,
    options: Mapping[str, Any] | None = None,
) -> Replacement:
    """Swap the self-attention of chosen blocks for token mixers, in place.

    Works for hosts whose blocks hold one self-attention on ``(batch, tokens, dim)``: Llama, Mistral, Qwen2, Qwen3,
    Gemma, GPT-2, GPT-NeoX and other decoders, BERT- and ViT-type encoders of transformers, vision transformers of timm.
    The new mixers start from fresh weights on the host's device and in its dtype, and see the whole past where the host
    sees a window of it; ``generate`` works where they are recurrent. The result is also a context manager that puts the
    old attention back at its end.

    Args:
        model: the host.
        mixer: a spec or a pattern for :func:`cenote.mixing.expand_pattern` over the replaced layers, or a function
            ``(layer, old_attention) -> Mixer``, for mixers that start from the old weights.
        layers: numbers of the blocks, negative ones from the end; all by default.
        context: what the mixers need and the host does not tell.
        options: for the mixers that take them, such as ``{"num_heads": 4}``. ``causal`` is offered to match the host.

    Raises:
        ValueError: a host without such blocks, a layer that it does not have or that is named twice, a mixer that sees
            later tokens in a causal host, or one that needs something that neither host nor context gives.
    """
    blocks = attention_blocks(model)
    chosen = range(len(blocks)) if layers is None else [n + len(blocks) if n < 0 else n for n in layers]
    wrong = [n for n in chosen if not 0 <= n < len(blocks)]
    if wrong or not len(chosen):
        raise ValueError(f"the host has layers 0 to {len(blocks) - 1}, got {list(layers or [])}")
    if len(set(chosen)) < len(chosen):
        raise ValueError(f"a layer is replaced once, got {list(layers or [])} of {len(blocks)} layers")
    found = context or MixerContext()
    if found.grid is None:
        grid, prefix = host_grid(model)
        found = found.replace(grid=grid, prefix=prefix)
    shared = Replacement(model, found)
    specs = [] if callable(mixer) else expand_pattern(mixer, len(chosen))
    made: list[tuple[int, nn.Module, str, Mixer]] = []
    for place, layer in enumerate(chosen):
        parent, name = blocks[layer][1:]
        old = getattr(parent, name)
        if callable(mixer):
            new = mixer(layer, old)
        else:
            causal = bool(getattr(old, "is_causal", False))
            new = create_mixer(specs[place], dim=_width(old), defaults={"causal": causal, **(options or {})})
        _check(new, old, found)
        made.append((layer, parent, name, new))
    for layer, parent, name, new in made:  # nothing is changed before everything is known to fit
        old = getattr(parent, name)
        like = next(old.parameters(), next(model.parameters()))
        new.to(device=like.device, dtype=like.dtype).train(old.training)
        shared._before.append((parent, name, old))
        shared.mixers[layer] = new
        setattr(parent, name, _hosted(new, old, layer, shared))
    if any("embeddings" in new.needs for new in shared.mixers.values()):
        # A bound method, so that a copy of the host keeps its own embeddings.
        hook = blocks[0][0].register_forward_pre_hook(shared._keep_embeddings, with_kwargs=True)
        shared._hooks.append(hook)
    return shared


def attention_blocks(model: nn.Module) -> list[tuple[nn.Module, nn.Module, str]]:
    """Every block of the host with the module and the attribute that hold its self-attention, in order.

    Raises:
        ValueError: there is none.
    """
    found: list[tuple[nn.Module, nn.Module, str]] = []
    for module in model.modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential):
            continue
        for block in module:
            name = next((name for name in _NAMES if isinstance(getattr(block, name, None), nn.Module)), None)
            if name is None:
                continue
            inner = getattr(block, name)
            nested = isinstance(getattr(inner, "self", None), nn.Module)
            found.append((block, inner, "self") if nested else (block, block, name))
    if not found:
        raise ValueError(f"{type(model).__name__} has no blocks with self-attention ({', '.join(_NAMES)})")
    return found


def host_grid(model: nn.Module) -> tuple[Grid | None, int]:
    """The patch grid of a vision transformer at its own image size and the number of tokens in front of it."""
    patches = getattr(model, "patch_embed", None)
    if hasattr(patches, "grid_size") and patches is not None:
        return Grid(*patches.grid_size), int(getattr(model, "num_prefix_tokens", 0))
    for module in model.modules():
        count, size = getattr(module, "num_patches", None), getattr(module, "image_size", None)
        patch = getattr(module, "patch_size", None)
        if isinstance(count, int) and size is not None and patch is not None:
            height, width = size if isinstance(size, Sequence) else (size, size)
            rows, columns = patch if isinstance(patch, Sequence) else (patch, patch)
            registers = int(getattr(getattr(model, "config", None), "num_register_tokens", 0) or 0)
            single = {name.rpartition(".")[2] for name, _ in model.named_parameters()} & _PREFIX_TOKENS
            return Grid(height // rows, width // columns), len(single) + registers
    return None, 0


def _hosted(new: Mixer, old: nn.Module, layer: int, shared: Replacement) -> HostedMixer:
    """The mixer with the manners of what it replaces, which may be a hosted mixer itself."""
    place = getattr(old, "layer_idx", None)
    pair = old.pair if isinstance(old, HostedMixer) else not type(old).__module__.startswith("timm.")
    causal = bool(getattr(old, "is_causal", False))
    return HostedMixer(new, layer if place is None else place, shared, pair, causal)


def _width(attention: nn.Module) -> int:
    if isinstance(attention, HostedMixer):
        return attention.mixer.dim
    for name in ("q_proj", "query", "qkv", "q", "c_attn", "query_key_value"):
        linear = getattr(attention, name, None)
        if isinstance(linear, nn.Linear):
            return linear.in_features
        if type(linear).__name__ == "Conv1D":  # GPT-2 keeps its linear maps as (in, out)
            return attention.get_parameter(f"{name}.weight").shape[0]
    linear = next((module for module in attention.modules() if isinstance(module, nn.Linear)), None)
    if linear is None:
        raise ValueError(f"cannot tell the width of {type(attention).__name__}: give a function that makes the mixer")
    return linear.in_features


def _check(new: Mixer, old: nn.Module, context: MixerContext) -> None:
    if getattr(old, "is_causal", False) and not new.causal:
        raise ValueError(f"{type(new).__name__} sees later tokens and cannot stand in a causal host")
    missing = [need for need in sorted(new.needs - {"embeddings"}) if getattr(context, need) is None]
    if missing:
        raise ValueError(
            f"{type(new).__name__} needs {', '.join(missing)}, which this host does not tell: pass "
            f"context=MixerContext({missing[0]}=...)"
        )
