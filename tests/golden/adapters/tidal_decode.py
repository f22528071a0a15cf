"""TidalDecode in a Llama: the prompt in one pass, then the given tokens one by one."""

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from cenote.attention import TidalDecode
from cenote.compress.teacher_forced import teacher_forced_logits
from cenote.ops.gather_attention import Positions
from golden.cases import Case

NAMES = {"top_k": "budget", "sparse_layer_start": "sparse_layer_start", "correction_layer": "correction_layer"}
SETTINGS = {"llama", "tidal", "prompt_len", "decode_steps"}


@torch.no_grad()
def run(case: Case) -> dict[str, Tensor]:
    if not case.target.startswith("LlamaForCausalLM"):
        raise ValueError(f"unknown target {case.target!r}")
    wrong = (set(case.config) - SETTINGS) | (set(case.config["tidal"]) ^ set(NAMES))
    if wrong:
        raise ValueError(f"unknown or missing settings {sorted(wrong)}")
    recipe = TidalDecode(**{NAMES[name]: value for name, value in case.config["tidal"].items()})
    model = LlamaForCausalLM(LlamaConfig(**case.config["llama"], attn_implementation="sdpa")).eval()
    missing, unexpected = model.load_state_dict(case.state, strict=False)
    if unexpected or set(missing) - ({"lm_head.weight"} if model.config.tie_word_embeddings else set()):
        raise ValueError(f"the model has no {unexpected} and misses {missing}")
    prompt = case.config["prompt_len"]
    tokens = prompt + case.config["decode_steps"]
    ids, mask, places = (case.inputs[name][:, :tokens] for name in ("input_ids", "attention_mask", "position_ids"))
    text = (ids.long(), mask.bool(), prompt, places.long())
    dense = teacher_forced_logits(model, *text)
    passes: list[dict[int, Positions]] = []
    with recipe(model) as session:
        hook = model.register_forward_hook(lambda *_: passes.append(dict(session.chosen)))
        logits = teacher_forced_logits(model, *text)
        hook.remove()
    selected = torch.zeros(len(passes) - 1, 2, len(ids), model.config.num_attention_heads, tokens, dtype=torch.uint8)
    for step, chosen in enumerate(passes[1:]):
        keys = prompt + step + 1
        for number, layer in enumerate(session.plan.layers("select")):
            # Where the budget covers the context every position is chosen, and nothing is worked out.
            sets = chosen[layer].to_mask(keys) if chosen else mask[:, None, :keys].bool()
            selected[step, number, :, :, :keys] = sets
    return {"dense_logits": dense, "logits": logits, "selected": selected}
