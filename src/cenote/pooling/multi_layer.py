"""The trainable heads of "Pooling And Attention": latents that read the last layer's tokens, or one vector a layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cenote.ops.masked import masked_mean, widen, zero_padding
from cenote.ops.positions import first_real, last_real
from cenote.pooling.base import Pooling
from cenote.pooling.cross_block import LatentBlock, load_reference, read_reference

LayerVector = Literal["mean", "last", "first"]
_EDGES = {"first": first_real, "last": last_real}
_Head = TypeVar("_Head", bound="_TrainableHead")


def _spread(
    index: Int[Tensor, "batch"], x: Float[Tensor, "batch *layers tokens dim"]
) -> Int[Tensor, "batch *layers 1 dim"]:
    """Token numbers in the shape that gathers them from ``x``."""
    return index.reshape(-1, *(1,) * (x.ndim - 1)).expand(*x.shape[:-2], 1, x.shape[-1])


class _TrainableHead(Pooling):
    """``mean_r(MLP(x) + x)`` with ``x = CrossAttention(latents, s) + latents``; subclasses say what ``s`` is."""

    paper = "multi-layer-pooling"
    query_parameters = ("block.latents",)

    def __init__(
        self, dim: int, num_latents: int, num_heads: int, head_dim: int | None, normalize: bool, ff_mult: int
    ) -> None:
        super().__init__(dim)
        head_dim = max(1, dim // 2) if head_dim is None else head_dim
        self.block = LatentBlock(dim, num_latents, num_heads, head_dim, ff_mult)
        self.normalize = normalize

    def _read(
        self, inputs: Float[Tensor, "batch inputs dim"], mask: Bool[Tensor, "batch inputs"] | None
    ) -> tuple[Float[Tensor, "batch dim"], Float[Tensor, "batch latents inputs"]]:
        read, attention = self.block.latents_read(inputs, mask)
        # The MLP's second matrix is applied to the mean over latents, which is the same and r times cheaper.
        gated = self.block.mlp_gate(read).mean(dim=1)
        vector = self.block.mlp_project(gated) + widen(read).mean(dim=1)
        if self.normalize:
            vector = F.normalize(widen(vector), dim=-1)
        return vector.to(inputs.dtype), attention.mean(dim=1)

    @classmethod
    def _from_reference(
        cls: type[_Head], state_dict: dict[str, Tensor], config: dict[str, Any], extra: dict[str, str]
    ) -> _Head:
        official = {"hidden_size": "dim", "dim_head": "head_dim", "num_latents": "num_latents", "ff_mult": "ff_mult"}
        sizes, state = read_reference(state_dict, config.pop("num_heads", 32), extra)
        if "layer_vectors" in state:
            official["num_layers"] = "num_layers"
            sizes["num_layers"] = state["layer_vectors"].shape[0]
        for key, own in official.items():
            if config.pop(key, None) not in (None, sizes[own]):
                raise ValueError(f"{key} contradicts the weights, which have {own} {sizes[own]}")
        with torch.device("meta"):
            pool = cls(**{"normalize": True, **sizes, **config})
        return load_reference(pool, state)


class LatentPooling(_TrainableHead):
    """Learned latents read the tokens of the last layer by cross-attention, pass an MLP, and are averaged.

    With latents ``Z (r, d)``, ``[K V] = LN(S) Wkv``, ``Q = LN(Z) Wq``:
    ``X = concat_h softmax(Q_h K_h^T / sqrt(e)) V_h Wo + Z``, then ``mean_r(X + MLP(LN(X)))`` with a GEGLU MLP.
    Source: "Pooling And Attention: What Are Effective Designs For LLM-Based Embedding Models?" (arXiv 2409.02727),
    designs 2 (``tokens="last"``, on a causal host) and 4 (``tokens="all"``, on a bidirectional one); there
    ``r = 768, h = 32, e = 2048``, normalised.

    Otherwise than in the official code: padding is masked (``attend_padding=True`` brings the published leak back),
    and the last token is the last real one on either padding side. Exact savings: queries are computed once instead
    of once a sequence, the products behind the softmax are taken in the cheapest order, and the MLP ends after the
    mean. With one token, as in design 2, the softmax is over a single key: the attention is 1, the latents have no
    say in it, and the query projection gets no gradient. ``tokens="all"`` on the causal host is the variant that
    makes sense. Weights are averaged over heads, ``(batch, num_latents, tokens)``.

    Args:
        dim: token width d.
        num_latents: number r of latents.
        num_heads: attention heads h.
        head_dim: width e of one head; ``None`` takes ``dim // 2``, the published proportion.
        normalize: scale the vector to unit length.
        ff_mult: the MLP's hidden width is ``ff_mult * dim``.
        tokens: what the latents read: ``"all"`` real tokens, or only the ``"first"`` or ``"last"`` one.
        attend_padding: let padding take part as keys. The vector then depends on how much padding a batch has.
    """

    name = "latent_pooling"
    attends = True

    def __init__(
        self,
        dim: int,
        num_latents: int = 64,
        num_heads: int = 8,
        head_dim: int | None = None,
        normalize: bool = False,
        ff_mult: int = 4,
        tokens: Literal["all", "first", "last"] = "all",
        attend_padding: bool = False,
    ) -> None:
        super().__init__(dim, num_latents, num_heads, head_dim, normalize, ff_mult)
        if tokens not in ("all", "first", "last"):
            raise ValueError(f"tokens must be 'all', 'first' or 'last', got {tokens!r}")
        self.tokens, self.attend_padding = tokens, attend_padding
        self.permutation_invariant = tokens == "all"  # type: ignore[misc]

    def _pool(self, tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.tokens == "all":
            return self._read(tokens, None) if self.attend_padding else self._read(zero_padding(tokens, mask), mask)
        index = _EDGES[self.tokens](tokens.new_ones(tokens.shape[:2], dtype=torch.bool) if mask is None else mask)
        vector, attention = self._read(tokens.gather(1, _spread(index, tokens)), None)
        weights = attention.new_zeros(*attention.shape[:2], tokens.shape[1])
        return vector, weights.scatter(2, _spread(index, weights.mT).mT, attention)

    @classmethod
    def from_reference(cls, state_dict: dict[str, Tensor], **config: Any) -> LatentPooling:
        """From official keys ``latents``, ``cross_attend_blocks.{0,1}.*``; attends padding and normalises, as
        published.

        ``config`` takes ``num_heads`` (32), the constructor's options, and, checked against the weights, the official
        ``hidden_size``, ``num_latents``, ``dim_head``, ``ff_mult``. ``ValueError`` for anything that does not fit.
        """
        return cls._from_reference(state_dict, {"attend_padding": True, **config}, {})


class MultiLayerPooling(_TrainableHead):
    """One vector a layer, plus a learned vector a layer, read by learned latents.

    ``s_l = reduce_n(h_ln) + w_l`` for every layer l, then as :class:`LatentPooling` over the L vectors ``s_l``.
    Source: "Pooling And Attention: What Are Effective Designs For LLM-Based Embedding Models?" (arXiv 2409.02727),
    designs 3 (``layer_vector="last"``, causal host) and 5 (``"mean"``, bidirectional host); there
    ``r = 768, h = 32, e = 2048``, normalised.

    Otherwise than in the official code: padding is known from the mask, not from token ids, on either side. The
    layers are blocks 1 to L, without the embeddings. A backbone that reduces layer by layer can use
    :meth:`reduce_layer`, or give :meth:`pool_layers` what it reduced; both need memory for ``L`` vectors an item
    instead of ``L`` times its tokens.

    Args:
        dim: token width d.
        num_layers: number L of layers in the stack.
        num_latents: number r of latents.
        num_heads: attention heads h.
        head_dim: width e of one head; ``None`` takes ``dim // 2``, the published proportion.
        normalize: scale the vector to unit length.
        ff_mult: the MLP's hidden width is ``ff_mult * dim``.
        layer_vector: ``"mean"`` of the real tokens, or the ``"last"`` or ``"first"`` real token.
        layer_std: standard deviation of the learned layer vectors at the start. The published 1 drowns hidden states
            of early layers, whose deviation can be 0.02, so that untrained vectors of all inputs look alike; try 0.02
            there.
    """

    name = "multi_layer_pooling"
    layers = "all"

    def __init__(
        self,
        dim: int,
        num_layers: int,
        num_latents: int = 64,
        num_heads: int = 8,
        head_dim: int | None = None,
        normalize: bool = False,
        ff_mult: int = 4,
        layer_vector: LayerVector = "mean",
        layer_std: float = 1.0,
    ) -> None:
        super().__init__(dim, num_latents, num_heads, head_dim, normalize, ff_mult)
        if num_layers < 1:
            raise ValueError(f"num_layers must be at least 1, got {num_layers}")
        if layer_vector not in ("mean", "last", "first"):
            raise ValueError(f"layer_vector must be 'mean', 'last' or 'first', got {layer_vector!r}")
        if layer_std < 0:
            raise ValueError(f"layer_std must not be negative, got {layer_std}")
        self.num_layers, self.layer_vector = num_layers, layer_vector
        self.layer_vectors = nn.Parameter(torch.empty(num_layers, dim).normal_(std=layer_std))
        self.permutation_invariant = layer_vector == "mean"  # type: ignore[misc]

    def check(self, tokens: Tensor, mask: Tensor | None) -> None:
        super().check(tokens, mask)
        if tokens.shape[1] != self.num_layers:
            raise ValueError(
                f"MultiLayerPooling was built for {self.num_layers} layers (blocks 1 to {self.num_layers}, without the "
                f"embeddings), got {tokens.shape[1]}"
            )

    def reduce_layer(
        self, hidden: Float[Tensor, "batch tokens dim"], mask: Bool[Tensor, "batch tokens"] | None
    ) -> Float[Tensor, "batch 1 dim"]:
        """One layer's vector; give this to a backbone as ``reduce`` and pool what comes back as usual."""
        return self._reduce(hidden[:, None], mask)

    def pool_layers(
        self, vectors: Float[Tensor, "batch layers dim"], layer_index: Sequence[int] | None = None
    ) -> Float[Tensor, "batch dim"]:
        """Pool one vector a layer.

        Args:
            vectors: ``(batch, layers, dim)``.
            layer_index: which of the L learned layer vectors belongs to each entry, where layers were pruned or the
                host left early.
        """
        index = range(self.num_layers) if layer_index is None else layer_index
        if vectors.shape[1] != len(index) or not all(0 <= layer < self.num_layers for layer in index):
            raise ValueError(f"expected one vector for each of the layers {list(index)}, got {vectors.shape[1]}")
        learned = self.layer_vectors if layer_index is None else self.layer_vectors[list(layer_index)]
        return self._read(vectors + learned.to(vectors.dtype), None)[0]

    def _pool(self, tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, None]:
        return self.pool_layers(self._reduce(tokens, mask)), None

    def _reduce(
        self, hidden: Float[Tensor, "batch layers tokens dim"], mask: Bool[Tensor, "batch tokens"] | None
    ) -> Float[Tensor, "batch layers dim"]:
        if self.layer_vector == "mean":
            return masked_mean(hidden.transpose(1, 2), mask)
        if mask is None:
            return hidden[:, :, 0 if self.layer_vector == "first" else -1]
        return hidden.gather(2, _spread(_EDGES[self.layer_vector](mask), hidden)).squeeze(2)

    @classmethod
    def from_reference(cls, state_dict: dict[str, Tensor], **config: Any) -> MultiLayerPooling:
        """From official keys ``latents``, ``pos_emb.weight``, ``cross_attend_blocks.{0,1}.*``; normalises, as
        published.

        ``config`` takes ``num_heads`` (32), the constructor's options, and, checked against the weights, the official
        ``hidden_size``, ``num_layers``, ``num_latents``, ``dim_head``, ``ff_mult``. ``ValueError`` for anything that
        does not fit.
        """
        return cls._from_reference(state_dict, dict(config), {"pos_emb.weight": "layer_vectors"})
