"""A Llama teacher, its student with shared attention maps, the similarity of the teacher's layers and the losses."""

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from cenote.attention.echo_att_similarity import layer_similarity
from cenote.integrations.echo_att_model import share_attention
from cenote.tuning.echo_att_losses import distillation_losses
from golden.cases import Case

SETTINGS = {"llama", "shared_layers", "loss_weights", "shared_form", "direction"}


@torch.no_grad()
def run(case: Case) -> dict[str, Tensor]:
    if not case.target.startswith("layer similarity"):
        raise ValueError(f"unknown target {case.target!r}")
    unknown = set(case.config) - SETTINGS
    if unknown:
        raise ValueError(f"unknown settings {sorted(unknown)}")
    teacher = LlamaForCausalLM(LlamaConfig(**case.config["llama"])).eval()
    missing, unexpected = teacher.load_state_dict(_part(case, "teacher."), strict=False)
    if unexpected or set(missing) - ({"lm_head.weight"} if teacher.config.tie_word_embeddings else set()):
        raise ValueError(f"the teacher has no {unexpected} and misses {missing}")
    form = case.config.get("shared_form", "probabilities")
    student = share_attention(teacher, case.config["shared_layers"], shared_form=form)
    changed = _part(case, "student.")
    _, unexpected = student.load_state_dict(changed, strict=False)
    if unexpected:
        raise ValueError(f"the student has no {unexpected}")
    batch = {name: value.long() for name, value in case.inputs.items()}
    losses = distillation_losses(
        student,
        teacher,
        batch,
        weights=tuple(case.config["loss_weights"]),
        direction=case.config.get("direction", "reverse"),
    )
    return {
        "teacher_logits": teacher(**batch).logits,
        "student_logits": student(**batch).logits,
        "similarity": layer_similarity(teacher, [batch]),
        "losses": torch.stack([losses.intermediate, losses.soft, losses.hard, losses.total]),
    }


def _part(case: Case, prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in case.state.items() if name.startswith(prefix)}
