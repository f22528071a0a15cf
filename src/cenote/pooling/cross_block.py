"""One block, two directions: tokens read latents (NV-Embed), or latents read tokens (multi-layer pooling)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from cenote.ops.cross_attention import (
    fold_scores,
    fold_values,
    folding_pays,
    latent_scores,
    latents_read,
    read_latents,
    read_latents_folded,
    value_order,
)
from cenote.ops.masked import widen
from cenote.pooling.constant_cache import ConstantCache

# torch 2.6 cannot tell export from compilation; there both take the path that fits any number of tokens.
_is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)


PoolingT = TypeVar("PoolingT", bound=nn.Module)


class Constants(NamedTuple):
    """What the latents contribute to the attention, whatever the input.

    Attributes:
        asked: the latents' keys (tokens read) or queries (latents read), ``(latents, heads, head_dim)``; folded: the
            score map ``(dim, heads * latents)``.
        answer: where tokens read, the latents' values, or the value map ``(heads * latents, dim)``.
        folded: whether these are maps.
    """

    asked: Tensor
    answer: Tensor | None
    folded: bool


class LatentBlock(nn.Module):
    """Pre-norm cross-attention between tokens and learned latents, then a pre-norm gated MLP, each with a residual.

    Either side may ask: :meth:`tokens_read` or :meth:`latents_read`. ``query`` projects the side that asks,
    ``key_value`` the side that is read (keys first). What depends on the latents alone is computed once a call, and
    in eval mode without a graph once for all calls. Under torch.export the form that suits any number of tokens is
    taken.

    Args:
        dim: width d of tokens and latents.
        num_latents: number r of latents.
        num_heads: number h of heads.
        head_dim: width e of a head; the inner width ``h e`` is not tied to ``dim``.
        ff_mult: the MLP's hidden width is ``ff_mult * dim``.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(self, dim: int, num_latents: int, num_heads: int, head_dim: int, ff_mult: int = 4) -> None:
        super().__init__()
        sizes = {"num_latents": num_latents, "num_heads": num_heads, "head_dim": head_dim, "ff_mult": ff_mult}
        for name, size in sizes.items():
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {size!r}")
        self.num_heads, self.head_dim = num_heads, head_dim
        inner = num_heads * head_dim
        self.latents = nn.Parameter(torch.empty(num_latents, dim).normal_())
        self.token_norm, self.latent_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.query = nn.Linear(dim, inner, bias=False)
        self.key_value = nn.Linear(dim, 2 * inner, bias=False)
        self.out = nn.Linear(inner, dim, bias=False)
        self.mlp_norm = nn.LayerNorm(dim)
        self.mlp_in = nn.Linear(dim, 2 * ff_mult * dim)
        self.mlp_out = nn.Linear(ff_mult * dim, dim)
        self._cache = ConstantCache()

    def train(self, mode: bool = True) -> LatentBlock:
        self._cache.clear()
        return super().train(mode)

    def tokens_read(self, tokens: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        """``concat_h softmax_r(q_h k_h^T / sqrt(e)) v_h Wo + x``: queries from tokens, keys and values from latents."""
        constants = self._constants("dictionary", self._dictionary, tokens.shape[0] * tokens.shape[1])
        scores = self._scores(self.token_norm(tokens), constants, self.query.weight)
        assert constants.answer is not None
        if constants.folded:
            return read_latents_folded(scores, constants.answer) + tokens
        return read_latents(scores, constants.answer, self.out.weight) + tokens

    def latents_read(
        self, tokens: Float[Tensor, "batch tokens dim"], mask: Bool[Tensor, "batch tokens"] | None
    ) -> tuple[Float[Tensor, "batch latents dim"], Float[Tensor, "batch heads latents tokens"]]:
        """``concat_h softmax_n(q_h k_h^T / sqrt(e)) v_h Wo + z``: queries from the latents; also the attention."""
        key_weight, value_weight = self.key_value.weight.chunk(2)
        constants = self._constants("questions", self._questions, tokens.shape[0] * tokens.shape[1])
        normed = self.token_norm(tokens)
        scores = self._scores(normed, constants, key_weight)
        length = None if _is_exporting() else tokens.shape[1]
        order = value_order(length, self.latents.shape[0], self.latents.shape[1], self.head_dim)
        read, attention = latents_read(scores, normed, mask, value_weight, self.out.weight, order)
        return read + self.latents, attention

    def mlp_gate(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens hidden"]:
        """Hidden state of the MLP, ``a * gelu(g)`` with ``[a g] = LN(x) W1 + b1`` and the exact GELU.

        In float32 or better: the product overflows float16.
        """
        a, g = self.mlp_in(self.mlp_norm(x)).chunk(2, dim=-1)
        return widen(a) * F.gelu(widen(g))

    def mlp_project(self, gated: Float[Tensor, "*batch hidden"]) -> Float[Tensor, "*batch dim"]:
        """The MLP's second matrix, ``u W2 + b2``. It is affine, so a mean over tokens may be taken before it."""
        return self.mlp_out(gated.to(self.mlp_out.weight.dtype))

    def _dictionary(self, fold: bool) -> Constants:
        keys, values = self._heads(self.key_value(self.latent_norm(self.latents))).chunk(2, dim=1)
        if fold:
            return Constants(fold_scores(keys, self.query.weight), fold_values(values, self.out.weight), True)
        return Constants(keys, values, False)

    def _questions(self, fold: bool) -> Constants:
        queries = self._heads(self.query(self.latent_norm(self.latents)))
        if fold:
            return Constants(fold_scores(queries, self.key_value.weight.chunk(2)[0]), None, True)
        return Constants(queries, None, False)

    def _constants(self, name: str, make: Callable[[bool], Constants], tokens: int) -> Constants:
        r, d = self.latents.shape
        norm, projections = self.latent_norm, (self.query.weight, self.key_value.weight, self.out.weight)
        parameters = [self.latents, norm.weight, norm.bias, *projections]
        if not self.training and self._cache.allowed(parameters):
            return self._cache.get(name, parameters, lambda: make(folding_pays(d, r, self.head_dim)))
        return make(not _is_exporting() and folding_pays(d, r, self.head_dim, tokens))

    def _scores(self, normed: Tensor, constants: Constants, weight: Tensor) -> Tensor:
        if constants.folded:
            return (normed @ constants.asked).unflatten(-1, (self.num_heads, -1))
        return latent_scores(normed, constants.asked, weight)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))


_REFERENCE_NAMES = {
    "latents": "latents",
    "token_norm": "cross_attend_blocks.0.norm",
    "latent_norm": "cross_attend_blocks.0.norm_context",
    "query": "cross_attend_blocks.0.fn.to_q",
    "key_value": "cross_attend_blocks.0.fn.to_kv",
    "out": "cross_attend_blocks.0.fn.to_out",
    "mlp_norm": "cross_attend_blocks.1.norm",
    "mlp_in": "cross_attend_blocks.1.fn.net.0",
    "mlp_out": "cross_attend_blocks.1.fn.net.2",
}


def reference_names() -> dict[str, str]:
    """Official key of every weight of a published head, and its name in a pooling whose block is called ``block``."""
    names: dict[str, str] = {}
    for own, official in _REFERENCE_NAMES.items():
        biased = own not in ("query", "key_value", "out")
        parts = ("",) if own == "latents" else (".weight", ".bias") if biased else (".weight",)
        names |= {official + part: f"block.{own}{part}" for part in parts}
    return names


def read_reference(
    state_dict: Mapping[str, Tensor], num_heads: int, extra: Mapping[str, str] | None = None
) -> tuple[dict[str, int], dict[str, Tensor]]:
    """Sizes and weights of a published head, for a pooling whose :class:`LatentBlock` is called ``block``.

    Args:
        state_dict: weights in the official key names, the same for NV-Embed and for multi-layer pooling.
        num_heads: number of heads, which no shape tells.
        extra: official names beyond the block's, and the pooling's own.

    Raises:
        ValueError: missing or unexpected keys, or a number of heads that does not divide the inner width.
    """
    names = {**(extra or {}), **reference_names()}
    missing, unexpected = sorted(names.keys() - state_dict.keys()), sorted(state_dict.keys() - names.keys())
    if missing or unexpected:
        raise ValueError(f"not a checkpoint of this head: missing keys {missing}, unexpected keys {unexpected}")
    # Copies, so that training the pooling leaves the caller's tensors alone.
    state = {own: state_dict[official].clone() for official, own in names.items()}
    num_latents, dim = state["block.latents"].shape
    inner, hidden = state["block.query.weight"].shape[0], state["block.mlp_out.weight"].shape[1]
    if num_heads < 1 or inner % num_heads:
        raise ValueError(f"num_heads must divide the inner width {inner}, got {num_heads}")
    sizes = {"dim": dim, "num_latents": num_latents, "head_dim": inner // num_heads, "ff_mult": hidden // dim}
    return {**sizes, "num_heads": num_heads}, state


def load_reference(pooling: PoolingT, state: dict[str, Tensor]) -> PoolingT:
    """Give a pooling built on the meta device its weights; ``ValueError`` if shapes do not fit together."""
    try:
        pooling.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise ValueError(f"the weights do not fit together: {error}") from None
    return pooling
