"""SeerAttention's prefill gate: logits, chosen blocks, sparse attention, target and loss."""

import torch
from torch import Tensor

from cenote.attention.seer_gate import PrefillGate
from cenote.integrations.seer_checkpoints import gate_states
from cenote.ops.block_gate import block_target, choose_blocks, distillation_loss
from cenote.ops.block_sparse import block_sparse_attention
from cenote.ops.rotary import rotate_by
from golden.cases import Case

PREFILL = {
    "block_size", "head_dim", "gate_hidden_size", "num_attention_heads", "num_key_value_heads", "gate_type",
    "force_double", "rope_theta", "threshold", "nz_ratio", "last_block_dense",
}  # fmt: skip


@torch.no_grad()
def run(case: Case) -> dict[str, Tensor]:
    if case.case.startswith("prefill") and case.target.startswith("prefill"):
        return _prefill(case)
    raise ValueError(f"unknown case {case.case!r} of target {case.target!r}")


def _prefill(case: Case) -> dict[str, Tensor]:
    c, inputs = case.config, case.inputs
    unknown = (set(c) - PREFILL) | (set(inputs) - {"query", "key", "value", "cos", "sin", "block_cos", "block_sin"})
    if unknown:
        raise ValueError(f"unknown settings or inputs {sorted(unknown)}")
    size = c["block_size"]
    gate = PrefillGate(
        c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"], size, c["gate_hidden_size"],
        c["gate_type"], c["force_double"],
    )  # fmt: skip
    ((_, state),) = gate_states(case.state).items()
    gate.load_state_dict(state)
    query, key, value = (inputs[name].transpose(1, 2) for name in ("query", "key", "value"))
    logits = gate.score(*gate.pool(query, key), (inputs["block_cos"], inputs["block_sin"]))
    masks = {
        "threshold": choose_blocks(logits, threshold=c["threshold"], last_block_dense=c["last_block_dense"]),
        "nz_ratio": choose_blocks(logits, nz_ratio=c["nz_ratio"], last_block_dense=c["last_block_dense"]),
    }
    cos, sin = inputs["cos"].unsqueeze(1), inputs["sin"].unsqueeze(1)
    query, key = rotate_by(query, cos, sin), rotate_by(key, cos, sin)
    target = block_target(query, key, size)
    results = {
        "gate_logits": logits,
        "gate_scores": logits.softmax(dim=-1),
        "block_map": target,
        "distill_loss": distillation_loss(logits, target)[None],
    }
    for name, mask in masks.items():
        results[f"mask_{name}"] = mask
        results[f"attn_{name}"] = block_sparse_attention(query, key, value, mask, size).transpose(1, 2)
    return results
