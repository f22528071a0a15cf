"""The work on one decoder layer: gather its second-order statistics in stages, quantise, run it for the next layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from cenote.ops.gptq import WeightedHessian, gptq, normalize_importance
from cenote.ops.quantizer import GridSettings, round_to_nearest
from cenote.tuning.rsq_calibration import CalibrationBatch, token_counts
from cenote.tuning.rsq_importance import Importance
from cenote.tuning.rsq_layers import Seen, decoder_layers, run_layer
from cenote.tuning.rsq_linear import QuantizedLinear

STAGES = (
    ("self_attn.q_proj", ("self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj")),
    ("self_attn.o_proj", ("self_attn.o_proj",)),
    ("mlp.gate_proj", ("mlp.up_proj", "mlp.gate_proj")),
    ("mlp.down_proj", ("mlp.down_proj",)),
)
"""Which linear layer's input is gathered, and which linear layers then are quantised, in this order."""
LINEARS = tuple(name for _, group in STAGES for name in group)


@dataclass
class LayerQuantizer:
    """A model on its way through quantisation.

    Attributes:
        model: its weights are replaced layer by layer.
        grid: of all weights.
        batches: calibration data; empty for round-to-nearest.
        importance: a rule, or ready weights of each batch.
        weighted: last parts of the names of the linear layers that importance is for.
        gptq: options of :func:`cenote.ops.gptq.gptq`.
        hidden: what enters the layer that is next, one entry a batch, on the CPU; ``None`` for embeddings.
    """

    model: Any
    grid: GridSettings
    batches: list[CalibrationBatch]
    importance: Importance | list[Tensor]
    weighted: set[str]
    gptq: dict[str, Any]
    hidden: list[Tensor | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.layers = decoder_layers(self.model)
        self.prefix = next(name for name, module in self.model.named_modules() if module is self.layers)
        self.device = next(self.layers.parameters()).device
        self.hidden = [None] * len(self.batches)
        self.counts: Tensor | None = None
        if isinstance(self.importance, Importance) and self.importance.need == "ids":
            self.counts = token_counts(self.batches, self.model.config.vocab_size).to(self.device)

    def quantize(self, number: int) -> list[QuantizedLinear]:
        """Quantise the linear layers of a decoder layer, each group with the earlier ones already quantised."""
        if not self.batches:
            return [self._round(number, name) for name in LINEARS]
        done: list[QuantizedLinear] = []
        weights: list[Tensor] = []
        for watch, group in STAGES:
            chosen = {name: name.rpartition(".")[2] in self.weighted for name in group}
            hessians: dict[bool, WeightedHessian] = {}
            for place in range(len(self.batches)):
                if watch == STAGES[0][0]:
                    inputs, weight = self._weigh(number, place, watch)
                    weights.append(weight)
                else:
                    inputs = _found(self._see(number, place, watch=watch, output=False).inputs)
                for use in sorted(set(chosen.values())):
                    hessian = hessians.setdefault(use, WeightedHessian(inputs.shape[-1], self.device))
                    self._gather(hessian, inputs, weights[place] if use else None, self.batches[place].mask)
            done += [self._gptq(number, name, hessians[chosen[name]].value) for name in group]
        return done

    def restore(self, linears: list[QuantizedLinear]) -> None:
        """Put weights that were quantised earlier in their places."""
        for each in linears:
            self.model.get_submodule(each.name).weight.data.copy_(each.dequantize())

    def advance(self, number: int) -> None:
        """Run the quantised layer: its outputs are what the next one gets."""
        for place in range(len(self.batches)):
            self.hidden[place] = _found(self._see(number, place).output).cpu()

    def _see(self, number: int, place: int, **asked: Any) -> Seen:
        batch, hidden = self.batches[place], self.hidden[place]
        hidden = None if hidden is None else hidden.to(self.device)
        return run_layer(self.model, number, batch.inputs(self.device), hidden, mask=self._mask(place), **asked)

    def _mask(self, place: int) -> Tensor | None:
        mask = self.batches[place].mask
        return None if mask is None else mask.to(self.device)

    def _weigh(self, number: int, place: int, watch: str) -> tuple[Tensor, Tensor]:
        """Input of the first linear layers and the tokens' weights, of mean 1."""
        rule, mask = self.importance, self._mask(place)
        if not isinstance(rule, Importance):
            inputs = _found(self._see(number, place, watch=watch, output=False).inputs)
            return inputs, normalize_importance(rule[place].to(self.device), mask)
        need = rule.need
        seen = self._see(number, place, watch=watch, attention=need == "attention", output=need == "output")
        weights = rule.weights(
            seen.entered,
            mask,
            received=seen.received,
            y=seen.output,
            ids=self.batches[place].ids.to(self.device),
            counts=self.counts,
        )
        return _found(seen.inputs), normalize_importance(weights, mask)

    def _gather(self, hessian: WeightedHessian, inputs: Tensor, weights: Tensor | None, mask: Tensor | None) -> None:
        for row in range(len(inputs)):
            real = slice(None) if mask is None else mask[row].to(self.device)
            hessian.add(inputs[row, real], None if weights is None else weights[row, real])

    def _gptq(self, number: int, name: str, hessian: Tensor) -> QuantizedLinear:
        linear = self._linear(number, name)
        result = gptq(linear.weight, hessian, self.grid, **self.gptq)
        return self._keep(
            QuantizedLinear.pack(
                self._name(number, name), result.quantized, self.grid.dtype, result.error, result.damping_steps
            )
        )

    def _round(self, number: int, name: str) -> QuantizedLinear:
        weight = self._linear(number, name).weight.float()
        quantized = round_to_nearest(weight, self.grid)
        whole = float(weight.square().sum())
        error = float((quantized.dequantize() - weight).square().sum()) / whole if whole else 0.0
        return self._keep(QuantizedLinear.pack(self._name(number, name), quantized, self.grid.dtype, error, 0))

    def _keep(self, linear: QuantizedLinear) -> QuantizedLinear:
        self.restore([linear])
        return linear

    def _linear(self, number: int, name: str) -> nn.Linear:
        linear = self.layers[number].get_submodule(name)
        assert isinstance(linear, nn.Linear)
        return linear

    def _name(self, number: int, name: str) -> str:
        return f"{self.prefix}.{number}.{name}"


def _found(value: Tensor | None) -> Tensor:
    if value is None:
        raise RuntimeError("a layer ran without calling one of its linear layers")
    return value


def check_linears(model: Any, layers: nn.ModuleList, grid: GridSettings) -> torch.dtype:
    """The type of a model's weights, after a look at every linear layer that is to be quantised.

    Raises:
        ValueError: a linear layer is missing, is none, or does not divide into groups.
    """
    kind, dtypes = type(model).__name__, set()
    for number, layer in enumerate(layers):
        modules = dict(layer.named_modules())
        for name in LINEARS:
            linear = modules.get(name)
            if type(linear) is not nn.Linear:
                found = "nothing" if linear is None else type(linear).__name__
                raise ValueError(
                    f"expected an unquantised linear layer {name} in layer {number} of {kind}, found {found}"
                )
            grid.check_columns(linear.in_features)
            dtypes.add(linear.weight.dtype)
    if len(dtypes) > 1 or not (dtype := dtypes.pop()).is_floating_point:
        raise ValueError(f"expected linear layers of one floating-point type in {kind}, got {sorted(map(str, dtypes))}")
    return dtype
