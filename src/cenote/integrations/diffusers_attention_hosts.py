"""What differs between the transformers of diffusers that an attention core goes into.

Text stands beside the visual tokens (behind them in HunyuanVideo, before them in CogVideoX and Flux) or in a
cross-attention of its own (Wan). Every host reads its grid from its own arguments and lets its blocks be reordered at
another place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from cenote.integrations.attention_core import Call
from cenote.integrations.diffusers_projections import (
    Projected,
    Rotary,
    by_head,
    project_out,
    query_key_value,
    rotate,
    rotate_part,
    text_out,
    text_projections,
)
from cenote.ops.space_filling_curve import GridShape


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

    def permute_arguments(self, arguments: dict[str, Any], call: Call) -> None:
        """Reorder what the caller passes by token."""

    def reorder(self, model: Any, now: Callable[[], Call]) -> list[RemovableHandle]:
        """Hooks that reorder tokens before the first block and back after the last, and the rotary tables."""
        blocks = self.blocks(model)

        def before(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            if args:
                return (now().permute(args[0], 1), *args[1:]), kwargs
            return args, kwargs | {"hidden_states": now().permute(kwargs["hidden_states"], 1)}

        def after(block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            if isinstance(output, Tensor):
                return now().restore(output, 1)
            parts = list(output)
            parts[self.hidden_output] = now().restore(parts[self.hidden_output], 1)
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

    def reorder(self, model: Any, now: Callable[[], Call]) -> list[RemovableHandle]:
        def tables(rope: nn.Module, args: Any, output: Rotary) -> Rotary:
            return now().permute(output[0], 1), now().permute(output[1], 1)

        def modulation(embedder: nn.Module, args: Any, output: tuple[Any, ...]) -> tuple[Any, ...]:
            # Wan 2.2 TI2V has a time of its own for every token.
            time, projected, *rest = output
            return time, now().permute(projected, 1) if projected.ndim == 3 else projected, *rest

        ours = [model.rope.register_forward_hook(tables), model.condition_embedder.register_forward_hook(modulation)]
        return [*super().reorder(model, now), *ours]

    def project(self, attn: Any, hidden: Tensor, text: Tensor | None, rotary: Rotary | None) -> Projected:
        query, key, value = query_key_value(attn, hidden)
        query, key = attn.norm_q(query), attn.norm_k(key)  # over all heads together
        query, key, value = (x.unflatten(2, (attn.heads, -1)) for x in (query, key, value))
        return rotate(query, rotary), rotate(key, rotary), value

    def finish(self, attn: Any, out: Tensor, text: Tensor | None) -> Tensor:
        return project_out(attn, out)


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

    def reorder(self, model: Any, now: Callable[[], Call]) -> list[RemovableHandle]:
        def tables(rope: nn.Module, args: Any, output: Rotary) -> Rotary:
            return now().permute(output[0], 0), now().permute(output[1], 0)

        return [*super().reorder(model, now), model.rope.register_forward_hook(tables)]

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
        query, key, value = by_head(attn, query_key_value(attn, hidden))
        query, key = (rotate_part(x, rotary, 0, visual) for x in (query, key))
        if shared or text is None:
            return query, key, value
        added = text_projections(attn, text)
        query, key, value = (torch.cat(pair, dim=1) for pair in zip((query, key, value), added, strict=True))
        return query, key, value

    def finish(self, attn: Any, out: Tensor, text: Tensor | None) -> Any:
        if text is None:
            return out, None
        visual, text = out.split([out.shape[1] - text.shape[1], text.shape[1]], dim=1)
        return project_out(attn, visual), text_out(attn, text)


class CogVideoX(Host):
    processor = "CogVideoXAttnProcessor2_0"
    text_first = True

    def layers(self, model: Any) -> list[Any]:
        return [block.attn1 for block in model.transformer_blocks]

    def read(self, model: Any, arguments: dict[str, Any]) -> tuple[GridShape, int]:
        frames, _, height, width = arguments["hidden_states"].shape[1:]
        patch = (model.config.patch_size_t or 1, model.config.patch_size, model.config.patch_size)
        return _patches((frames, height, width), patch), arguments["encoder_hidden_states"].shape[1]

    def permute_arguments(self, arguments: dict[str, Any], call: Call) -> None:
        rotary = arguments.get("image_rotary_emb")
        if rotary is not None:
            arguments["image_rotary_emb"] = (call.permute(rotary[0], 0), call.permute(rotary[1], 0))

    def project(self, attn: Any, hidden: Tensor, text: Tensor | None, rotary: Rotary | None) -> Projected:
        before = 0 if text is None else text.shape[1]
        joint = hidden if text is None else torch.cat([text, hidden], dim=1)
        query, key, value = by_head(attn, query_key_value(attn, joint))
        query, key = (rotate_part(x, rotary, before, x.shape[1]) for x in (query, key))
        return query, key, value

    def finish(self, attn: Any, out: Tensor, text: Tensor | None) -> Any:
        before = 0 if text is None else text.shape[1]
        text, visual = project_out(attn, out).split([before, out.shape[1] - before], dim=1)
        return visual, text


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

    def reorder(self, model: Any, now: Callable[[], Call]) -> list[RemovableHandle]:
        def tables(pos_embed: nn.Module, args: Any, output: Rotary) -> Rotary:
            call = now()
            return call.permute(output[0], 0, call.text_len), call.permute(output[1], 0, call.text_len)

        return [*super().reorder(model, now), model.pos_embed.register_forward_hook(tables)]

    def project(self, attn: Any, hidden: Tensor, text: Tensor | None, rotary: Rotary | None) -> Projected:
        query, key, value = by_head(attn, query_key_value(attn, hidden))
        if text is not None:
            added = text_projections(attn, text)
            query, key, value = (torch.cat(pair, dim=1) for pair in zip(added, (query, key, value), strict=True))
        return rotate(query, rotary), rotate(key, rotary), value

    def finish(self, attn: Any, out: Tensor, text: Tensor | None) -> Any:
        if text is None:  # a single-stream block has its text in the hidden states
            return out
        text, visual = out.split([text.shape[1], out.shape[1] - text.shape[1]], dim=1)
        return project_out(attn, visual.contiguous()), text_out(attn, text.contiguous())


HOSTS: dict[str, Host] = {
    "WanTransformer3DModel": Wan(),
    "HunyuanVideoTransformer3DModel": HunyuanVideo(),
    "CogVideoXTransformer3DModel": CogVideoX(),
    "FluxTransformer2DModel": Flux(),
}


def _patches(extents: tuple[int, ...], patch: tuple[int, ...]) -> GridShape:
    frames, height, width = (n // p for n, p in zip(extents, patch, strict=True))
    return frames, height, width
