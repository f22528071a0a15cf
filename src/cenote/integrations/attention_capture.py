"""Attention of every layer of a running network, for losses and statistics: as maps, or as queries and keys."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cenote.integrations.attention_interface import Attended, AttentionCall, redirected
from cenote.ops.attention_diversity import QueryKey, attention_diversification_loss, attention_similarity

Keep = Literal["query_key", "maps"]
_BEYOND = ("position_bias", "softcap", "s_aux")
"""What else transformers' attention functions take that changes a map."""


class AttentionCapture:
    """Within the ``with`` block, keeps what the last forward pass attended to, one entry a layer.

    ``with AttentionCapture(model) as seen: loss = task(model(images)) + seen.loss()``. Nothing is detached, so losses
    reach the weights. Leaving the block restores the model bit for bit, also after an exception. It serves

    - transformers models that call the attention interface: queries and keys behind rotary positions and norms, with
      the host's mask, whatever implementation runs;
    - timm's ``Attention`` (ViT, DeiT): queries and keys behind their norms, without a mask passed to it; and whatever
      of timm has a fused form (Swin, EVA): the maps behind attention dropout;
    - modules with one ``qkv`` map and ``num_heads`` (or ``heads``), as in this library, seen without mask and rotary
      positions: queries and keys only.

    Args:
        model: the network.
        keep: ``"query_key"`` leaves fused attention as it is and remembers what maps are made of
            (:class:`~cenote.ops.attention_diversity.QueryKey`), without dropout; ``"maps"`` makes the host go its
            slower, explicit way and keeps the maps ``(batch, heads, tokens, tokens)`` it used.

    Attributes:
        layers: what was kept, in the order of the layers. Each forward pass of the whole model begins anew.

    Raises:
        ValueError: no attention that it knows, maps asked of one that never makes them, or queries and keys of one
            whose maps depend on more.
    """

    def __init__(self, model: nn.Module, keep: Keep = "query_key") -> None:
        if keep not in ("query_key", "maps"):
            raise ValueError(f"keep must be 'query_key' or 'maps', got {keep!r}")
        self.model, self.keep = model, keep
        self.layers: list[Tensor | QueryKey] = []
        self._undo = ExitStack()

    def __enter__(self) -> AttentionCapture:
        with ExitStack() as undo:
            undo.enter_context(_removed(self.model.register_forward_pre_hook(lambda *_: self.layers.clear())))
            listen = _transformers if hasattr(self.model, "get_input_embeddings") else _by_module
            listen(self, undo)
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._undo.close()

    def loss(self, threshold: float = 2.0) -> Float[Tensor, ""]:
        """:func:`~cenote.ops.attention_diversity.attention_diversification_loss` of the last forward pass.

        Raises:
            ValueError: there was none; see also there.
        """
        return attention_diversification_loss(self._seen(), threshold, check_rows=not self.model.training)

    def similarity(self) -> Float[Tensor, ""]:
        """:func:`~cenote.ops.attention_diversity.attention_similarity` of the last forward pass, unthresholded."""
        return attention_similarity(self._seen(), check_rows=not self.model.training)

    def _seen(self) -> list[Tensor | QueryKey]:
        if not self.layers:
            raise ValueError("no attention was seen: run the model inside the with block first")
        return self.layers


class _removed:
    """A hook handle as a context."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle

    def __enter__(self) -> None: ...

    def __exit__(self, *error: Any) -> None:
        self.handle.remove()


def _by_module(capture: AttentionCapture, undo: ExitStack) -> None:
    """Hooks on timm's attention modules, or on ``qkv`` maps."""
    found = 0
    for module in capture.model.modules():
        if hasattr(module, "fused_attn") and isinstance(getattr(module, "attn_drop", None), nn.Module):
            found += 1
            _timm(capture, module, undo)
        elif isinstance(getattr(module, "qkv", None), nn.Linear) and (
            hasattr(module, "num_heads") or hasattr(module, "heads")
        ):
            found += 1
            _projection(capture, module, undo)
    if not found:
        raise ValueError(
            f"no attention that is known in {type(capture.model).__name__}: transformers, timm, or a qkv map with heads"
        )


def _timm(capture: AttentionCapture, module: Any, undo: ExitStack) -> None:
    if capture.keep == "maps":
        undo.callback(setattr, module, "fused_attn", module.fused_attn)
        module.fused_attn = False
        hook = module.attn_drop.register_forward_hook(lambda _, args, output: capture.layers.append(output))
        undo.enter_context(_removed(hook))
        return
    # Other classes rotate queries and keys behind their norms, or add relative positions to the logits.
    if type(module).__name__ != "Attention" or not isinstance(getattr(module, "q_norm", None), nn.Module):
        raise ValueError(f"{type(module).__name__} shows no queries and keys: ask for keep='maps'")
    query: list[Tensor] = []

    def on_key(_: nn.Module, args: Any, key: Tensor) -> None:
        capture.layers.append(QueryKey(query.pop(), key, module.scale))

    undo.enter_context(_removed(module.q_norm.register_forward_hook(lambda _, args, output: query.append(output))))
    undo.enter_context(_removed(module.k_norm.register_forward_hook(on_key)))


def _projection(capture: AttentionCapture, module: Any, undo: ExitStack) -> None:
    kind = type(module).__name__
    if capture.keep == "maps":
        raise ValueError(f"{kind} keeps no maps: ask for keep='query_key'")
    positions = [getattr(module, name, None) for name in ("rope_theta", "att_mask")]
    if any(each is not None for each in positions) or getattr(module, "causal", False):
        raise ValueError(f"the maps of {kind} depend on positions, which its qkv map does not show: take its own maps")
    heads = getattr(module, "num_heads", None) or module.heads

    def on_output(_: nn.Module, args: Any, output: Tensor) -> None:
        query, key, _value = output.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        capture.layers.append(QueryKey(query, key))

    undo.enter_context(_removed(module.qkv.register_forward_hook(on_output)))


def _transformers(capture: AttentionCapture, undo: ExitStack) -> None:
    """A handler in transformers' attention interface that listens and passes on."""

    def listen(call: AttentionCall) -> Attended:
        if capture.keep == "maps":
            output, weights = call.proceed("eager")
            if weights is None:
                raise ValueError(f"{type(call.module).__name__} makes no maps here: ask for keep='query_key'")
            capture.layers.append(weights)
            return output, weights
        bias, groups = _bias(call), call.query.shape[1] // call.key.shape[1]
        capture.layers.append(QueryKey(call.query, call.key.repeat_interleave(groups, 1), call.scaling, bias))
        return call.proceed()

    form = "eager" if capture.keep == "maps" else None
    undo.enter_context(redirected(capture.model, listen, implementation=form))


def _bias(call: AttentionCall) -> Tensor | None:
    """What an attention function of transformers adds to the logits, explicitly or in its kernel."""
    module, query, inner, settings = call.module, call.query, call.implementation, call.settings
    mask = call.mask.form(inner)
    unseen = [name for name in _BEYOND if settings.get(name) is not None]
    if mask is not None and getattr(mask, "ndim", None) != 4:
        unseen.append(f"a mask in the form of {inner}")
    if unseen:
        kind = type(module).__name__
        raise ValueError(f"the maps of {kind} depend on {unseen[0]} beside queries and keys: ask for keep='maps'")
    asked = settings.get("is_causal")
    causal = getattr(module, "is_causal", True) if asked is None else asked
    if mask is None and causal and inner != "eager":  # a fused kernel without mask hides later tokens by itself
        mask = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool, device=query.device).tril()
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
