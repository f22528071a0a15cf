"""SeerAttention's gates: logits, chosen blocks, sparse attention, target and loss of both variants."""

import torch
from torch import Tensor, nn

from cenote.attention.compressed_keys import CompressedKeys
from cenote.attention.seer_decode import block_positions
from cenote.attention.seer_gate import DecodeGate, PrefillGate
from cenote.integrations.seer_checkpoints import gate_states
from cenote.ops.block_gate import MASKED, block_target, choose_blocks, distillation_loss
from cenote.ops.block_sparse import block_sparse_attention
from cenote.ops.decode_gate import block_scores, choose_decode_blocks, decode_gate_logits, decode_target
from cenote.ops.gather_attention import gather_attention
from cenote.ops.rotary import rotate_by
from golden.cases import Case

PREFILL = {
    "block_size", "head_dim", "gate_hidden_size", "num_attention_heads", "num_key_value_heads", "gate_type",
    "force_double", "rope_theta", "threshold", "nz_ratio", "last_block_dense",
}  # fmt: skip
DECODE = {
    "block_size", "head_dim", "gate_hidden_size", "num_attention_heads", "num_key_value_heads", "k_pooling_type",
    "q_head_pooling_type", "use_qk_norm", "use_rope", "rope_theta", "sparsity_method", "token_budget", "threshold",
    "loss_slice_ratio", "completed_block_position", "prompt_len", "decode_steps",
}  # fmt: skip


@torch.no_grad()
def run(case: Case) -> dict[str, Tensor]:
    if case.case.startswith("prefill") and case.target.startswith("prefill"):
        return _prefill(case)
    if case.case.startswith("decode") and "decode" in case.target:
        return _decode(case)
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
        name: choose_blocks(logits, **{name: c[name]}, last_block_dense=c["last_block_dense"])
        for name in ("threshold", "nz_ratio")
        if c[name] is not None
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


def _decode(case: Case) -> dict[str, Tensor]:
    c, inputs = case.config, case.inputs
    unknown = (set(c) - DECODE) | (set(inputs) - {"query", "key", "value", "attention_mask", "cos", "sin"})
    if unknown or c["sparsity_method"] not in ("token_budget", "threshold"):
        raise ValueError(f"unknown settings or inputs {sorted(unknown)} or method {c['sparsity_method']!r}")
    size, prompt, steps = c["block_size"], c["prompt_len"], c["decode_steps"]
    gate = DecodeGate(
        c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"], size, c["gate_hidden_size"],
        c["k_pooling_type"], c["q_head_pooling_type"], c["use_qk_norm"], c.get("use_rope", True),
    )  # fmt: skip
    ((_, state),) = gate_states(case.state).items()
    gate.load_state_dict(state)
    query, key, value = (inputs[name].transpose(1, 2) for name in ("query", "key", "value"))
    rotary = (inputs["cos"], inputs["sin"])
    cos, sin = (part.unsqueeze(1) for part in rotary)
    turned, turned_key = rotate_by(query, cos, sin), rotate_by(key, cos, sin)
    # Published blocks lie on the padded grid, and those that hold padding alone are not there.
    mask = inputs["attention_mask"].bool()
    blocks = -(-(prompt + steps) // size)
    there = nn.functional.pad(mask, (0, blocks * size - mask.shape[1])).unflatten(1, (blocks, size)).any(dim=2)

    def at(first: int, last: int) -> tuple[Tensor, Tensor]:
        return rotary[0][:, first:last], rotary[1][:, first:last]

    compressed = CompressedKeys(gate, c["completed_block_position"])
    compressed.extend(key[:, :, :prompt], at(0, prompt))
    results = {"prefill_k_compressed": compressed.keys(int(compressed.blocks().max())).transpose(1, 2).clone()}
    scores, masks, outputs = [], [], []
    threshold = c["threshold"] if c["sparsity_method"] == "threshold" else None
    for held in range(prompt + 1, prompt + steps + 1):
        new = slice(held - 1, held)
        compressed.extend(key[:, :, new], at(held - 1, held))
        count = int(compressed.blocks().max())
        score = block_scores(
            gate.queries(query[:, :, new], at(held - 1, held)), compressed.keys(count), there[:, :count]
        )
        score = score.squeeze(2)
        how = {"budget": max(c["token_budget"] // size, 1), "threshold": threshold}
        chosen = choose_decode_blocks(score, there[:, :count], **how)
        positions = block_positions(chosen, size, held).with_visible(mask[:, :held])
        past = slice(0, held)
        outputs.append(
            gather_attention(turned[:, :, new], turned_key[:, :, past], value[:, :, past], positions).transpose(1, 2)
        )
        for kept, part in ((scores, score), (masks, choose_decode_blocks(score, there[:, :count], **how, first=False))):
            kept.append(nn.functional.pad(part, (0, blocks - count)))
    results["gate_scores"], results["block_mask"] = torch.stack(scores), torch.stack(masks)
    results["attn"] = torch.cat(outputs, dim=1).transpose(0, 1).unsqueeze(2).flatten(1, 2)
    first = [x[:, ::size] for x in rotary]
    results["train_gate_logits"] = decode_gate_logits(
        gate.queries(query, rotary), gate.keys(key, (first[0], first[1])), size
    ).masked_fill(~there[:, None, None], MASKED)
    results["train_target"] = decode_target(turned, turned_key, size, mask=mask)
    results["train_loss"] = distillation_loss(
        results["train_gate_logits"], results["train_target"], drop=c["loss_slice_ratio"]
    )[None]
    return results
