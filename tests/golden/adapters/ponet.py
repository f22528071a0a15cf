"""PoNet: the mixer with its guard on and off, the Long Range Arena form on given maps, and the pre-training model."""

import torch
from torch import Tensor

from cenote.mixing.base import MixerContext
from cenote.mixing.ponet import PoNet
from cenote.ops.masked import masked_mean, zero_padding
from cenote.ops.ponet import fuse_pools, global_aggregation, local_pool, segment_pool
from cenote.ops.segments import equal_segments
from golden.cases import Case


@torch.no_grad()
def run(case: Case) -> dict[str, Tensor]:
    target, _, _ = case.target.partition("(")
    runners = {"PoNetSelfAttention": mixer, "PoNetAttention": lra, "PoNetForPreTraining": model}
    if target not in runners:
        raise ValueError(f"unknown target {case.target!r}")
    return runners[target](case)


def mixer(case: Case) -> dict[str, Tensor]:
    mix = PoNet.from_reference(case.state, **case.config).eval()
    given = case.inputs
    tokens, mask = given["hidden_states"], given["attention_mask"].bool()
    context = MixerContext(segment_ids=given["segment_ids"], special_mask=given["special_mask"].bool())
    return {"context": mix(tokens, mask, context), "global_probs": mix.pools(tokens, mask, context).overall.weights}


def lra(case: Case) -> dict[str, Tensor]:
    unknown = set(case.config) - {"num_head", "head_dim", "segment_num"}
    if unknown:
        raise ValueError(f"unknown settings {sorted(unknown)}")
    given, heads = case.inputs, case.config["num_head"]
    mask = given["attention_mask"].bool()
    query, key, gate = (given[name].transpose(1, 2).flatten(2) for name in ("q", "k", "o"))
    # The published form, in which padding counts into the length of the segments.
    ids = equal_segments(mask.shape[1], case.config["segment_num"], batch=len(mask))
    overall = global_aggregation(masked_mean(query, mask), key, heads, mask).vector
    mixed = fuse_pools(gate, overall, segment_pool(given["segment"], ids, mask), local_pool(given["local"], mask))
    return {"context": zero_padding(mixed, mask)}


def model(case: Case) -> dict[str, Tensor]:
    from cenote.integrations.ponet import PoNetForPreTraining
    from cenote.integrations.ponet_config import PoNetConfig

    known = PoNetConfig().to_dict()
    unknown = set(case.config) - set(known)
    if unknown:
        raise ValueError(f"unknown settings {sorted(unknown)}")
    host = PoNetForPreTraining(PoNetConfig(**case.config)).eval()
    lost = host.load_state_dict(case.state, strict=False)
    tied = set(host.all_tied_weights_keys)
    if lost.unexpected_keys or set(lost.missing_keys) - tied:
        raise ValueError(f"keys that do not fit: {lost}")
    host.tie_weights()
    given = dict(case.inputs)
    # The published form, in which padding in front counts into the positions.
    given["position_ids"] = torch.arange(given["input_ids"].shape[1]).expand_as(given["input_ids"])
    out = host(**given, output_hidden_states=True)
    return {
        "embeddings": out.hidden_states[0],
        "last_hidden_state": out.hidden_states[-1],
        "pooler_output": host.ponet(**given).pooler_output,
        "mlm_logits": out.prediction_logits,
        "sso_logits": out.seq_relationship_logits,
    }
