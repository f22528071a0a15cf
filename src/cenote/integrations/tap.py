"""Token-aware average pooling in front of the attention of a timm or transformers vision network, in place."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from cenote.backbones.hooks import find_blocks
from cenote.mixing.tap import TokenAwarePooling
from cenote.types import Grid

NORMS = ("norm1", "layernorm_before", "norm_before", "layer_norm1")
"""Names under which hosts keep the norm in front of attention: timm and this library, ViT and its kin, CLIP."""
KEY = "dilation_predictor"


class InsertedPooling:
    """A model whose attention reads pooled tokens while its residuals keep the others: ``x + Attn(norm(TAP(x)))``.

    ``InsertedPooling(model, num_scales=4)`` changes the model at once. Each chosen block gets a
    :class:`~cenote.mixing.tap.TokenAwarePooling` under the official name ``dilation_predictor``, so that optimisers,
    ``state_dict`` and saving see it and published TAP keys load; a hook in front of the block's norm applies it. As
    a context, or with :meth:`remove`, it leaves the model as it was, bit for bit. Fused attention stays.

    Args:
        model: from timm or transformers (or this library): its blocks have a norm in front of their attention whose
            output feeds nothing else.
        num_scales: dilations 0 .. ``num_scales - 1``.
        grid: rows and columns of the patches; read from the model where it says so. Maps ``(batch, height, width,
            dim)``, as Swin's blocks take them, need none.
        prefix: tokens in front that are no patches; read from the model where it says so.
        layers: numbers of the blocks; all by default.
        norm: name of the norm in a block, where it is none of :data:`NORMS`.
        seed: of the new weights.
        **pooling: further settings of :class:`~cenote.mixing.tap.TokenAwarePooling`.

    Attributes:
        poolings: the new modules, one a chosen block.

    Raises:
        ValueError: no list of blocks, a block without such a norm or with a pooling already, no grid, a layer that
            there is not.
    """

    def __init__(
        self,
        model: nn.Module,
        num_scales: int = 4,
        *,
        grid: tuple[int, int] | None = None,
        prefix: int | None = None,
        layers: Sequence[int] | None = None,
        norm: str | None = None,
        seed: int = 0,
        **pooling: Any,
    ) -> None:
        blocks = _blocks(model)
        chosen = range(len(blocks)) if layers is None else layers
        wrong = [number for number in chosen if not -len(blocks) <= number < len(blocks)]
        if wrong:
            raise ValueError(f"{type(model).__name__} has {len(blocks)} blocks, there is no block {wrong[0]}")
        self.grid = None if (grid := grid or _grid(model)) is None else Grid(*grid)
        self.prefix = _prefix(model) if prefix is None else prefix
        self.poolings: list[TokenAwarePooling] = []
        with ExitStack() as undo, torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for number in chosen:
                block = blocks[number]
                before = _norm(block, norm)
                if hasattr(block, KEY):
                    raise ValueError(f"block {number} has a pooling already")
                weight = before.weight
                tap = TokenAwarePooling(weight.numel(), num_scales, **pooling).to(weight.device, weight.dtype)
                block.add_module(KEY, tap.train(block.training))
                undo.callback(delattr, block, KEY)
                undo.callback(before.register_forward_pre_hook(self._hook(tap)).remove)
                self.poolings.append(tap)
            self._undo = undo.pop_all()

    def _hook(self, tap: TokenAwarePooling) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            x = args[0]
            if x.ndim == 4:
                return (tap.pool_map(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1), *args[1:])
            if self.grid is None:
                raise ValueError("the model does not say how its patches lie: pass grid=(rows, columns)")
            return (tap(x, self.grid, None, self.prefix), *args[1:])

        return hook

    def remove(self) -> None:
        """Take the poolings out again."""
        self._undo.close()

    def __enter__(self) -> InsertedPooling:
        return self

    def __exit__(self, *error: Any) -> None:
        self.remove()


def _blocks(model: nn.Module) -> list[nn.Module]:
    """Blocks in order; those of a staged network one stage behind the other."""
    owners: list[Any] = [child for child in model.modules() if isinstance(getattr(child, "blocks", None), nn.Module)]
    if len(owners) > 1:
        return [block for owner in owners for block in owner.blocks]
    return list(find_blocks(model))


def _norm(block: nn.Module, name: str | None) -> Any:
    names = NORMS if name is None else (name,)
    for each in names:
        module = getattr(block, each, None)
        if isinstance(module, nn.Module) and isinstance(getattr(module, "weight", None), Tensor):
            return module
    raise ValueError(f"{type(block).__name__} has no norm in front of its attention called {' or '.join(names)}")


def _grid(model: Any) -> tuple[int, int] | None:
    embed: Any = getattr(model, "patch_embed", None)
    if getattr(embed, "grid_size", None) is not None:
        return tuple(embed.grid_size)
    config: Any = getattr(model, "config", None)
    if isinstance(getattr(config, "grid", None), tuple):
        return config.grid
    size, patch = getattr(config, "image_size", None), getattr(config, "patch_size", None)
    if size is None or patch is None:
        return None
    (height, width), (tall, wide) = ((each, each) if isinstance(each, int) else each for each in (size, patch))
    return height // tall, width // wide


def _prefix(model: Any) -> int:
    """Class token and registers, as timm counts them or as the parameters of the embedding show."""
    if hasattr(model, "num_prefix_tokens"):
        return model.num_prefix_tokens
    count = 0
    for name, parameter in model.named_parameters():
        last = name.rpartition(".")[2]
        if last in ("cls_token", "class_token", "distillation_token", "class_embedding"):
            count += 1
        elif last == "register_tokens":
            count += parameter.shape[-2]
    return count
