"""HistoGraph: a task that a deep graph network smooths away."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from cenote.ops.masked import masked_mean
from cenote.pooling.histograph import HistoGraph

COLOURS, WIDTH, LEAST, MOST = 4, 32, 12, 24
DENSITY, PREFERENCE = 0.25, 0.32


def coloured_graphs(
    count: int, generator: torch.Generator
) -> tuple[Float[Tensor, "graphs nodes 4"], Float[Tensor, "graphs nodes nodes"], Bool[Tensor, "graphs nodes"], Tensor]:
    """Random graphs of 12 to 24 nodes with one of four colours each; the label is whether edges prefer equal colours.

    Every pair is joined with probability 0.25 where the label is 0. Where it is 1, pairs of one colour are joined more
    often (0.25 + 0.32) and others less, so that the expected number of edges is the same.

    Returns:
        Colours one-hot, adjacency (0 and 1), mask of real nodes, labels.
    """
    sizes = torch.randint(LEAST, MOST + 1, (count,), generator=generator)
    mask = torch.arange(MOST) < sizes[:, None]
    colours = torch.randint(COLOURS, (count, MOST), generator=generator)
    labels = torch.randint(2, (count,), generator=generator)
    equal = (colours[:, :, None] == colours[:, None, :]).double()
    # Pairs of unequal colours are three times as many, so each loses a third of what a pair of equal ones gains.
    chance = DENSITY + PREFERENCE * labels[:, None, None] * (equal - (1 - equal) / (COLOURS - 1))
    drawn = torch.rand(count, MOST, MOST, generator=generator).double() < chance
    upper = (drawn & mask[:, :, None] & mask[:, None, :]).float().triu(diagonal=1)
    return F.one_hot(colours, COLOURS).float() * mask[..., None], upper + upper.mT, mask, labels


class PlainGCN(nn.Module):
    """A linear map, then graph convolutions ``relu(A^ X W + b)`` without residuals or norms, on padded graphs.

    ``A^ = D^-1/2 (A + I) D^-1/2`` as in PyTorch Geometric's ``GCNConv``; hidden state l is what leaves layer l.

    Args:
        layers: convolutions.
        glorot: weights as ``GCNConv`` draws them, which keep the size of the states from layer to layer; otherwise as
            ``torch.nn.Linear`` does, which shrink them.
    """

    def __init__(self, layers: int, glorot: bool = False, width: int = WIDTH) -> None:
        super().__init__()
        self.embed = nn.Linear(COLOURS, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        for layer in self.layers if glorot else ():
            nn.init.xavier_uniform_(layer.weight)  # type: ignore[arg-type]
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, adjacency: Tensor) -> Float[Tensor, "graphs states nodes width"]:
        """Hidden states 0 to ``layers``."""
        looped = adjacency + torch.eye(adjacency.shape[-1])
        scale = looped.sum(dim=-1).rsqrt()
        smoothing = scale[:, :, None] * looped * scale[:, None, :]
        states = [self.embed(x)]
        for layer in self.layers:
            states.append(F.relu(F.linear(smoothing @ states[-1], layer.weight, layer.bias)))  # type: ignore[arg-type]
        return torch.stack(states, dim=1)


class LastMean(nn.Module):
    """The mean over nodes of the last layer."""

    out_dim = WIDTH

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        return masked_mean(states[:, -1], mask)


class LayerMeans(nn.Module):
    """The means of all layers side by side: JumpingKnowledge-cat with a mean."""

    def __init__(self, states: int) -> None:
        super().__init__()
        self.out_dim = WIDTH * states

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        return masked_mean(states.transpose(1, 2).flatten(2), mask)


def readout(name: str, layers: int) -> nn.Module:
    """``"mean"``, ``"jk"``, ``"signed"`` or ``"softmax"`` for a network of so many layers."""
    if name == "mean":
        return LastMean()
    if name == "jk":
        return LayerMeans(layers + 1)
    return HistoGraph(WIDTH, layers + 1, normalisation=name)


def smoothing_accuracy(
    name: str, layers: int, seed: int, steps: int = 250, glorot: bool = False, batch: int = 64, test: int = 2000
) -> tuple[float, float]:
    """Test accuracy of a deep network with a readout, trained end to end on new graphs at every step (Adam 1e-3,
    gradients clipped to norm 1), and the largest layer weight on the test graphs (0 where there are none)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network, read = PlainGCN(layers, glorot), readout(name, layers)
        head = nn.Linear(read.out_dim, 2)  # type: ignore[arg-type]
    model = nn.ModuleList([network, read, head])
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x, adjacency, mask, labels = coloured_graphs(batch, generator)
        loss = F.cross_entropy(head(read(network(x, adjacency), mask)), labels)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
    with torch.no_grad():
        x, adjacency, mask, labels = coloured_graphs(test, torch.Generator().manual_seed(10_000 + seed))
        states = network(x, adjacency)
        accuracy = (head(read(states, mask)).argmax(dim=1) == labels).double().mean().item()
        largest = float(read.read(states, mask).layer_weights.abs().max()) if isinstance(read, HistoGraph) else 0.0
    return accuracy, largest
