"""Training of EchoAtt's students with transformers' Trainer: distillation first, then continued training."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainingArguments

from cenote.files import write_whole
from cenote.ops.distillation import Direction
from cenote.tuning.echo_att_losses import WEIGHTS, distillation_losses

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class EchoAttStage:
    """How one stage trains: AdamW, linear warm-up, cosine to 0. Defaults that the paper names are the paper's.

    Attributes:
        steps: updates.
        batch_size: samples of a pass on each device; 8 unless given (the paper's update has 1024 of 2048 tokens).
        accumulation: passes of one update.
        lr: the highest rate.
        warmup: share of the steps in which the rate grows.
        weight_decay: of AdamW; the paper names none.
        clip: largest norm of the gradient.
        weights: of L_I, L_S and L_H; for distillation only, as is ``direction``.
        direction: of L_S; see :func:`~cenote.tuning.echo_att_losses.echo_att_losses`.
        seed: of the order of samples and of dropout.
    """

    steps: int
    batch_size: int = 8
    accumulation: int = 1
    lr: float = 1e-4
    warmup: float = 0.005
    weight_decay: float = 0.0
    clip: float = 1.0
    weights: tuple[float, float, float] = WEIGHTS
    direction: Direction = "reverse"
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.steps, self.batch_size, self.accumulation) < 1:
            raise ValueError(
                f"expected a step, a sample and a pass at least, got {self.steps}, {self.batch_size}, "
                f"{self.accumulation}"
            )
        if self.lr <= 0 or not 0 <= self.warmup < 1:
            raise ValueError(f"expected a positive lr and a warmup of 0 to 1, got {self.lr} and {self.warmup}")


@dataclass(frozen=True)
class EchoAttTraining:
    """What a stage did.

    Attributes:
        model: the student, trained in place, in eval mode.
        history: one row an update: ``step`` and ``loss``, and in distillation ``intermediate``, ``soft``, ``hard``.
        stage: as given.
    """

    model: PreTrainedModel
    history: tuple[dict[str, float], ...]
    stage: EchoAttStage

    def frame(self) -> pd.DataFrame:
        """The history as a table."""
        import pandas as pd

        return pd.DataFrame(list(self.history))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the model as transformers does, with ``echo_att_history.csv`` and ``echo_att_stage.json`` beside it."""
        import json

        self.model.save_pretrained(folder)
        write_whole(Path(folder) / "echo_att_stage.json", json.dumps(asdict(self.stage), indent=2) + "\n")
        write_whole(Path(folder) / "echo_att_history.csv", self.frame().to_csv(index=False))


def distill(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    data: Int[Tensor, "items tokens"] | Sequence[dict[str, Any]],
    stage: EchoAttStage,
    **arguments: Any,
) -> EchoAttTraining:
    """Stage 1: train the student in place on ``a L_I + b L_S + g L_H`` against the teacher, which stays as it is.

    Args:
        student: of :func:`cenote.integrations.echo_att_model.share_attention`; parameters that need no gradient stay.
        teacher: the model it was made of.
        data: token ids, or samples with ``input_ids`` of any length; shorter ones are padded behind and masked.
        stage: see there.
        **arguments: of :class:`transformers.TrainingArguments`, in place of ours (``bf16=True``, ``output_dir`` with
            ``save_strategy``, ...).

    Raises:
        ValueError: no data, models that do not belong together.
        FloatingPointError: a loss that is not finite.
        ImportError: no accelerate.
    """

    def losses(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        found = distillation_losses(model, teacher, batch, weights=stage.weights, direction=stage.direction)
        return {
            "loss": found.total, "intermediate": found.intermediate, "soft": found.soft, "hard": found.hard,
        }  # fmt: skip

    if teacher.device != student.device:
        raise ValueError(f"the teacher is on {teacher.device}, the student on {student.device}: expected one device")
    return _train(student, data, stage, losses, arguments)


def continue_training(
    student: PreTrainedModel,
    data: Int[Tensor, "items tokens"] | Sequence[dict[str, Any]],
    stage: EchoAttStage,
    **arguments: Any,
) -> EchoAttTraining:
    """Stage 2: train in place on the next-token cross-entropy of the text, over real tokens.

    Arguments and errors as for :func:`distill`.
    """

    def losses(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        labels = batch["input_ids"].masked_fill(~batch["attention_mask"].bool(), -100)
        return {"loss": model(**batch, labels=labels, use_cache=False).loss}

    return _train(student, data, stage, losses, arguments)


class _StageTrainer(Trainer):
    """transformers' trainer with a loss of ours, whose parts it remembers."""

    def __init__(self, losses: Any, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.losses, self.rows = losses, list[dict[str, float]]()
        # The loss is a mean of its pass: left to itself, the trainer would not divide it by the passes of an update.
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        found = self.losses(model, inputs)
        row = {name: value.item() for name, value in found.items()}
        if not math.isfinite(row["loss"]):
            raise FloatingPointError(f"the loss is {row['loss']} at step {self.state.global_step}: lower lr")
        self.rows.append({"step": self.state.global_step + 1, **row})
        return found["loss"]


def _train(student: PreTrainedModel, data: Any, stage: EchoAttStage, losses: Any, arguments: Any) -> EchoAttTraining:
    samples = [{"input_ids": row} for row in data] if isinstance(data, Tensor) else data
    if not len(samples):
        raise ValueError("expected a sample at least, got none")
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng():
        settings = {
            "output_dir": folder, "max_steps": stage.steps, "per_device_train_batch_size": stage.batch_size,
            "gradient_accumulation_steps": stage.accumulation, "learning_rate": stage.lr,
            "warmup_steps": round(stage.warmup * stage.steps), "lr_scheduler_type": "cosine",
            "weight_decay": stage.weight_decay, "max_grad_norm": stage.clip, "seed": stage.seed,
            "remove_unused_columns": False, "report_to": "none", "save_strategy": "no", "logging_strategy": "no",
            "disable_tqdm": True, "use_cpu": student.device.type == "cpu", "dataloader_pin_memory": False,
        }  # fmt: skip
        trainer = _StageTrainer(
            losses,
            model=student,
            args=TrainingArguments(**{**settings, **arguments}),
            train_dataset=samples,
            data_collator=_collate,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    student.eval()
    steps: dict[float, list[dict[str, float]]] = {}
    for row in trainer.rows:
        steps.setdefault(row["step"], []).append(row)
    history = tuple({name: fmean(row[name] for row in rows) for name in rows[0]} for rows in steps.values())
    return EchoAttTraining(student, history, stage)


def _collate(samples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Ids side by side, padded behind, and the mask of the real ones."""
    rows = [torch.as_tensor(sample["input_ids"]) for sample in samples]
    given = [sample.get("attention_mask") for sample in samples]
    real = [torch.ones_like(row) if m is None else torch.as_tensor(m) for m, row in zip(given, rows, strict=True)]
    pad = nn.utils.rnn.pad_sequence
    return {"input_ids": pad(rows, batch_first=True), "attention_mask": pad(real, batch_first=True)}
