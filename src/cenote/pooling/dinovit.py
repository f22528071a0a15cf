"""A transformer block over the tokens, then their mean."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cenote.ops.masked import masked_mean, zero_padding
from cenote.pooling.base import Pooling
from cenote.pooling.blocks import Block, check_heads, rename


class DINOViT(Pooling):
    """One pre-norm vision-transformer block of DINOv2's kind over all tokens, then the mean.

    ``y = x + Attn(LN(x))``, ``out = mean_n(y_n + MLP(LN(y_n)))``. Source: the block of DINOv2 (arXiv 2304.07193), in
    the form that "Attention, Please!" (arXiv 2506.10178) benchmarks. Parameters of the defaults:
    ``12 dim^2 + 10 dim``. The second layer of the MLP is linear, so it is applied after the mean, once an item
    instead of once a token.

    Args:
        dim: token width.
        num_heads: must divide ``dim``.
        mlp_ratio: hidden width of the MLP over ``dim``.
        qkv_bias: bias of query, key and value projections.
    """

    name = "dinovit"
    paper = "efficient-probing"

    def __init__(self, dim: int, num_heads: int = 8, mlp_ratio: float = 4.0, qkv_bias: bool = False) -> None:
        check_heads(dim, num_heads)
        super().__init__(dim)
        self.block = Block(dim, num_heads, mlp_ratio, qkv_bias)

    def _pool(self, tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, None]:
        tokens = self.block.attend(zero_padding(tokens, mask), mask)
        hidden = self.block.mlp.hidden(self.block.norm2(tokens))
        return masked_mean(tokens, mask) + self.block.mlp.fc2(masked_mean(hidden, mask)), None

    @classmethod
    def from_reference(cls, state_dict: dict[str, Tensor], **config: Any) -> DINOViT:
        """From official keys ``dino_block`` (``norm1``, ``attn``, ``norm2``, ``mlp``)."""
        if "d_model" in config:
            config["dim"] = config.pop("d_model")
        pool = cls(**{"dim": state_dict["dino_block.norm1.weight"].shape[0], **config})
        pool.load_state_dict(rename(state_dict, {"dino_block": "block"}))
        return pool
