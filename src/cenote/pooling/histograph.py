"""HistoGraph: every layer's activations of a graph network, weighed by what its last layer asks for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from cenote.ops.layer_history import layer_positions, layer_scores, mix_layers, signed_weights
from cenote.ops.masked import masked_mean, widen, zero_padding
from cenote.ops.ragged import bucket_sets, check_index, mean_sets
from cenote.ops.self_attention import masked_self_attention
from cenote.pooling.base import Pooling
from cenote.pooling.blocks import check_heads


class HistoryRead(NamedTuple):
    """All that :class:`HistoGraph` computes. Leading axes: ``(batch, tokens)`` for padded graphs, ``(nodes,)`` for
    graphs laid end to end, ``(batch,)`` for what there is one of a graph.

    Attributes:
        graph: the vector of each graph, ``G``; 0 for an empty graph.
        nodes: node states behind the attention, ``Z``; 0 on padding.
        mixed: node states of all layers together, ``H``.
        layer_scores: ``c``, one a graph and layer (one a node and layer, or one row, as ``weights`` says).
        layer_weights: ``alpha``, shaped alike. They sum to 1 but may be negative and large: no distribution.
        floored: where the layers' scores had cancelled and the floor under their sum acted.
    """

    graph: Tensor
    nodes: Tensor
    mixed: Tensor
    layer_scores: Tensor
    layer_weights: Tensor
    floored: Tensor


class _Embedded(NamedTuple):
    """A history and what is still to be applied to it: layer l stands for ``weight states_l + offset_l``."""

    states: Tensor
    weight: Tensor | None
    offset: Tensor

    def fold(self, queries: Tensor) -> Tensor:
        """Queries as they meet ``states``."""
        return queries if self.weight is None else queries @ self.weight

    def embed(self, x: Tensor) -> Tensor:
        """The linear part on a state or a sum of states."""
        return x if self.weight is None else F.linear(x, self.weight)


class HistoGraph(Pooling):
    """The last layer asks, every layer answers; then nodes attend to each other and are averaged.

    With ``x~_{v,l} = W_e x_{v,l} + b_e + P_l`` for node v in layer l of L (``P`` fixed sine vectors, l from 0):
    ``c_l = mean_v (W_q x~_{v,L-1}) . (W_k x~_{v,l}) / sqrt(D)``, ``alpha_l = c_l / sum_l' c_l'``,
    ``h_v = sum_l alpha_l x~_{v,l}``, ``Z = MultiHeadAttention(H, H, H)``, ``G = mean_v z_v``.
    Source: "Learning from Historical Activations in Graph Neural Networks" (arXiv 2601.01123), HistoGraph. No code of
    the authors could be had; biases, initialisation and number of heads are inferred.

    The weights ``alpha`` are signed: they can subtract one layer from another, which no softmax can, and can become
    large where the scores nearly cancel (:attr:`HistoryRead.floored` says where they had cancelled altogether). They
    are the same for scores multiplied by any constant, so neither the scale nor the sign of ``W_q`` matters, and
    weight decay on it only changes its effective learning rate.

    Otherwise than in the paper the scores are averaged over the nodes of each graph, not of the whole batch, so that
    a graph's vector does not depend on its batch mates (``weights="batch"`` brings the paper's form back). Exact
    savings: the projections are moved behind the sums over layers, ``q . (W_k x~) = (W_k^T q) . x~`` and
    ``sum_l alpha_l W_e x_l = W_e sum_l alpha_l x_l``, so that a layer costs two products of ``nodes x dim`` numbers
    instead of two projections; and the mean over nodes is taken before the attention's output projection where
    nothing stands between. All of it runs in float32 or better, under autocast too.

    Args:
        dim: width of the hidden states (of the last layer where ``widths`` differ).
        num_layers: length of the layer axis; ``None`` takes any.
        hidden_dim: width D; ``None`` takes ``dim``. Also ``out_dim``.
        num_heads: heads of the node attention; must divide ``hidden_dim``.
        widths: width of each layer, where every layer is to have a projection of its own. The history may then be
            a list of ``(batch, tokens, width)``.
        normalisation: ``"signed"``, or ``"softmax"`` over layers.
        weights: one set of layer weights a ``"graph"``, a ``"node"`` (``alpha_v`` from the node's own scores), or for
            the whole ``"batch"``.
        positions: add the layer's position vector.
        bias: give the projection of the history a bias.
        residual: ``Z = H + MultiHeadAttention(H, H, H)``.
        layer_norm: LayerNorm on ``Z``.
        eps: the sum of the scores is kept this times their mean magnitude away from zero.
    """

    name = "histograph"
    layers = "all"
    reads_embeddings = True
    modalities = ("graph",)
    paper = "histograph"

    def __init__(
        self,
        dim: int,
        num_layers: int | None = None,
        hidden_dim: int | None = None,
        num_heads: int = 4,
        widths: Sequence[int] | None = None,
        normalisation: str = "signed",
        weights: str = "graph",
        positions: bool = True,
        bias: bool = True,
        residual: bool = False,
        layer_norm: bool = False,
        eps: float = 1e-6,
    ) -> None:
        super().__init__(dim, dim if hidden_dim is None else hidden_dim)
        check_heads(self.out_dim, num_heads)
        if normalisation not in ("signed", "softmax"):
            raise ValueError(f"normalisation must be 'signed' or 'softmax', got {normalisation!r}")
        if weights not in ("graph", "node", "batch"):
            raise ValueError(f"weights must be 'graph', 'node' or 'batch', got {weights!r}")
        if num_layers is not None and num_layers < 1:
            raise ValueError(f"num_layers must be at least 1, got {num_layers}")
        if not eps > 0:
            raise ValueError(f"eps must be positive, got {eps}")
        self.num_layers, self.normalisation, self.weights = num_layers, normalisation, weights
        self.positions, self.residual, self.eps = positions, residual, eps
        self.widths = None if widths is None else tuple(widths)
        if self.widths is None:
            self.emb_hist: nn.Module = nn.Linear(dim, self.out_dim, bias=bias)
        else:
            if num_layers not in (None, len(self.widths)) or self.widths[-1:] != (dim,):
                raise ValueError(
                    f"widths must name {num_layers or 'all'} layers, the last of width {dim}, got {self.widths}"
                )
            self.num_layers = len(self.widths)
            self.emb_hist = nn.ModuleList(nn.Linear(width, self.out_dim, bias=bias) for width in self.widths)
        self.w_q = nn.Linear(self.out_dim, self.out_dim, bias=False)
        self.w_k = nn.Linear(self.out_dim, self.out_dim, bias=False)
        # Holds the parameters under torch's names; its own forward leaves the fused paths of vmap and export.
        self.node_attn = nn.MultiheadAttention(self.out_dim, num_heads)
        self.norm = nn.LayerNorm(self.out_dim) if layer_norm else None

    def forward(
        self, tokens: Tensor | Sequence[Tensor], mask: Tensor | None = None, return_weights: bool = False
    ) -> Any:
        """As :meth:`Pooling.forward`; with ``widths`` the history may be a list of ``(batch, tokens, width)``."""
        self.check(tokens, mask)
        if return_weights:
            raise ValueError("HistoGraph does not attend to tokens with one query: read() gives its layer weights")
        vector = self._pool(tokens, mask)[0]
        _check_result(vector)
        return vector

    def check(self, tokens: Tensor | Sequence[Tensor], mask: Tensor | None) -> None:
        """Raise ``ValueError`` or ``TypeError`` for a history that is not what was built for, or is not finite."""
        self._check(tokens, mask, None)

    def _check(self, tokens: Tensor | Sequence[Tensor], mask: Tensor | None, batch: Tensor | None) -> None:
        """As :meth:`check`; ``batch`` says which graphs the nodes of the only row are of."""
        if not isinstance(tokens, Tensor):
            self._check_list(tokens)
        last = tokens if isinstance(tokens, Tensor) else tokens[-1][:, None]
        super().check(last, mask)
        layers = last.shape[1] if isinstance(tokens, Tensor) else len(tokens)
        if layers < 1 or self.num_layers not in (None, layers):
            wanted = "some" if self.num_layers is None else self.num_layers
            raise ValueError(f"HistoGraph was built for a history of {wanted} layers, got {layers}")
        if torch.compiler.is_compiling():
            return
        for layer, states in enumerate(tokens.unbind(1) if isinstance(tokens, Tensor) else tokens):
            bad = ~states.isfinite().all(dim=-1)
            bad = bad if mask is None else bad & mask
            if bool(bad.any()):
                graph, node = bad.nonzero()[0].tolist()
                if batch is not None:
                    graph, node = int(batch[node]), int((batch[:node] == batch[node]).sum())
                raise ValueError(f"the history is not finite in layer {layer}, graph {graph}, node {node}")

    def _check_list(self, tokens: Sequence[Tensor]) -> None:
        shapes = [tuple(states.shape) for states in tokens]
        if not shapes or any(len(shape) != 3 for shape in shapes):
            raise ValueError(f"HistoGraph expects a list of (batch, tokens, width), got shapes {shapes}")
        if len({shape[:2] for shape in shapes}) > 1:
            raise ValueError(f"all layers must hold the same nodes, got shapes {shapes}")
        wanted = [self.dim] * len(shapes) if self.widths is None else list(self.widths)
        if [shape[2] for shape in shapes] != wanted:
            hint = "; widths=(...) gives every layer a projection of its own" if self.widths is None else ""
            raise ValueError(f"expected layers of widths {wanted}, got {[shape[2] for shape in shapes]}{hint}")
        if not all(states.is_floating_point() for states in tokens):
            raise TypeError(f"HistoGraph expects floating-point layers, got {[str(s.dtype) for s in tokens]}")

    def read(self, tokens: Tensor | Sequence[Tensor], mask: Tensor | None = None) -> HistoryRead:
        """Everything about padded graphs, ``(batch, layers, tokens, dim)``; see :class:`HistoryRead`."""
        self.check(tokens, mask)
        read = self._full_precision(self._read, tokens, mask)
        _check_result(read.graph)
        return read

    def nodes(self, tokens: Tensor | Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
        """Node states ``Z``, ``(batch, tokens, out_dim)``, for tasks on nodes and edges; 0 on padding."""
        return self.read(tokens, mask).nodes

    def read_graphs(
        self,
        history: Float[Tensor, "nodes layers dim"] | Sequence[Float[Tensor, "nodes _"]],
        batch: Tensor,
        size: int | None = None,
    ) -> HistoryRead:
        """Everything about graphs laid end to end.

        Nothing is padded but the node attention, and that in groups of graphs of similar size.

        Args:
            history: states of all layers, or a list of ``(nodes, width)``, one a layer.
            batch: graph of each node, in any order.
            size: number of graphs; needed where some are empty, whose vector and scores are 0.

        Raises:
            TypeError, ValueError: what :meth:`check` refuses, a batch index that does not fit, graphs without nodes
                where no ``size`` says how many there are.
        """
        dense: Any  # one padded graph, for a moment
        if isinstance(history, Tensor):
            dense, count = history.transpose(0, 1).unsqueeze(0), len(history)
        else:
            dense = [states.unsqueeze(0) for states in history]
            count = len(history[0]) if len(history) else 0
        size = check_index(batch, count, size)
        if count:
            self._check(dense, None, batch)
        elif not isinstance(history, Tensor):
            self._check_list(dense)
        read = self._full_precision(self._read_graphs, dense, batch.long(), size)
        _check_result(read.graph)
        return read

    def _pool(self, tokens: Tensor | Sequence[Tensor], mask: Tensor | None) -> tuple[Tensor, None]:
        return self._full_precision(self._vector, tokens, mask), None

    def _vector(self, tokens: Tensor | Sequence[Tensor], mask: Tensor | None) -> Tensor:
        dtype = _dtype(tokens)
        mixed, *_ = self._mix(*self._dense(tokens, mask))
        if self.norm is not None:
            return masked_mean(self._finish(self._attend(mixed, mask), mixed), mask).to(dtype)
        pooled = self._project(masked_mean(self._attend(mixed, mask), mask))
        return (pooled + masked_mean(mixed, mask) if self.residual else pooled).to(dtype)

    def _read(self, tokens: Tensor | Sequence[Tensor], mask: Tensor | None) -> HistoryRead:
        dtype = _dtype(tokens)
        mixed, scores, weights, floored = self._mix(*self._dense(tokens, mask))
        nodes = self._finish(self._attend(mixed, mask), mixed)
        graph, kept = masked_mean(nodes, mask), zero_padding(nodes, mask)
        return HistoryRead(graph.to(dtype), kept.to(dtype), zero_padding(mixed, mask), scores, weights, floored)

    def _read_graphs(self, dense: Any, batch: Tensor, size: int) -> HistoryRead:
        dtype = _dtype(dense)
        history = self._embed(dense)
        history = history._replace(states=history.states[0])  # the one row of the batch axis holds all graphs
        owner, sets = (torch.zeros_like(batch), 1) if self.weights == "batch" else (batch, size)
        mixed, scores, weights, floored = self._mix(history, lambda c: mean_sets(c, owner, sets), lambda w: w[owner])
        attended = mixed.new_zeros(mixed.shape)
        for bucket in bucket_sets(batch, size):
            here = self._attend(mixed[bucket.rows], bucket.mask)
            attended = attended.index_copy(0, bucket.rows[bucket.mask], here[bucket.mask])
        nodes = self._finish(attended, mixed)
        graph = mean_sets(nodes, batch, size)
        if self.weights == "graph":
            filled = torch.bincount(batch, minlength=size) > 0
            weights, floored = weights * filled[:, None], floored & filled
        return HistoryRead(graph.to(dtype), nodes.to(dtype), mixed, scores, weights, floored)

    def _dense(
        self, tokens: Tensor | Sequence[Tensor], mask: Tensor | None
    ) -> tuple[_Embedded, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        """The history with nodes in front of layers, how scores are averaged over nodes, and weights spread again."""
        if isinstance(tokens, Tensor):
            tokens = tokens if mask is None else tokens.masked_fill(~mask[:, None, :, None], 0.0)
        else:
            tokens = [zero_padding(states, mask) for states in tokens]

        def average(scores: Tensor) -> Tensor:
            if self.weights == "graph":
                return masked_mean(scores, mask)
            flat = scores.flatten(0, 1).unsqueeze(0)
            return masked_mean(flat, None if mask is None else mask.reshape(1, -1))

        return self._embed(tokens), average, lambda weights: weights.unsqueeze(1)

    def _embed(self, tokens: Tensor | Sequence[Tensor]) -> _Embedded:
        """``(batch, layers, tokens, dim)``, or a list, to states ``(batch, tokens, layers, *)``."""
        layers = tokens.shape[1] if isinstance(tokens, Tensor) else len(tokens)
        device = (tokens if isinstance(tokens, Tensor) else tokens[0]).device
        offset = torch.zeros(layers, self.out_dim, device=device)
        if self.positions:
            offset = layer_positions(layers, self.out_dim, device)
        if isinstance(self.emb_hist, nn.ModuleList):
            states = tokens.unbind(1) if isinstance(tokens, Tensor) else tokens
            projected = [_linear(each, x) for each, x in zip(self.emb_hist, states, strict=True)]
            return _Embedded(torch.stack(projected, dim=2), None, offset)
        assert isinstance(self.emb_hist, nn.Linear)
        stack = tokens if isinstance(tokens, Tensor) else torch.stack(list(tokens), dim=1)
        if self.emb_hist.bias is not None:
            offset = offset + widen(self.emb_hist.bias)
        return _Embedded(widen(stack).transpose(1, 2), widen(self.emb_hist.weight), offset)

    def _mix(
        self, history: _Embedded, average: Callable[[Tensor], Tensor], spread: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``H``, scores, weights, and where the floor acted."""
        last = history.embed(history.states[..., -1, :]) + history.offset[-1]
        queries = _linear(self.w_q, last) @ widen(self.w_k.weight) * self.out_dim**-0.5
        scores = layer_scores(history.fold(queries), history.states) + queries @ history.offset.T
        if self.weights != "node":
            scores = average(scores)
        if self.normalisation == "signed":
            weights, floored = signed_weights(scores, self.eps)
        else:
            weights, floored = scores.softmax(dim=-1), torch.zeros_like(scores[..., 0], dtype=torch.bool)
        each = weights if self.weights == "node" else spread(weights)
        mixed = history.embed(mix_layers(history.states, each)) + each @ history.offset
        return mixed, scores, weights, floored

    def _attend(self, mixed: Tensor, mask: Tensor | None) -> Tensor:
        """What each node reads of its graph, heads side by side, before the output projection."""
        attention = self.node_attn
        qkv = F.linear(mixed, widen(attention.in_proj_weight), widen(attention.in_proj_bias))
        query, key, value = qkv.unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return masked_self_attention(query, key, value, mask).transpose(1, 2).flatten(2)

    def _project(self, attended: Tensor) -> Tensor:
        return _linear(self.node_attn.out_proj, attended)

    def _finish(self, attended: Tensor, mixed: Tensor) -> Tensor:
        nodes = self._project(attended) + mixed if self.residual else self._project(attended)
        if self.norm is None:
            return nodes
        return F.layer_norm(nodes, (self.out_dim,), widen(self.norm.weight), widen(self.norm.bias), self.norm.eps)

    def _full_precision(self, call: Callable[..., Any], tokens: Any, *rest: Any) -> Any:
        """The weights come from a difference of scores that may nearly cancel: autocast must not narrow them."""
        kind = (tokens if isinstance(tokens, Tensor) else tokens[0]).device.type
        if kind == "meta" or not torch.is_autocast_enabled(kind):
            return call(tokens, *rest)
        with torch.autocast(kind, enabled=False):
            return call(tokens, *rest)

    @classmethod
    def from_reference(cls, state_dict: dict[str, Tensor], **config: Any) -> HistoGraph:
        """From keys ``emb_hist.{weight,bias}``, ``w_q.weight``, ``w_k.weight``, ``node_attn.*``.

        Also ``emb_hist.<layer>.{weight,bias}`` (one projection a layer) and ``norm.{weight,bias}``. ``config`` takes
        ``num_heads`` (4), the constructor's options, and, checked against the weights, ``in_dim`` and ``hidden_dim``.
        ``ValueError`` for anything that does not fit.
        """
        projections = [key for key in state_dict if key.startswith("emb_hist.") and key.endswith("weight")]
        if not projections or "w_q.weight" not in state_dict:
            raise ValueError(f"expected emb_hist.*, w_q.weight, w_k.weight, node_attn.*, got {sorted(state_dict)}")
        widths = None
        if projections != ["emb_hist.weight"]:
            widths = [state_dict[f"emb_hist.{layer}.weight"].shape[1] for layer in range(len(projections))]
        dim = state_dict["emb_hist.weight"].shape[1] if widths is None else widths[-1]
        found = {"in_dim": dim, "hidden_dim": state_dict["w_q.weight"].shape[0]}
        for key, value in found.items():
            if config.pop(key, value) != value:
                raise ValueError(f"{key} contradicts the weights, which have {value}")
        bias = any(key.startswith("emb_hist.") and key.endswith("bias") for key in state_dict)
        options = {"bias": bias, "layer_norm": "norm.weight" in state_dict, "hidden_dim": found["hidden_dim"], **config}
        pool = cls(dim, widths=widths, **options)
        try:
            pool.load_state_dict(state_dict)
        except RuntimeError as error:
            raise ValueError(f"the weights do not fit: {error}") from None
        return pool.to(state_dict["w_q.weight"].dtype)


def _linear(layer: nn.Module, x: Tensor) -> Tensor:
    """A linear layer in float32 or better."""
    bias: Any = layer.bias
    return F.linear(widen(x), widen(layer.weight), None if bias is None else widen(bias))  # type: ignore[arg-type]


def _check_result(vectors: Tensor) -> None:
    """Scores are products of two states, so that states far below the largest number can still overflow."""
    if torch.compiler.is_compiling():
        return
    bad = ~vectors.isfinite().all(dim=-1)
    if bool(bad.any()):
        raise ValueError(
            f"the vector of graph {int(bad.nonzero()[0])} is not finite: its history is too large for products of two "
            f"states, or for an answer in {vectors.dtype}, or the parameters are not finite"
        )


def _dtype(tokens: Tensor | Sequence[Tensor]) -> torch.dtype:
    return tokens.dtype if isinstance(tokens, Tensor) else tokens[0].dtype
