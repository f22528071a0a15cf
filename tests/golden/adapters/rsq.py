"""RSQ: GPTQ with the weighted Hessian, the importance of tokens, and the rotation."""

from dataclasses import replace

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from cenote.ops.gptq import WeightedHessian, gptq, normalize_importance
from cenote.ops.quantizer import GridSettings, round_to_nearest
from cenote.ops.token_importance import expand_sequences
from cenote.tuning.rsq_importance import RULES, Importance
from cenote.tuning.rsq_layers import run_layer
from cenote.tuning.rsq_rotation import fuse_norms, rotate_model
from golden.cases import Case


@torch.no_grad()
def run(case: Case) -> dict[str, Tensor]:
    if case.target.startswith("GPTQ"):
        return _gptq(case)
    if case.target.startswith("token importance"):
        return _importance(case)
    if case.target.startswith("norm fusion"):
        return _rotation(case)
    raise ValueError(f"unknown target {case.target!r}")


def _known(case: Case, *names: str) -> dict:
    if unknown := set(case.config) - set(names):
        raise ValueError(f"unknown settings {sorted(unknown)}")
    return case.config


def _gptq(case: Case) -> dict[str, Tensor]:
    # min_value is that of the importance, which comes ready.
    config = _known(case, "bits", "sym", "mse_clip", "blocksize", "percdamp", "groupsize", "act_order", "static_groups",
                    "min_value", "max_value")  # fmt: skip
    group = config.get("groupsize", -1)
    grid = GridSettings(config["bits"], config["sym"], config["mse_clip"], None if group == -1 else group)
    how = {"block_size": config["blocksize"], "damping": config["percdamp"], "act_order": config["act_order"]}
    how["static_groups"] = config.get("static_groups", False)
    weight, inputs = case.inputs["weight"], case.inputs["inputs"]
    weighted, plain = (WeightedHessian(inputs.shape[-1]) for _ in range(2))
    for x, w in zip(inputs, normalize_importance(case.inputs["importance"], dtype=torch.float32), strict=True):
        weighted.add(x, w)
        plain.add(x)
    rsq = gptq(weight, weighted.value, grid, **how).quantized
    # The official quantiser keeps what it used last; a symmetric one counts its levels from 0.
    energy = weighted.value.diagonal()
    order = energy.masked_fill(energy == 0, 1).argsort(descending=True)
    last = rsq.group[order[-1] if config["act_order"] else -1]
    return {
        "hessian": weighted.value,
        "hessian_unweighted": plain.value,
        "weight": rsq.dequantize(),
        "weight_unweighted": gptq(weight, plain.value, grid, **how).quantized.dequantize(),
        # The official round-to-nearest knows no groups.
        "weight_rtn": round_to_nearest(weight, replace(grid, group_size=None)).dequantize(),
        "scale": rsq.scale[:, [last]],
        "zero": rsq.zero[:, [last]] - (grid.zero_code if grid.symmetric else 0),
    }


def _importance(case: Case) -> dict[str, Tensor]:
    config = _known(case, "llama", "min_value", "max_value", "chunk_rules", "expand_factor")
    model = LlamaForCausalLM(LlamaConfig(**config["llama"])).eval()
    model.load_state_dict(case.state, strict=False)
    x, y = case.inputs["hidden_states"][None], case.inputs["layer_output"][None]
    received = run_layer(model, 0, {"inputs_embeds": x}, attention=True, output=False).received
    ids = torch.arange(x.shape[1])[None]
    seen = {"received": received, "y": y, "ids": ids, "counts": case.inputs["token_frequency"]}
    rules = [rule for rule in RULES if rule != "equal"]
    settings = {"r_min": config["min_value"], "r_max": config["max_value"]}
    results = {rule: Importance(rule, **settings).weights(x, **seen)[0] for rule in rules}
    results |= {f"chunks_{rule}": Importance(rule).weights(x)[0] for rule in config["chunk_rules"]}
    return {
        **results,
        "attention_received": received[0],
        "expanded_ids": expand_sequences(ids, config["expand_factor"]),
    }


def _rotation(case: Case) -> dict[str, Tensor]:
    config = _known(case, "llama", "center_embeddings")
    model = LlamaForCausalLM(LlamaConfig(**config["llama"])).eval()
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    missing, unexpected = model.load_state_dict(case.state, strict=False)
    if set(missing) - tied or unexpected:
        raise ValueError(f"missing weights {missing}, unknown weights {unexpected}")
    ids, center = case.inputs["input_ids"], config["center_embeddings"]
    results = {"logits_original": model(ids).logits}
    fuse_norms(model, center_embeddings=center)
    results["logits_fused"] = model(ids).logits
    rotate_model(model, case.inputs["Q"], "full")
    results |= {f"rotated.{name}": value for name, value in model.state_dict().items()}
    return results | {"logits_rotated": model(ids).logits}
