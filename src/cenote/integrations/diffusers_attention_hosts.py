"""What differs between the transformers of diffusers that an attention core goes into.

Text stands beside the visual tokens (behind them in HunyuanVideo, before them in CogVideoX and Flux) or in a
cross-attention of its own (Wan). Every host reads its grid from its own arguments and lets its blocks be reordered at
another place.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from cenote.ops.masked import widen
from cenote.ops.space_filling_curve import GridShape

Rotary = tuple[Tensor, Tensor]
Projected = tuple[Tensor, Tensor, Tensor]


class Reordering(Protocol):
    """Brings visual tokens into the order of the layers and back."""

    def permute(self, x: Tensor, dim: int, start: int = 0) -> Tensor: ...

    def restore(self, x: Tensor, dim: int, start: int = 0) -> Tensor: ...


class Host:
    """One transformer class; the defaults are those of joint attention without a mask."""

    processor: str
    text_first = False
    first_frame = False
    hidden_output = 0
    """Which of a block's outputs the visual tokens are."""

    def layers(self, model: Any) -> list[Any]:
        """The attention modules in the order in which they run."""
        return [block.attn for block in self.blocks(model)]

    def blocks(self, model: Any) -> list[nn.Module]:
        return [*model.transformer_blocks, *getattr(model, "single_transformer_blocks", [])]

    def read(self, model: Any, arguments: dict[str, Any]) -> tuple[GridShape, int]:
        """Grid of the visual tokens and number of text tokens that share their attention."""
        raise NotImplementedError

    def check_reorder(self, model: Any, arguments: dict[str, Any]) -> None:
        """Raise ``ValueError`` where the model relies on raster order between its blocks."""

    def permute_arguments(self, arguments: dict[str, Any], run: Reordering) -> None:
        """Reorder what the caller passes by token."""

    def reorder(self, model: Any, run: Reordering) -> list[RemovableHandle]:
        """Hooks that reorder tokens before the first block and back after the last, and the rotary tables."""
        blocks = self.blocks(model)

        def before(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            if args:
                return (run.permute(args[0], 1), *args[1:]), kwargs
            return args, kwargs | {"hidden_states": run.permute(kwargs["hidden_states"], 1)}

        def after(block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            if isinstance(output, Tensor):
                return run.restore(output, 1)
            parts = list(output)
            parts[self.hidden_output] = run.restore(parts[self.hidden_output], 1)
            return tuple(parts)

        first = blocks[0].register_forward_pre_hook(before, with_kwargs=True)
        return [first, blocks[-1].register_forward_hook(after)]

    def text_valid(self, mask: Tensor | None, text_len: int) -> Tensor | None:
        """Real text tokens of every item, from the mask that a block hands to its attention."""
        if mask is not None:
            raise ValueError(f"this attention is bidirectional and takes no mask here, got one of {tuple(mask.shape)}")
        return None

    def project(self, attn: Any, hidden: Tensor, text: Tensor | None, rotary: Rotary | None) -> Projected:
        """Query, key and value ``(batch, tokens, heads, head_dim)`` in the host's order, rotated."""
        raise NotImplementedError

    def finish(self, attn: Any, out: Tensor, text: Tensor | None) -> Any:
        """What the layer returns, from ``(batch, tokens, heads * head_dim)`` in the host's order."""
        raise NotImplementedError


class Wan(Host):
    processor = "WanAttnProcessor"
    first_frame = True

    def blocks(self, model: Any) -> list[nn.Module]:
        return list(model.blocks)

    def layers(self, model: Any) -> list[Any]:
        return [block.attn1 for block in model.blocks]

    def read(self, model: Any, arguments: dict[str, Any]) -> tuple[GridShape, int]:
        return _patches(arguments["hidden_states"].shape[2:], model.config.patch_size), 0

    def reorder(self, model: Any, run: Reordering) -> list[RemovableHandle]:
        def tables(rope: nn.Module, args: Any, output: Rotary) -> Rotary:
            return run.permute(output[0], 1), run.permute(output[1], 1)

        def modulation(embedder: nn.Module, args: Any, output: tuple[Any, ...]) -> tuple[Any, ...]:
            # Wan 2.2 TI2V has a time of its own for every token.
            time, projected, *rest = output
            return time, run.permute(projected, 1) if projected.ndim == 3 else projected, *rest

        ours = [model.rope.register_forward_hook(tables), model.condition_embedder.register_forward_hook(modulation)]
        return [*super().reorder(model, run), *ours]

    def project(self, attn: Any, hidden: Tensor, text: Tensor | None, rotary: Rotary | None) -> Projected:
        query, key, value = _qkv(attn, hidden)
        query, key = attn.norm_q(query), attn.norm_k(key)  # over all heads together
        query, key, value = (x.unflatten(2, (attn.heads, -1)) for x in (query, key, value))
        return rotate(query, rotary), rotate(key, rotary), value

    def finish(self, attn: Any, out: Tensor, text: Tensor | None) -> Tensor:
        return _out(attn, out)


class HunyuanVideo(Host):
    processor = "HunyuanVideoAttnProcessor2_0"

    def read(self, model: Any, arguments: dict[str, Any]) -> tuple[GridShape, int]:
        patch = (model.config.patch_size_t, model.config.patch_size, model.config.patch_size)
        return _patches(arguments["hidden_states"].shape[2:], patch), arguments["encoder_hidden_states"].shape[1]

    def check_reorder(self, model: Any, arguments: dict[str, Any]) -> None:
        if model.config.image_condition_type == "token_replace":
            raise ValueError(
                "HunyuanVideo with image_condition_type='token_replace' modulates its first frame by position: "
                "use order='raster'"
            )

    def reorder(self, model: Any, run: Reordering) -> list[RemovableHandle]:
        def tables(rope: nn.Module, args: Any, output: Rotary) -> Rotary:
            return run.permute(output[0], 0), run.permute(output[1], 0)

        return [*super().reorder(model, run), model.rope.register_forward_hook(tables)]

    def text_valid(self, mask: Tensor | None, text_len: int) -> Tensor | None:
        if mask is None:
            return None
        if mask.dtype != torch.bool or mask.ndim != 4 or mask.shape[1:3] != (1, 1):
            raise ValueError(
                f"expected a boolean key mask (batch, 1, 1, tokens), got {mask.dtype} of {tuple(mask.shape)}"
            )
        return mask[:, 0, 0, mask.shape[-1] - text_len :].sum(-1)

    def project(self, attn: Any, hidden: Tensor, text: Tensor | None, rotary: Rotary | None) -> Projected:
        shared = attn.add_q_proj is None
        visual = hidden.shape[1]
        if shared and text is not None:
            hidden = torch.cat([hidden, text], dim=1)
        query, key, value = _heads(attn, _qkv(attn, hidden))
        query, key = (_rotate_part(x, rotary, 0, visual) for x in (query, key))
        if shared or text is None:
            return query, key, value
        added = _added(attn, text)
        query, key, value = (torch.cat(pair, dim=1) for pair in zip((query, key, value), added, strict=True))
        return query, key, value

    def finish(self, attn: Any, out: Tensor, text: Tensor | None) -> Any:
        if text is None:
            return out, None
        visual, text = out.split([out.shape[1] - text.shape[1], text.shape[1]], dim=1)
        return _out(attn, visual), _added_out(attn, text)


class CogVideoX(Host):
    processor = "CogVideoXAttnProcessor2_0"
    text_first = True

    def layers(self, model: Any) -> list[Any]:
        return [block.attn1 for block in model.transformer_blocks]

    def read(self, model: Any, arguments: dict[str, Any]) -> tuple[GridShape, int]:
        frames, _, height, width = arguments["hidden_states"].shape[1:]
        patch = (model.config.patch_size_t or 1, model.config.patch_size, model.config.patch_size)
        return _patches((frames, height, width), patch), arguments["encoder_hidden_states"].shape[1]

    def permute_arguments(self, arguments: dict[str, Any], run: Reordering) -> None:
        rotary = arguments.get("image_rotary_emb")
        if rotary is not None:
            arguments["image_rotary_emb"] = (run.permute(rotary[0], 0), run.permute(rotary[1], 0))

    def project(self, attn: Any, hidden: Tensor, text: Tensor | None, rotary: Rotary | None) -> Projected:
        before = 0 if text is None else text.shape[1]
        joint = hidden if text is None else torch.cat([text, hidden], dim=1)
        query, key, value = _heads(attn, _qkv(attn, joint))
        query, key = (_rotate_part(x, rotary, before, x.shape[1]) for x in (query, key))
        return query, key, value

    def finish(self, attn: Any, out: Tensor, text: Tensor | None) -> Any:
        before = 0 if text is None else text.shape[1]
        text_out, visual = _out(attn, out).split([before, out.shape[1] - before], dim=1)
        return visual, text_out


class Flux(Host):
    processor = "FluxAttnProcessor"
    text_first = True
    hidden_output = 1

    def read(self, model: Any, arguments: dict[str, Any]) -> tuple[GridShape, int]:
        ids = arguments["img_ids"]
        ids = ids[0] if ids.ndim == 3 else ids
        height, width = (int(n) + 1 for n in ids[:, 1:].amax(0))
        rows, columns = torch.arange(height, device=ids.device), torch.arange(width, device=ids.device)
        raster = torch.cartesian_prod(rows, columns)
        if len(raster) != len(ids) or bool((ids[:, 1:].long() != raster).any()):
            raise ValueError(f"img_ids must be one image in raster order, got {len(ids)} ids for {height} x {width}")
        return (1, height, width), arguments["encoder_hidden_states"].shape[1]

    def check_reorder(self, model: Any, arguments: dict[str, Any]) -> None:
        for name in ("controlnet_block_samples", "controlnet_single_block_samples"):
            if arguments.get(name) is not None:
                raise ValueError(f"{name} come in raster order: use order='raster'")

    def reorder(self, model: Any, run: Reordering) -> list[RemovableHandle]:
        def tables(pos_embed: nn.Module, args: Any, output: Rotary) -> Rotary:
            text_len: int = run.now.text_len  # type: ignore[attr-defined]
            return run.permute(output[0], 0, text_len), run.permute(output[1], 0, text_len)

        return [*super().reorder(model, run), model.pos_embed.register_forward_hook(tables)]

    def project(self, attn: Any, hidden: Tensor, text: Tensor | None, rotary: Rotary | None) -> Projected:
        query, key, value = _heads(attn, _qkv(attn, hidden))
        if text is not None:
            added = _added(attn, text)
            query, key, value = (torch.cat(pair, dim=1) for pair in zip(added, (query, key, value), strict=True))
        return rotate(query, rotary), rotate(key, rotary), value

    def finish(self, attn: Any, out: Tensor, text: Tensor | None) -> Any:
        if text is None:  # a single-stream block has its text in the hidden states
            return out
        text_out, visual = out.split([text.shape[1], out.shape[1] - text.shape[1]], dim=1)
        return _out(attn, visual.contiguous()), _added_out(attn, text_out.contiguous())


HOSTS: dict[str, Host] = {
    "WanTransformer3DModel": Wan(),
    "HunyuanVideoTransformer3DModel": HunyuanVideo(),
    "CogVideoXTransformer3DModel": CogVideoX(),
    "FluxTransformer2DModel": Flux(),
}


def rotate(x: Tensor, rotary: Rotary | None) -> Tensor:
    """Rotate pairs of channels of ``(batch, tokens, heads, head_dim)`` by tables of ``(tokens, head_dim)``."""
    if rotary is None:
        return x
    cos, sin = (table.to(x.device) for table in rotary)
    if cos.ndim == 2:
        cos, sin = cos[None, :, None], sin[None, :, None]
    even, odd = widen(x).unflatten(-1, (-1, 2)).unbind(-1)
    first = even * cos[..., 0::2] - odd * sin[..., 0::2]
    second = odd * cos[..., 1::2] + even * sin[..., 1::2]
    return torch.stack([first, second], dim=-1).flatten(-2).type_as(x)


def _rotate_part(x: Tensor, rotary: Rotary | None, start: int, stop: int) -> Tensor:
    if rotary is None:
        return x
    return torch.cat([x[:, :start], rotate(x[:, start:stop], rotary), x[:, stop:]], dim=1)


def _patches(extents: tuple[int, ...], patch: tuple[int, ...]) -> GridShape:
    frames, height, width = (n // p for n, p in zip(extents, patch, strict=True))
    return frames, height, width


def _qkv(attn: Any, x: Tensor) -> Projected:
    if getattr(attn, "fused_projections", False):
        query, key, value = attn.to_qkv(x).chunk(3, dim=-1)
        return query, key, value
    return attn.to_q(x), attn.to_k(x), attn.to_v(x)


def _heads(attn: Any, parts: Projected) -> Projected:
    """By head, queries and keys normalised inside each."""
    query, key, value = (x.unflatten(2, (attn.heads, -1)) for x in parts)
    query = query if attn.norm_q is None else attn.norm_q(query)
    key = key if attn.norm_k is None else attn.norm_k(key)
    return query, key, value


def _added(attn: Any, text: Tensor) -> Projected:
    """The text's own projections of a dual-stream block."""
    if getattr(attn, "fused_projections", False) and hasattr(attn, "to_added_qkv"):
        parts = attn.to_added_qkv(text).chunk(3, dim=-1)
    else:
        parts = (attn.add_q_proj(text), attn.add_k_proj(text), attn.add_v_proj(text))
    query, key, value = (x.unflatten(2, (attn.heads, -1)) for x in parts)
    query = query if attn.norm_added_q is None else attn.norm_added_q(query)
    key = key if attn.norm_added_k is None else attn.norm_added_k(key)
    return query, key, value


def _out(attn: Any, x: Tensor) -> Tensor:
    """Output projection and dropout; blocks that project later have none."""
    layers = getattr(attn, "to_out", None)
    return x if layers is None else layers[1](layers[0](x))


def _added_out(attn: Any, x: Tensor) -> Tensor:
    layer = getattr(attn, "to_add_out", None)
    return x if layer is None else layer(x)
