"""The compressed keys of SeerAttention-R: one vector for each finished block of a cache, kept beside its keys."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cenote.attention.seer_gate import DecodeGate, Rotary


class CompressedKeys:
    """A layer's finished blocks as its gate sees them, and the keys of the unfinished one; a step state.

    Blocks are counted from a row's first real token. A block that is not finished yet counts as a zero vector.

    Args:
        gate: of the layer.
        completed_position: the position that a block which a single new token finishes is turned to: of its
            ``"first"`` token, as every other block, or of its ``"last"``.

    Attributes:
        tokens: of the cache that are in, padding among them.
        counts: real tokens that are in, ``(batch,)``; ``None`` before any.
        vectors: ``(batch, kv_heads, room, hidden_size)``, zeros behind the finished blocks.
        pending: keys of the unfinished block without rotary positions, ``(batch, kv_heads, block_size, head_dim)``.
        begin: cosines and sines of its first token, ``(batch, 1, width)`` each.
    """

    def __init__(self, gate: DecodeGate, completed_position: str = "first") -> None:
        self.gate, self.completed_position = gate, completed_position
        self.tokens = 0
        self.counts: Tensor | None = None
        self.vectors: Tensor | None = None
        self.pending: Tensor | None = None
        self.begin: Rotary | None = None

    @torch.no_grad()
    def extend(
        self,
        key: Float[Tensor, "batch kv_heads new head_dim"],
        rotary: Rotary | None,
        real: Bool[Tensor, "batch new"] | None = None,
    ) -> None:
        """Take in new tokens.

        Args:
            key: without rotary positions.
            rotary: cosines and sines of the new tokens, ``(batch or 1, new, width)`` each.
            real: which of them are real, all unless given.
        """
        batch, new = key.shape[0], key.shape[2]
        if rotary is not None:
            rotary = rotary[0].expand(batch, -1, -1), rotary[1].expand(batch, -1, -1)
        if self.counts is None:
            self.counts = torch.zeros(batch, dtype=torch.long, device=key.device)
        if new == 1 and self.pending is not None and (real is None or bool(real.all())):
            self._step(key, rotary)
        else:
            self._stretch(key, rotary, real)
        self.tokens += new

    def blocks(self) -> Int[Tensor, "batch"]:
        """How many blocks each row has, the unfinished one among them."""
        assert self.counts is not None
        return (self.counts + self.gate.block_size - 1) // self.gate.block_size

    def keys(self, blocks: int) -> Float[Tensor, "batch kv_heads blocks hidden_size"]:
        """The vectors of the first blocks."""
        assert self.counts is not None
        assert self.pending is not None
        self._make_room(self.pending, blocks)
        assert self.vectors is not None
        return self.vectors[:, :, :blocks]

    def select(self, rows: Tensor) -> None:
        if self.counts is None or self.pending is None:
            return
        self.counts, self.pending = self.counts.index_select(0, rows), self.pending.index_select(0, rows)
        if self.vectors is not None:
            self.vectors = self.vectors.index_select(0, rows)
        if self.begin is not None:
            self.begin = self.begin[0].index_select(0, rows), self.begin[1].index_select(0, rows)

    def crop(self, length: int) -> None:
        """Forget everything: the keys of the block that the cut leaves unfinished are read from the cache again."""
        self.tokens, self.counts, self.vectors, self.pending, self.begin = 0, None, None, None, None

    def _step(self, key: Tensor, rotary: Rotary | None) -> None:
        """One real token a row: a slot is written, and a block compressed where that fills it."""
        assert self.counts is not None
        assert self.pending is not None
        size = self.gate.block_size
        slot = self.counts % size
        self.pending[torch.arange(len(slot), device=slot.device), :, slot] = key[:, :, 0]
        if rotary is not None and self.begin is not None:
            starts = (slot == 0)[:, None, None]
            self.begin = torch.where(starts, rotary[0], self.begin[0]), torch.where(starts, rotary[1], self.begin[1])
        self.counts = self.counts + 1
        rows = (slot == size - 1).nonzero().flatten()
        if len(rows):
            at = rotary if self.completed_position == "last" else self.begin
            at = None if at is None else (at[0][rows], at[1][rows])
            number = self.counts[rows] // size - 1
            self._make_room(key, int(number.max()) + 1)
            assert self.vectors is not None
            self.vectors[rows, :, number] = self.gate.keys(self.pending[rows], at)[:, :, 0]

    def _stretch(self, key: Tensor, rotary: Rotary | None, real: Tensor | None) -> None:
        """Any tokens: those of the unfinished block and the new ones, real ones in front, cut into blocks."""
        assert self.counts is not None
        size, device = self.gate.block_size, key.device
        if real is None:
            real = torch.ones(key.shape[0], key.shape[2], dtype=torch.bool, device=device)
        if self.pending is not None:
            held = torch.arange(size, device=device) < (self.counts % size)[:, None]
            key, real = torch.cat([self.pending, key], dim=2), torch.cat([held, real], dim=1)
            if rotary is not None and self.begin is not None:
                # Of the unfinished block only the first token's position is ever read.
                rotary = tuple(  # type: ignore[assignment]
                    torch.cat([old.expand(-1, size, -1), new], dim=1)
                    for old, new in zip(self.begin, rotary, strict=True)
                )
        total = real.sum(dim=1)
        if not bool(real.all()):
            order = (~real).byte().argsort(dim=1, stable=True)
            key = key.gather(2, order[:, None, :, None].expand_as(key))
            if rotary is not None:
                rotary = tuple(x.gather(1, order.unsqueeze(-1).expand_as(x)) for x in rotary)  # type: ignore[assignment]
        finished, before = total // size, self.counts // size
        most = int(finished.max())
        if most:
            at = None if rotary is None else (rotary[0][:, : most * size : size], rotary[1][:, : most * size : size])
            vectors = self.gate.keys(key[:, :, : most * size], at)
            rows, number = (torch.arange(most, device=device) < finished[:, None]).nonzero(as_tuple=True)
            self._make_room(key, int((before + finished).max()))
            assert self.vectors is not None
            self.vectors[rows, :, before[rows] + number] = vectors[rows, :, number]
        rest = (finished[:, None] * size + torch.arange(size, device=device)).clamp(max=key.shape[2] - 1)
        self.pending = key.gather(2, rest[:, None, :, None].expand(-1, key.shape[1], -1, key.shape[3]))
        if rotary is not None:
            first = rest[:, :1, None].expand(-1, -1, rotary[0].shape[-1])
            self.begin = rotary[0].gather(1, first), rotary[1].gather(1, first)
        self.counts = before * size + total

    def _make_room(self, key: Tensor, blocks: int) -> None:
        held = 0 if self.vectors is None else self.vectors.shape[2]
        if held < blocks:
            room = max(blocks + 16, blocks * 3 // 2)
            more = key.new_zeros(*key.shape[:2], room - held, self.gate.key.weight.shape[-1], dtype=torch.float32)
            self.vectors = more if self.vectors is None else torch.cat([self.vectors, more], dim=2)
