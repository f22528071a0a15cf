"""SeerAttention: a learned gate picks the blocks of a prompt's attention map that are computed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from cenote.attention.block_prefill import BlockPrefill, Scorer
from cenote.attention.host import Host
from cenote.attention.seer_gate import PrefillGate
from cenote.attention.seer_learning import GatedRecipe
from cenote.ops.block_gate import parse_gate_type


@dataclass(frozen=True)
class SeerAttention(BlockPrefill, GatedRecipe):
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

    def scorer(self, host: Host, layers: list[int]) -> Scorer:
        gates = self.load_gates(host)
        return lambda prompt: gates[str(prompt.layer)](*prompt.unrotated, prompt.rotary)
