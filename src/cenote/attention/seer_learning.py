"""What SeerAttention's recipes share: gates for a model's layers, which come and go as weights and learn from it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from cenote.attention.base import Recipe
from cenote.attention.host import Host
from cenote.attention.seer_gate import DecodeGate, PrefillGate
from cenote.attention.seer_training import observe, train_gates

GatedT = TypeVar("GatedT", bound="GatedRecipe")


class GatedRecipe(Recipe):
    """A recipe with a gate in each layer that it changes. Subclasses have a field ``gates``, weights by
    ``"<layer>.<parameter>"``."""

    gates: dict[str, Tensor]

    @property
    @abstractmethod
    def gate_type(self) -> str:
        """How queries and keys are pooled."""

    @abstractmethod
    def new_gate(self, host: Host) -> PrefillGate | DecodeGate:
        """A gate for one layer of the model, with new weights."""

    @abstractmethod
    def sparse_layers(self, host: Host) -> list[int]:
        """The layers that the recipe changes."""

    def new_gates(self, host: Host, seed: int = 0) -> nn.ModuleDict:
        """Gates with new weights for every layer that is not dense, by the layer's number."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return nn.ModuleDict({str(layer): self.new_gate(host) for layer in self.sparse_layers(host)})

    def with_gates(self: GatedT, gates: nn.ModuleDict) -> GatedT:
        """The same settings with the weights of these gates."""
        weights = {name: weight.detach().clone() for name, weight in gates.state_dict().items()}
        return replace(self, **{"gates": weights})

    def load_gates(self, host: Host) -> nn.ModuleDict:
        """The gates with the recipe's weights, each on its layer's device.

        Raises:
            ValueError: no weights, weights for another number of layers, or of shapes that do not fit the model.
        """
        if not self.gates:
            raise ValueError(f"{self.name} has no gates yet: use recipe.calibrate(model, batches), or load gates")
        with torch.device("meta"):
            gates = self.new_gates(host)
        wanted = gates.state_dict()
        dense = {f"{layer}." for layer in set(range(host.num_layers)) - set(self.sparse_layers(host))}
        given = {name: w for name, w in self.gates.items() if not any(name.startswith(each) for each in dense)}
        wrong = sorted(wanted.keys() ^ given.keys())
        if wrong:
            raise ValueError(f"the gates do not fit this model of {host.num_layers} layers: {_some(wrong)} on one side")
        for name, weight in given.items():
            if weight.shape != wanted[name].shape:
                raise ValueError(
                    f"gate {name} is {tuple(weight.shape)}, this model and gate type {self.gate_type!r} need "
                    f"{tuple(wanted[name].shape)} (heads, poolings * head_dim, hidden_size)"
                )
        gates.load_state_dict(given, assign=True)
        return _place(gates, host).requires_grad_(False)

    def calibrate(
        self: GatedT,
        model: nn.Module,
        batches: Iterable[Mapping[str, Tensor]],
        *,
        steps: int = 400,
        learning_rate: float = 1e-2,
        seed: int = 0,
    ) -> GatedT:
        """A recipe with gates distilled from the model's own attention on these inputs.

        The model runs once over each batch; the gates then learn for ``steps`` steps from what it showed
        (:func:`cenote.attention.seer_training.train_gates`).
        """
        host = Host.of(model)
        gates = _place(self.new_gates(host, seed), host)
        examples = [observed for batch in batches for observed in observe(model, self, gates, batch)]
        train_gates(gates, examples, steps=steps, learning_rate=learning_rate, seed=seed)
        return self.with_gates(gates)


def _place(gates: nn.ModuleDict, host: Host) -> nn.ModuleDict:
    """Move each gate to its layer's device."""
    for layer, gate in gates.items():
        gate.to(next(host.layers[int(layer)].parameters()).device)
    return gates


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
