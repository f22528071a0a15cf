"""Layer-aware TDNN (L-TDNN): a speaker vector from all layers of a speech encoder."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cenote.ops.frames import kept_frames
from cenote.ops.layer_frames import gated_layer_max, layer_gate
from cenote.ops.masked import widen, zero_padding
from cenote.ops.statistics import masked_statistics, raw_moments, weighted_statistics
from cenote.pooling.base import Pooling
from cenote.pooling.l_tdnn_nets import FrameNorm, LayerFrameNet, pointwise
from cenote.pooling.l_tdnn_reference import read_reference

CONTEXT_FLOOR = 1e-12
"""Smallest variance of a clip's frames: keeps gradients finite and is nothing beside a real one."""
VARIANCE_FLOOR = 1e-4
"""Smallest weighted variance, as published."""


class LayerAttentionPool(nn.Module):
    """Batch norm and a pointwise map to ``hidden_size``, a gate for each head, layer and frame
    (:func:`cenote.ops.layer_frames.layer_gate`), the maximum over gated layers, and a map with batch norm.

    Args:
        dim: channels of the network's output.
        num_layers: length L of the layer axis, at least 2: the gate's hidden width is ``L // 2``.
        hidden_size: width of the result.
        num_heads: gates a layer and frame; must divide ``hidden_size``.
        dropout: of the gates, in training.
    """

    def __init__(self, dim: int, num_layers: int, hidden_size: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.in_norm, self.in_projection = FrameNorm(dim), pointwise(dim, hidden_size, bias=False)
        hidden = num_layers // 2
        self.w1 = nn.Parameter(torch.empty(num_heads, num_layers, hidden))
        self.b1 = nn.Parameter(torch.zeros(num_heads, hidden))
        self.w2 = nn.Parameter(torch.empty(num_heads, hidden, num_layers))
        self.b2 = nn.Parameter(torch.zeros(num_heads, num_layers))
        nn.init.kaiming_uniform_(self.w1, nonlinearity="relu")
        nn.init.xavier_uniform_(self.w2)
        self.out_projection, self.out_norm = pointwise(hidden_size, hidden_size, bias=False), FrameNorm(hidden_size)

    def project(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """What is gated: ``(batch, layers, frames, heads, hidden_size / heads)``."""
        return self.in_projection(self.in_norm(x, mask)).unflatten(-1, (self.num_heads, -1))

    def gate(self, projected: Tensor) -> Tensor:
        """``(batch, heads, layers, frames)``, between 0 and 1."""
        return layer_gate(projected, self.w1, self.b1, self.w2, self.b2)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        projected = self.project(x, mask)
        gate = F.dropout(self.gate(projected), self.dropout, self.training)
        return self.out_norm(self.out_projection(gated_layer_max(projected, gate).flatten(-2)), mask)


class LTDNN(Pooling):
    """A 2-D network over layers and frames, a maximum over gated layers, and attentive statistics over frames.

    With hidden states ``H`` ``(batch, layers, frames, dim)``: ``X = net(H)`` convolves over layers and frames;
    ``y_t = max_l s_lt W X_lt`` with gates ``s`` between 0 and 1 for each head, layer and frame; with mean and
    deviation ``mu, sigma`` of y over frames, ``a = softmax_t(W2 BN(relu(W1 [y_t; mu; sigma])))``, one weight a
    channel, gives weighted mean m and deviation d, and ``BN(Linear(BN([m; d])))`` is the vector ``(batch, pool_dim)``.
    Score two clips by the cosine of their vectors. Source: "Layer-aware TDNN: Speaker Recognition Using Multi-Layer
    Features from Pre-Trained Models" (arXiv 2409.07770). Parameters at the defaults: 5.72 M at 13 layers of 768
    channels, 6.70 M at 25 of 1024; with ``net="d3net"`` 6.48 M and 6.81 M. Time is linear in layers x frames. The layer
    axis holds the embeddings too (12 blocks make 13), and the module is tied to its length.

    Otherwise than in the official code, a clip's vector never depends on padding: frames that are padding are zero in
    front of every convolution and left out of every mean, deviation, softmax and, in training, of the statistics of
    every batch norm, so padding may be on either side. Without a mask every frame counts as real: the module cannot
    see that clips of a batch have different lengths, so pass the mask
    (:func:`cenote.ops.frames.length_mask`, in frames, not in samples). The three options at the end bring published
    behaviour back. The weights returned are the mean over channels, ``(batch, 1, frames)``.

    Args:
        dim: channels C of the hidden states.
        num_layers: length L of the layer axis, embeddings included, at least 2.
        net: ``"ecapa"`` or ``"d3net"``, see :class:`~cenote.pooling.l_tdnn_nets.LayerFrameNet`.
        conv_dim: channels of the network.
        hidden_size: channels D behind the layer pool; must be a multiple of ``num_heads``.
        num_heads: layer gates a frame.
        pool_dim: width of the vector.
        num_blocks: blocks of the network.
        depth: convolutions in a block of ``"d3net"``; must divide ``conv_dim``.
        res2_scale: channel groups in a block of ``"ecapa"``; must divide ``conv_dim``.
        se_channels: hidden width of squeeze-excitation, whatever ``conv_dim``.
        dropout: of layer gates and of attention, in training.
        masked: ``"all"``, or ``"statistics"``: only the attentive statistics see the mask, as published.
        deviation: ``"biased"`` divides by N; ``"official"`` divides by N - 1 where there is no mask, as published, so
            that a mask without padding changes the vector a little.
        attention_dropout: ``"frames"`` leaves frames out before the softmax, so that weights sum to one;
            ``"weights"`` zeroes weights after it and takes ``E[x^2] - E[x]^2`` with what is left, as published.
    """

    name = "l_tdnn"
    paper = "l-tdnn"
    layers = "all"
    permutation_invariant = False
    attends = True
    reads_embeddings = True
    modalities = ("audio",)

    def __init__(
        self,
        dim: int,
        num_layers: int,
        net: Literal["ecapa", "d3net"] = "ecapa",
        conv_dim: int = 256,
        hidden_size: int = 512,
        num_heads: int = 8,
        pool_dim: int = 192,
        num_blocks: int = 3,
        depth: int = 4,
        res2_scale: int = 8,
        se_channels: int = 128,
        dropout: float = 0.1,
        masked: Literal["all", "statistics"] = "all",
        deviation: Literal["biased", "official"] = "biased",
        attention_dropout: Literal["frames", "weights"] = "frames",
    ) -> None:
        super().__init__(dim, pool_dim)
        sizes = {
            "conv_dim": conv_dim, "hidden_size": hidden_size, "num_heads": num_heads, "pool_dim": pool_dim,
            "num_blocks": num_blocks, "depth": depth, "res2_scale": res2_scale, "se_channels": se_channels,
        }  # fmt: skip
        for word, size in sizes.items():
            if size < 1:
                raise ValueError(f"{word} must be at least 1, got {size}")
        if num_layers < 2:
            raise ValueError(f"num_layers must be at least 2 (embeddings and one block), got {num_layers}")
        if hidden_size % num_heads or hidden_size < 2:
            raise ValueError(f"hidden_size must be a multiple of num_heads={num_heads} above 1, got {hidden_size}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {dropout}")
        choices = {
            "net": (net, ("ecapa", "d3net")), "masked": (masked, ("all", "statistics")),
            "deviation": (deviation, ("biased", "official")),
            "attention_dropout": (attention_dropout, ("frames", "weights")),
        }  # fmt: skip
        for word, (value, known) in choices.items():
            if value not in known:
                raise ValueError(f"{word} must be {known[0]!r} or {known[1]!r}, got {value!r}")
        self.num_layers, self.dropout = num_layers, dropout
        self.masked, self.deviation, self.attention_dropout = masked, deviation, attention_dropout
        self.net = LayerFrameNet(dim, net, conv_dim, num_blocks, depth, res2_scale, se_channels)
        self.layer_pool = LayerAttentionPool(self.net.out_dim, num_layers, hidden_size, num_heads, dropout)
        self.attention_in = nn.Linear(3 * hidden_size, hidden_size // 2)
        self.attention_norm = FrameNorm(hidden_size // 2)
        self.attention_out = nn.Linear(hidden_size // 2, hidden_size)
        self.statistics_norm = FrameNorm(2 * hidden_size)
        self.out_projection = nn.Linear(2 * hidden_size, pool_dim)
        self.out_norm = FrameNorm(pool_dim)

    def check(self, tokens: Tensor, mask: Tensor | None) -> None:
        super().check(tokens, mask)
        if tokens.shape[1] != self.num_layers:
            raise ValueError(
                f"LTDNN was built for {self.num_layers} layers (the embeddings and every block), got {tokens.shape[1]}"
            )

    def _pool(self, tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.training and tokens.shape[0] < 2:
            raise ValueError("training needs at least 2 items a batch: batch norm has no statistics of a single vector")
        return self.pool_frames(self.pool_layers(self.convolve(tokens, mask), mask), mask)

    def _net_mask(self, mask: Tensor | None) -> Tensor | None:
        return mask if self.masked == "all" else None

    def convolve(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """The network: hidden states to ``(batch, layers, frames, num_blocks * conv_dim)``, arbitrary in padding."""
        mask = self._net_mask(mask)
        return self.net(hidden if mask is None else hidden.masked_fill(~mask[:, None, :, None], 0.0), mask)

    def pool_layers(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The network's output ``(batch, layers, frames, channels)`` to ``(batch, frames, hidden_size)``."""
        return self.layer_pool(x, self._net_mask(mask))

    def pool_frames(self, y: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Frames ``(batch, frames, hidden_size)`` to the vector and the mean attention ``(batch, 1, frames)``."""
        correction = int(mask is None and self.deviation == "official")
        mean, deviation = masked_statistics(y, mask, CONTEXT_FLOOR, correction)
        # The part of the map that reads mean and deviation is the same for all frames.
        of_frame, of_clip = self.attention_in.weight.split([y.shape[-1], 2 * y.shape[-1]], dim=1)
        clip = F.linear(torch.cat([mean, deviation], dim=-1), of_clip, self.attention_in.bias)
        hidden = self.attention_norm((F.linear(y, of_frame) + clip[:, None]).relu_(), self._net_mask(mask))
        scores = widen(self.attention_out(hidden))
        if mask is not None:
            scores = scores.masked_fill(~mask[..., None], float("-inf"))
        if self.training and self.dropout and self.attention_dropout == "weights":
            weights = F.dropout(scores.softmax(dim=1), self.dropout)
            mean, deviation = raw_moments(zero_padding(y, mask), weights, VARIANCE_FLOOR)
        else:
            if self.training and self.dropout:
                real = mask if mask is not None else scores.new_ones(scores.shape[:2], dtype=torch.bool)
                scores = scores.masked_fill(~kept_frames(real, self.dropout)[..., None], float("-inf"))
            weights = scores.softmax(dim=1)
            mean, deviation = weighted_statistics(y, weights, mask, VARIANCE_FLOOR)
        statistics = self.statistics_norm(torch.cat([mean, deviation], dim=-1)[:, None], None)
        return self.out_norm(self.out_projection(statistics), None)[:, 0], weights.mean(dim=2).unsqueeze(1)

    @classmethod
    def from_reference(cls, state_dict: dict[str, Tensor], **config: Any) -> LTDNN:
        """From official keys ``encoder.*``, with the published masking, deviation and attention dropout.

        Keys of the loss (see :meth:`cenote.tuning.margin.AAMSoftmax.from_reference`) and of the backbone are passed
        over. ``config`` takes official names of sizes, checked against the weights, and the constructor's options.
        ``ValueError`` for weights that do not fit.
        """
        options, state = read_reference(state_dict, config)
        published = {"masked": "statistics", "deviation": "official", "attention_dropout": "weights"}
        with torch.device("meta"):
            pool = cls(**{**published, **options})
        try:
            pool.load_state_dict(state, assign=True)
        except RuntimeError as error:
            raise ValueError(f"the weights do not fit together: {error}") from None
        return pool
