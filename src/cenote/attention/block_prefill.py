"""Prompts that attend to chosen pairs of blocks: what every recipe of that kind shares beside how it chooses."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from jaxtyping import Float
from torch import Tensor

from cenote.attention.base import LayerCall, Recipe, Session, refuse_unserved
from cenote.attention.host import Host
from cenote.ops.block_gate import check_sparsity, choose_blocks
from cenote.ops.block_sparse import block_sparse_attention
from cenote.ops.blocks import causal_blocks
from cenote.ops.rotary import unrotate


@dataclass(frozen=True)
class Prompt:
    """Prompts of one length without padding, in one layer.

    Shapes: ``query`` (batch, heads, tokens, head_dim), ``key`` and ``value`` (batch, kv_heads, tokens, head_dim),
    positions rotated in; ``rotary`` cosines and sines (batch, tokens, width), if the host has them.
    """

    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    rotary: tuple[Tensor, Tensor] | None
    scale: float

    @cached_property
    def unrotated(self) -> tuple[Tensor, Tensor]:
        """Queries and keys as they were before rotary positions.

        The rotation is turned back instead of reading the projections' outputs with hooks, so that hosts with fused
        projections or norms behind them need no care of their own. Rounded to the model's type, it gives bfloat16
        queries and keys back to the last bit for all but a few entries.
        """
        if self.rotary is None:
            return self.query, self.key
        cos, sin = (part.unsqueeze(1) for part in self.rotary)
        return unrotate(self.query, cos, sin), unrotate(self.key, cos, sin)


Scorer = Callable[[Prompt], Float[Tensor, "batch heads blocks blocks"]]
"""Logits of every pair of blocks; what lies behind the diagonal is ignored."""


def prompts(call: LayerCall) -> Iterator[tuple[tuple[Any, ...], Prompt]]:
    """The batch as prompts without padding, and where in ``(batch, tokens)`` each belongs.

    Without padding it is one; otherwise each row is cut down to its real tokens, so that its blocks begin at its first
    real token and padding changes nothing.

    Raises:
        ValueError: a row without a real token.
    """
    batch, tokens = call.query.shape[0], call.queries
    rotary = call.inputs.rotary
    if rotary is not None:
        rotary = (rotary[0].expand(batch, -1, -1), rotary[1].expand(batch, -1, -1))
    tensors = (call.query, call.key[:, :, :tokens], call.value[:, :, :tokens])
    if not call.padded:
        yield (slice(None), slice(None)), Prompt(call.layer, *tensors, rotary, call.scale)
        return
    for row in range(batch):
        index = call.real[row, :tokens].nonzero().flatten()
        if not len(index):
            raise ValueError(f"row {row} of the batch holds no real token")
        query, key, value = (x[row : row + 1].index_select(2, index) for x in tensors)
        at = None if rotary is None else (rotary[0][row : row + 1, index], rotary[1][row : row + 1, index])
        yield (row, index), Prompt(call.layer, query, key, value, at, call.scale)


class BlockPrefillSession(Session):
    """Prompts attend to chosen blocks; steps of decoding, and new tokens behind cached ones, are dense."""

    def __init__(self, host: Host, layers: Iterable[int], recipe: BlockPrefill, score: Scorer) -> None:
        super().__init__(host, layers)
        self.recipe, self.score = recipe, score
        self._pairs: dict[int, tuple[int, int]] = {}

    def attend(self, call: LayerCall) -> Float[Tensor, "batch heads queries head_dim"]:
        if not call.prompt:
            return call.dense()
        recipe = self.recipe
        output = call.query.new_zeros(*call.query.shape[:3], call.value.shape[-1])
        for (rows, tokens), prompt in prompts(call):
            chosen = choose_blocks(
                self.score(prompt), nz_ratio=recipe.nz_ratio, threshold=recipe.threshold,
                last_block_dense=recipe.last_block_dense,
            )  # fmt: skip
            self._count(call.layer, chosen)
            part = block_sparse_attention(
                prompt.query, prompt.key, prompt.value, chosen, recipe.block_size, scale=prompt.scale,
                backend=recipe.backend,
            )  # fmt: skip
            if isinstance(rows, slice):
                return part
            output[rows, :, tokens] = part[0]
        return output

    def densities(self) -> dict[int, float]:
        """Share of the causal pairs of blocks that each layer attended to, over all prompts so far."""
        return {layer: kept / possible for layer, (kept, possible) in sorted(self._pairs.items())}

    def density(self) -> float:
        """The same over all layers of the model; those that stay dense count as such. 1 before any prompt."""
        shares = self.densities()
        every = [shares.get(layer, 1.0) for layer in range(self.host.num_layers)]
        return sum(every) / len(every)

    def _count(self, layer: int, chosen: Tensor) -> None:
        kept, possible = self._pairs.get(layer, (0, 0))
        batch, heads, blocks, _ = chosen.shape
        seen = int(causal_blocks(blocks, blocks).sum())
        self._pairs[layer] = kept + int(chosen.sum()), possible + batch * heads * seen


@dataclass(frozen=True)
class BlockPrefill(Recipe):
    """Settings of a method that lets prompts attend to chosen pairs of blocks. Decoding stays dense.

    Args:
        block_size: tokens of a block.
        nz_ratio: share of the causal triangle that stays, by the same number of best blocks in every row.
        threshold: keep the blocks whose softmax over their row is above it instead; 0 keeps all.
        last_block_dense: the last two blocks of queries attend to everything.
        dense_layers: layers left alone, such as those with sliding windows.
        backend: of :func:`~cenote.ops.block_sparse.block_sparse_attention`.

    Raises:
        ValueError: settings out of range.
    """

    block_size: int = 64
    nz_ratio: float = 0.2
    threshold: float | None = None
    last_block_dense: bool = True
    dense_layers: tuple[int, ...] = ()
    backend: str = "auto"

    def __post_init__(self) -> None:
        object.__setattr__(self, "dense_layers", tuple(self.dense_layers))
        if self.block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {self.block_size}")
        check_sparsity(self.nz_ratio, self.threshold)
        if self.backend not in ("auto", "torch", "flex"):
            raise ValueError(f"backend must be 'auto', 'torch' or 'flex', got {self.backend!r}")

    def start(self, host: Host) -> BlockPrefillSession:
        layers = self.sparse_layers(host)
        return BlockPrefillSession(host, layers, self, self.scorer(host, layers))

    def sparse_layers(self, host: Host) -> list[int]:
        """The layers that the recipe changes.

        Raises:
            ValueError: layers that the model lacks, or that the recipe cannot serve.
        """
        wrong = [layer for layer in self.dense_layers if not 0 <= layer < host.num_layers]
        if wrong:
            raise ValueError(f"dense_layers {wrong} are no layers of a model of {host.num_layers}")
        layers = [layer for layer in range(host.num_layers) if layer not in self.dense_layers]
        refuse_unserved(self.name, host, layers, "name them in dense_layers")
        return layers

    @abstractmethod
    def scorer(self, host: Host, layers: list[int]) -> Scorer:
        """What gives pairs of blocks their logits."""
