"""Cross-attention between many tokens and a fixed set of learned latents, in the order that costs least.

One side of the attention does not depend on the input: the latents ``(r, d)`` and whatever is projected from them. With
``h`` heads of width ``e``, a token's score against a latent is ``x^T W_h^T c_rh``, where ``c_rh`` is the latent's key
(tokens ask) or query (latents ask). Going through the head width costs ``e (d + r)`` per token and head; multiplying
``W_h^T c_rh`` out first costs ``r d``, and nothing of it is left per sequence. The same holds for values and output
projection: ``(a V_h) Wo_h = a (V_h Wo_h)``. :func:`folding_pays` and :func:`value_order` choose by counting
multiplications; every path computes the same function.

Weights are laid out as ``torch.nn.Linear`` keeps them; heads are consecutive rows, in the output projection columns.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cenote.ops.masked import masked_softmax, widen

ValueOrder = Literal["project_first", "out_first", "pool_first"]


def folding_pays(dim: int, latents: int, head_dim: int, tokens: int | None = None) -> bool:
    """Whether multiplying a projection of width ``head_dim`` into the latents saves work.

    Args:
        dim: token width.
        latents: number of latents.
        head_dim: width of a head.
        tokens: how many tokens the result will serve; ``None`` when it is kept, so that making it costs nothing.
    """
    saved_per_token = head_dim * (dim + latents) - latents * dim
    return saved_per_token > 0 if tokens is None else tokens * saved_per_token > latents * dim * head_dim


def fold_scores(
    latents: Float[Tensor, "latents heads head_dim"], weight: Float[Tensor, "inner dim"]
) -> Float[Tensor, "dim heads*latents"]:
    """Score map with columns ``A[:, h r] = W_h^T c_rh / sqrt(e)``, so that all scores of a token are ``x^T A``."""
    heads, head_dim = latents.shape[1:]
    return torch.einsum("rhe,hed->dhr", latents * head_dim**-0.5, weight.unflatten(0, (heads, head_dim))).flatten(1)


def fold_values(
    values: Float[Tensor, "latents heads head_dim"], out_weight: Float[Tensor, "dim inner"]
) -> Float[Tensor, "heads*latents dim"]:
    """Value map with rows ``B[h r] = Wo_h v_rh``, so that what a token reads is ``a B``."""
    heads, head_dim = values.shape[1:]
    return torch.einsum("rhe,dhe->hrd", values, out_weight.unflatten(1, (heads, head_dim))).flatten(0, 1)


def latent_scores(
    tokens: Float[Tensor, "batch tokens dim"],
    latents: Float[Tensor, "latents heads head_dim"],
    weight: Float[Tensor, "inner dim"],
) -> Float[Tensor, "batch tokens heads latents"]:
    """``x^T W_h^T c_rh / sqrt(e)``, through the head width."""
    heads, head_dim = latents.shape[1:]
    projected = (tokens @ weight.T).unflatten(-1, (heads, head_dim))
    return torch.einsum("bnhe,rhe->bnhr", projected, latents * head_dim**-0.5)


def read_latents(
    scores: Float[Tensor, "batch tokens heads latents"],
    values: Float[Tensor, "latents heads head_dim"],
    out_weight: Float[Tensor, "dim inner"],
) -> Float[Tensor, "batch tokens dim"]:
    """Each token reads the latents: ``concat_h(softmax_r(scores_h) V_h) Wo``. Latents are never masked."""
    weights = widen(scores).softmax(dim=-1).to(values.dtype)
    return torch.einsum("bnhr,rhe->bnhe", weights, values).flatten(2) @ out_weight.T


def read_latents_folded(
    scores: Float[Tensor, "batch tokens heads latents"], value_map: Float[Tensor, "heads*latents dim"]
) -> Float[Tensor, "batch tokens dim"]:
    """:func:`read_latents` by the map of :func:`fold_values`: ``sum_h softmax_r(scores_h) B_h``."""
    return widen(scores).softmax(dim=-1).to(value_map.dtype).flatten(2) @ value_map


def value_order(tokens: int | None, latents: int, dim: int, head_dim: int) -> ValueOrder:
    """The cheapest order of the products ``a (x Wv_h) Wo_h`` when ``latents`` latents read ``tokens`` tokens.

    Multiplications per head, with n tokens:

    - ``project_first``, the published order: ``n d e + r n e + r e d``;
    - ``out_first`` projects values to the output before they are summed: ``2 n d e + r n d``, for few tokens;
    - ``pool_first`` sums the tokens themselves: ``r n d + 2 r d e``, for many tokens.

    An unknown number of tokens (``None``) is taken to be the number of latents.
    """
    n, r, d, e = latents if tokens is None else tokens, latents, dim, head_dim
    project_first = n * d * e + r * n * e + r * e * d
    out_first = 2 * n * d * e + r * n * d
    pool_first = r * n * d + 2 * r * d * e
    # Plain comparisons, which torch.compile can guard on when the number of tokens is symbolic.
    if project_first <= out_first and project_first <= pool_first:
        return "project_first"
    return "out_first" if out_first <= pool_first else "pool_first"


def latents_read(
    scores: Float[Tensor, "batch tokens heads latents"],
    tokens: Float[Tensor, "batch tokens dim"],
    mask: Bool[Tensor, "batch tokens"] | None,
    value_weight: Float[Tensor, "inner dim"],
    out_weight: Float[Tensor, "dim inner"],
    order: ValueOrder,
) -> tuple[Float[Tensor, "batch latents dim"], Float[Tensor, "batch heads latents tokens"]]:
    """Each latent reads the tokens: ``concat_h(softmax_n(scores_h) x Wv_h^T) Wo``; also the attention, 0 on padding."""
    heads = scores.shape[2]
    attention = masked_softmax(scores.permute(0, 2, 3, 1), mask)
    weights = attention.to(tokens.dtype)
    if order == "pool_first":
        pooled = torch.einsum("bhrn,bnd->brhd", weights, tokens)
        read = torch.einsum("brhd,hed->brhe", pooled, value_weight.unflatten(0, (heads, -1))).flatten(2)
        return read @ out_weight.T, attention
    values = (tokens @ value_weight.T).unflatten(-1, (heads, -1))
    if order == "project_first":
        read = torch.einsum("bhrn,bnhe->brhe", weights.to(values.dtype), values).flatten(2)
        return read @ out_weight.T, attention
    out_values = torch.einsum("bnhe,dhe->bhnd", values, out_weight.unflatten(1, (heads, -1)))
    return torch.einsum("bhrn,bhnd->brd", weights.to(out_values.dtype), out_values), attention
