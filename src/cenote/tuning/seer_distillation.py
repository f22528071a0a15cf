"""SeerAttention's gates trained with transformers' ``Trainer``: the frozen model's own attention is the teacher."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from cenote.attention.host import Host
from cenote.attention.seer_learning import GatedRecipe, GatedT
from cenote.attention.seer_training import gate_loss, observe

try:
    from transformers import Trainer, TrainingArguments, default_data_collator
except ImportError as error:
    raise ImportError(f"distillation needs transformers' Trainer: pip install 'cenote[text]' ({error})") from None


class GateDistiller(nn.Module):
    """What the trainer trains: the gates. The frozen model is no part of it, so it is neither trained nor saved.

    ``forward`` runs the model densely on a batch and gives ``{"loss": ...}``, ten times the sum over layers of
    ``KL(target || gate)``.

    Args:
        model: the frozen model, left as it is; it follows the gates from device to device.
        recipe: settings of the gates; its weights are where training begins, if it has any.
        reduction: ``"mean"`` over all entries as published, or ``"row"``, which does not shrink with the length.
        seed: of new weights.

    Raises:
        ValueError: an unknown reduction, or layers that the recipe cannot serve.
    """

    def __init__(self, model: nn.Module, recipe: GatedRecipe, reduction: str = "mean", seed: int = 0) -> None:
        super().__init__()
        if reduction not in ("mean", "row"):
            raise ValueError(f"reduction must be 'mean' or 'row', got {reduction!r}")
        host = Host.of(model)
        self._model = (model,)  # in a tuple, so that it does not become a part
        self.recipe, self.reduction = recipe, reduction
        self.gates = recipe.load_gates(host) if recipe.gates else recipe.new_gates(host, seed)
        self.gates.requires_grad_(True)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any) -> dict[str, Tensor]:
        batch = {"input_ids": input_ids, **inputs}
        if attention_mask is not None:
            batch["attention_mask"] = attention_mask
        seen = observe(self._model[0].to(input_ids.device), self.recipe, self.gates, batch)
        losses = [gate_loss(self.gates, observation, self.reduction) for observation in seen]
        return {"loss": sum(losses[1:], losses[0]) / len(losses)}

    def trained(self) -> GatedRecipe:
        """The recipe with the gates as they are now."""
        return self.recipe.with_gates(self.gates)


def distillation_arguments(output_dir: str | os.PathLike[str], **changes: Any) -> TrainingArguments:
    """The published recipe as arguments of the trainer: AdamW at 1e-3 without weight decay, 20 steps of warm-up, a
    cosine down to 0, one sequence a batch. ``max_steps`` and whatever else differs goes into ``changes``."""
    published: dict[str, Any] = {
        "learning_rate": 1e-3, "weight_decay": 0.0, "lr_scheduler_type": "cosine", "warmup_steps": 20,
        "per_device_train_batch_size": 1, "report_to": "none", "remove_unused_columns": False,
    }  # fmt: skip
    return TrainingArguments(output_dir=str(output_dir), **{**published, **changes})


def distill_gates(
    model: nn.Module,
    recipe: GatedT,
    train_dataset: Any,
    arguments: TrainingArguments,
    *,
    reduction: str = "mean",
    data_collator: Any = default_data_collator,
    resume_from_checkpoint: str | bool | None = None,
    **trainer: Any,
) -> GatedT:
    """Train gates on the frozen model and give the recipe with them, which is also saved in the output folder.

    Checkpoints hold gates, optimiser and schedule; training goes on from them as with any ``Trainer``.

    Args:
        model: a decoder that the recipe can serve; none of its weights changes.
        recipe: settings of the gates, and where they begin if it has weights.
        train_dataset: of items with ``input_ids`` and maybe ``attention_mask``.
        arguments: of the trainer, such as :func:`distillation_arguments`.
        reduction: ``"mean"`` as published or ``"row"``.
        data_collator: makes batches of items.
        resume_from_checkpoint: as ``Trainer.train`` takes it.
        **trainer: more arguments of ``Trainer``, such as ``callbacks``.

    Raises:
        ValueError: as :class:`GateDistiller`.
    """
    distiller = GateDistiller(model, recipe, reduction, arguments.seed)
    training = Trainer(
        model=distiller, args=arguments, train_dataset=train_dataset, data_collator=data_collator, **trainer
    )
    training.train(resume_from_checkpoint=resume_from_checkpoint)
    trained = recipe.with_gates(distiller.gates)
    if training.is_world_process_zero():
        assert arguments.output_dir is not None
        trained.save_pretrained(Path(arguments.output_dir))
    return trained
