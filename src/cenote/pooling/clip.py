"""The attention pooling of CLIP's convolutional image encoders."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cenote.ops.masked import masked_mean, zero_padding
from cenote.ops.query_attention import Read
from cenote.ops.token_grid import Cells, locate
from cenote.pooling.base import Prepared
from cenote.pooling.blocks import rename
from cenote.pooling.cross_attention import CrossAttentionPooling


class ClipPooling(CrossAttentionPooling):
    """The mean token, with a learned position as all tokens, attends to itself and to them.

    ``u = LN(x)``, ``s_0 = mean(u) + p_0``, ``s_n = u_n + p_n``,
    ``out = W_o concat_h sum_n softmax_n(q_h^T k_nh / sqrt(head_dim)) v_nh + b_o`` with ``q = W_q s_0 + b_q`` and keys
    and values of ``s_0 .. s_N``. Source: CLIP (arXiv 2103.00020), in the form that "Attention, Please!" (arXiv
    2506.10178) benchmarks. Parameters: ``4 dim^2 + (height width + 7) dim``. The official layer computes
    self-attention among all tokens and returns its first row; only that row is computed here.

    Token n has position n when there are as many tokens as cells, and a masked token leaves its cell empty; with more
    tokens than cells the real tokens of each item, which must then be as many as the cells, have the positions in
    order. ``query_tokens`` (batch, 1, dim) take the place of ``mean(u)``.

    Args:
        dim: token width.
        grid: rows and columns of the patch grid.
        num_heads: must divide ``embed_dim``.
        embed_dim: width inside the attention, ``dim`` unless given.
        out_features: output width, ``dim`` unless given.
        qkv_bias: bias of query, key and value projections; that of the keys cancels.

    Raises:
        ValueError: the tokens do not fit the grid.
    """

    name = "clip"
    needs_grid = True
    paper = "efficient-probing"
    permutation_invariant = False

    def __init__(
        self,
        dim: int,
        grid: tuple[int, int],
        num_heads: int = 4,
        embed_dim: int | None = None,
        out_features: int | None = None,
        qkv_bias: bool = True,
    ) -> None:
        inner = dim if embed_dim is None else embed_dim
        if num_heads < 1 or inner % num_heads:
            raise ValueError(f"num_heads must divide embed_dim={inner}, got {num_heads}")
        super().__init__(
            dim, num_heads, num_queries=None, bias="qkvo" if qkv_bias else "o", norms=("kv",), eps=1e-6,
            head_dim=inner // num_heads, own_key=True, out_dim=out_features,
        )  # fmt: skip
        self.grid = (int(grid[0]), int(grid[1]))
        self.positions = nn.Parameter(torch.empty(self.grid[0] * self.grid[1] + 1, dim))
        nn.init.trunc_normal_(self.positions, std=dim**-0.5)
        for name, linear in self.named_children():
            if isinstance(linear, nn.Linear) and name != "output_projection":
                nn.init.trunc_normal_(linear.weight, std=dim**-0.5)
                if qkv_bias:
                    nn.init.zeros_(linear.bias)

    def _cells(self, prepared: Prepared) -> Cells:
        return locate(prepared.keys.shape[1], prepared.mask, self.grid)

    def prepare(self, tokens: Tensor, mask: Tensor | None) -> Prepared:
        locate(tokens.shape[1], mask, self.grid)
        normed = self.normalise(zero_padding(tokens, mask), mask)
        return Prepared(normed, normed, mask, masked_mean(normed, mask))

    def source(self, prepared: Prepared) -> Tensor:
        given, norm = self.given(prepared), self.norm("v")
        if prepared.query_tokens is None and norm is not None:
            given = given * norm.weight + norm.bias
        return given + self.positions[0]

    def score_bias(self, folded: Tensor, prepared: Prepared) -> Tensor:
        bias, cells = folded @ self.positions[1:].transpose(0, 1), self._cells(prepared)
        if cells.cell is None:
            return bias
        index = cells.cell[:, None, None].expand(*bias.shape[:-1], -1)
        return nn.functional.pad(bias, (0, 1)).gather(-1, index)

    def values(self, read: Read, prepared: Prepared) -> Tensor:
        weights, cells = read.weights, self._cells(prepared)
        if cells.cell is not None:
            index = cells.cell[:, None].expand_as(weights)
            empty = weights.new_zeros(*weights.shape[:-1], cells.height * cells.width + 1)
            weights = empty.scatter_add(-1, index, weights)[..., :-1]
        positions = weights.to(self.positions.dtype) @ self.positions[1:]
        return super().values(read, prepared) + positions.unflatten(-2, (-1, self.num_heads))

    @classmethod
    def from_reference(cls, state_dict: dict[str, Tensor], **config: Any) -> ClipPooling:
        """From official keys ``norm``, ``pos_embed`` (cells + 1, dim), fused ``qkv`` and ``proj``."""
        state, cells = dict(state_dict), state_dict["pos_embed"].shape[0] - 1
        side = config.pop("feat_size", round(cells**0.5))
        config.setdefault("grid", (side, side) if isinstance(side, int) else tuple(side))
        if "in_features" in config:
            config["dim"] = config.pop("in_features")
        pool = cls(**{"dim": state["pos_embed"].shape[1], **config})
        for kind in ("weight", "bias"):
            if f"qkv.{kind}" in state:
                for letter, part in zip("qkv", state.pop(f"qkv.{kind}").chunk(3), strict=True):
                    state[f"{letter}.{kind}"] = part
        names = {
            "norm": "norms.0", "pos_embed": "positions", "q": "query_projection", "k": "key_projection",
            "v": "value_projection", "proj": "output_projection",
        }  # fmt: skip
        pool.load_state_dict(rename(state, names))
        return pool
