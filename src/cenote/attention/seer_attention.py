"""SeerAttention: a learned gate picks the blocks of a prompt's attention map that are computed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from cenote.attention.block_prefill import BlockPrefill, Scorer
from cenote.attention.host import Host
from cenote.attention.seer_gate import PrefillGate
from cenote.ops.block_gate import parse_gate_type


@dataclass(frozen=True)
class SeerAttention(BlockPrefill):
    """Prompts attend to the blocks that a small gate in each layer, trained on the frozen model, scores highest.

    ``logits = turn(pool(q) W_q) turn(pool(k) W_k)^T / sqrt(hidden_size)`` of queries and keys without rotary
    positions (:class:`~cenote.attention.seer_gate.PrefillGate`) choose the blocks of a softmax attention that computes
    nothing else. Steps of decoding are dense. Source: "SeerAttention: Learning Intrinsic Sparse Attention in Your
    LLMs" (arXiv 2410.13276).

        recipe = SeerAttention(block_size=32, nz_ratio=0.2).calibrate(model, batches)
        with recipe(model) as session:
            model.generate(**inputs)
        session.densities()                                     # what each layer attended to

    Gates come from :meth:`calibrate`, from :func:`cenote.tuning.seer_distillation.distill_gates` or from
    :func:`cenote.integrations.seer_checkpoints.load_seer_attention`. Other than the official code: padded batches
    work, each row's blocks beginning at its first real token; a row of blocks that the threshold leaves nothing keeps
    its best; threshold 0 keeps everything; the gate runs in float32.

    Args:
        hidden_size: width of the gates; ``None`` for that of the heads.
        gate_type: ``Q<kinds>_K<kinds>`` with kinds of pooling out of ``max``, ``min``, ``avg``.
        force_double: project the queries too where the gate would not.
        gates: weights by ``"<layer>.<parameter>"``, such as ``"0.key.weight"``.

    Raises:
        ValueError: an unknown gate type, or settings of :class:`~cenote.attention.block_prefill.BlockPrefill` out of
            range; in a model that gates are missing or do not fit.
    """

    name: ClassVar[str] = "seer_attention"

    hidden_size: int | None = None
    gate_type: str = "Qavg_Kmaxminavg"
    force_double: bool = False
    gates: dict[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_gate_type(self.gate_type)
        if self.hidden_size is not None and self.hidden_size < 1:
            raise ValueError(f"hidden_size must be at least 1, got {self.hidden_size}")

    def new_gate(self, host: Host) -> PrefillGate:
        """A gate for one layer of the model, with new weights."""
        return PrefillGate(
            host.num_heads, host.num_kv_heads, host.head_dim, self.block_size, self.hidden_size, self.gate_type,
            self.force_double,
        )  # fmt: skip

    def new_gates(self, host: Host, seed: int = 0) -> nn.ModuleDict:
        """Gates with new weights for every layer that is not dense, by the layer's number."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return nn.ModuleDict({str(layer): self.new_gate(host) for layer in self.sparse_layers(host)})

    def with_gates(self, gates: nn.ModuleDict) -> SeerAttention:
        """The same settings with the weights of these gates."""
        return replace(self, gates={name: weight.detach().clone() for name, weight in gates.state_dict().items()})

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
        dense = {f"{layer}." for layer in self.dense_layers}
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
        for layer, gate in gates.items():
            gate.to(next(host.layers[int(layer)].parameters()).device)
        return gates.requires_grad_(False)

    def scorer(self, host: Host, layers: list[int]) -> Scorer:
        gates = self.load_gates(host)
        return lambda prompt: gates[str(prompt.layer)](*prompt.unrotated, prompt.rotary)

    def calibrate(
        self,
        model: nn.Module,
        batches: Iterable[Mapping[str, Tensor]],
        *,
        steps: int = 400,
        learning_rate: float = 1e-2,
        seed: int = 0,
    ) -> SeerAttention:
        """A recipe with gates distilled from the model's own attention on these inputs.

        The model runs once over each batch; the gates then learn for ``steps`` steps from what it showed
        (:func:`cenote.attention.seer_training.train_gates`).
        """
        from cenote.attention.seer_training import observe, train_gates

        host = Host.of(model)
        gates = self.new_gates(host, seed)
        examples = [observed for batch in batches for observed in observe(model, self, gates, batch)]
        train_gates(gates, examples, steps=steps, learning_rate=learning_rate, seed=seed)
        return self.with_gates(gates)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
