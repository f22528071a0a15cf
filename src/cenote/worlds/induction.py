"""A two-layer attention-only classifier, and measures of the circuit that it forms."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cenote.worlds.context_classification import ContextClassification


class Trace(NamedTuple):
    """What a network computed on the way.

    Attributes:
        logits: ``(batch, labels)``.
        attention: of each layer, ``(batch, 1, queries, keys)``.
        residuals: tokens after each layer, ``(batch, tokens, width)``.
    """

    logits: Float[Tensor, "batch labels"]
    attention: tuple[Float[Tensor, "batch 1 tokens tokens"], ...]
    residuals: tuple[Float[Tensor, "batch tokens width"], ...]


class CausalHead(nn.Module):
    """One causal head without scale, bias or output map: ``h + softmax_{j <= i}((Q h_i) . (K h_j)) V h``."""

    def __init__(self, width: int, std: float, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Parameter(std * torch.randn(width, width, generator=generator)) for _ in range(3))

    def forward(
        self, tokens: Float[Tensor, "batch tokens width"]
    ) -> tuple[Float[Tensor, "batch tokens width"], Float[Tensor, "batch tokens tokens"]]:
        scores = (tokens @ self.q.T) @ (tokens @ self.k.T).mT
        earlier = torch.ones(scores.shape[-2:], dtype=torch.bool, device=tokens.device).tril()
        weights = scores.masked_fill(~earlier, float("-inf")).softmax(dim=-1)
        return tokens + weights @ (tokens @ self.v.T), weights


class Perceptron(nn.Module):
    """``relu(W r + b)`` with one scalar b."""

    def __init__(self, width: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter((2 / width) ** 0.5 * torch.randn(width, width, generator=generator))
        self.bias = nn.Parameter(width**-0.5 * torch.randn(1, generator=generator))

    def forward(self, x: Float[Tensor, "batch width"]) -> Float[Tensor, "batch width"]:
        return (x @ self.weight.T + self.bias).relu()


class InductionNetwork(nn.Module):
    """Causal heads in a row, then an MLP on the last token and a linear readout of the label.

    No norms, no biases but one scalar a layer of the MLP, no output maps and no ``1 / sqrt(width)``. From "The
    mechanistic basis of data dependence and abrupt learning in an in-context classification task" (arXiv 2312.03002).
    Parameters: ``3 layers width^2 + mlp_layers (width^2 + 1) + labels width``. Drawn apart from each other, where the
    author's code draws the third layer of the MLP and the readout from one key.

    This is the plain form; :mod:`cenote.worlds.induction_training` computes the same logits of many networks at once
    with a fraction of the work.

    Args:
        width: of a token, positions and content.
        num_labels: labels L.
        dim: width of the content, which sets the spread ``dim ** -0.5`` of Q, K and V.
        layers: heads in a row.
        mlp_layers: layers of the MLP.
        generator: of the weights; torch's own by default.

    Raises:
        ValueError: a size below 1 (``mlp_layers`` may be 0), or tokens of another width.
    """

    def __init__(
        self,
        width: int,
        num_labels: int,
        dim: int,
        layers: int = 2,
        mlp_layers: int = 3,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if min(width, num_labels, dim, layers) < 1 or mlp_layers < 0:
            raise ValueError(
                f"sizes must be at least 1, got width={width}, num_labels={num_labels}, dim={dim}, layers={layers}, "
                f"mlp_layers={mlp_layers}"
            )
        self.width = width
        self.attn = nn.ModuleList(CausalHead(width, dim**-0.5, generator) for _ in range(layers))
        self.mlp = nn.ModuleList(Perceptron(width, generator) for _ in range(mlp_layers))
        self.readout = nn.Linear(width, num_labels, bias=False)
        nn.init.normal_(self.readout.weight, std=width**-0.5, generator=generator)

    @classmethod
    def for_world(
        cls, world: ContextClassification, layers: int = 2, generator: torch.Generator | None = None
    ) -> InductionNetwork:
        """A network of a world's sizes."""
        return cls(world.width, world.num_labels, world.dim, layers, generator=generator)

    def trace(self, inputs: Float[Tensor, "batch tokens width"]) -> Trace:
        """Logits with attention and tokens of each layer."""
        if inputs.shape[-1] != self.width:
            raise ValueError(f"the network was built for tokens of width {self.width}, got {tuple(inputs.shape)}")
        tokens, attention, residuals = inputs, [], []
        for head in self.attn:
            tokens, weights = head(tokens)
            attention.append(weights[:, None])
            residuals.append(tokens)
        last = tokens[:, -1]
        for layer in self.mlp:
            last = layer(last)
        return Trace(self.readout(last), tuple(attention), tuple(residuals))

    def forward(self, inputs: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "batch labels"]:
        """Logits of the target's label."""
        return self.trace(inputs).logits


# Measures. They take attention ``(batch, heads, queries, keys)`` as transformers' eager attention gives it, and return
# one number a head.


def attention_mass(
    attention: Float[Tensor, "batch heads queries keys"],
    queries: Int[Tensor, "places"],
    wanted: Bool[Tensor, "#batch #places keys"],
) -> Float[Tensor, "heads"]:
    """Attention that queries at given places pay to the wanted keys: sum over keys, mean over places and items."""
    if not len(queries):
        raise ValueError("expected at least one query")
    rows = attention[:, :, queries].float()
    return (rows * wanted[:, None]).sum(dim=-1).mean(dim=(0, 2))


def label_places(tokens: int) -> Int[Tensor, "pairs"]:
    """Where the labels stand in ``x_1, l_1, ..., x_target``: 1, 3, ..."""
    return torch.arange(1, tokens, 2)


def item_label_association(
    attention: Float[Tensor, "batch heads queries keys"], labels: Int[Tensor, "places"]
) -> Float[Tensor, "heads"]:
    """ILA: attention that each label pays to the token in front of it.

    With ``labels`` all places but the first it is the previous-token score, TransformerLens' ``detect_head`` of a
    ``previous_token_head`` with ``error_measure="mul"``.
    """
    keys = torch.arange(attention.shape[-1], device=attention.device)
    return attention_mass(attention, labels, (keys == labels.to(keys)[:, None] - 1)[None])


def target_label_attention(
    attention: Float[Tensor, "batch heads queries keys"], labels: Int[Tensor, "places"], target: int = -1
) -> Float[Tensor, "heads"]:
    """TLA: attention that the target pays to all labels of the context."""
    wanted = torch.zeros(1, 1, attention.shape[-1], dtype=torch.bool, device=attention.device)
    wanted[..., labels] = True
    return attention_mass(attention, torch.tensor([target]), wanted)


def target_item_label_association(
    attention: Float[Tensor, "batch heads queries keys"], matches: Bool[Tensor, "batch keys"], target: int = -1
) -> Float[Tensor, "heads"]:
    """TILA: attention that the target pays to the labels of items of its own class.

    Args:
        matches: ``True`` at those labels; :func:`matching_labels` finds them. For the induction score of a language
            model, mark the tokens that followed earlier copies of the target.
    """
    return attention_mass(attention, torch.tensor([target]), matches[:, None])


def matching_labels(classes: Int[Tensor, "batch items"]) -> Bool[Tensor, "batch tokens"]:
    """Where, in ``x_1, l_1, ..., x_target``, the labels of items of the target's class stand."""
    same = classes[:, :-1] == classes[:, -1:]
    places = torch.zeros(len(classes), 2 * same.shape[1] + 1, dtype=torch.bool, device=classes.device)
    places[:, 1::2] = same
    return places


def context_label_accuracy(
    logits: Float[Tensor, "batch labels"], context: Int[Tensor, "batch pairs"]
) -> Float[Tensor, ""]:
    """CLA: share of predictions that are one of the context's labels."""
    return (logits.argmax(dim=-1, keepdim=True) == context).any(dim=-1).float().mean()
