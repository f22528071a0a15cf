"""sentence-transformers' trainer over stored tokens: items come by number instead of as texts."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from cenote.pooling.base import Pooling
from cenote.tuning.contrastive import info_nce
from cenote.tuning.embedding_examples import Examples, Negatives

try:
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.base.modules import InputModule, Module
    from transformers import PrinterCallback, TrainerCallback
except ImportError as error:
    raise ImportError(
        f"contrastive training needs sentence-transformers: pip install 'cenote[text]' ({error})"
    ) from None

Read = Callable[[Int[Tensor, "items"]], tuple[Tensor, Bool[Tensor, "items tokens"] | None]]
"""Item numbers to tokens (or the stack of hidden states) and mask."""


class StoredTokens(InputModule):
    """First module: item numbers as ``input_ids``, their tokens and mask come from where they are kept."""

    def __init__(self, read: Read) -> None:
        super().__init__()
        # In a tuple, so that a callable module does not become part of what is trained.
        self._read = (read,)

    def preprocess(self, inputs: Any, prompt: str | None = None, **options: Any) -> dict[str, Tensor]:
        return {"input_ids": torch.as_tensor(inputs)}

    def forward(self, features: dict[str, Any], **options: Any) -> dict[str, Any]:
        numbers = features["input_ids"]
        tokens, mask = self._read[0](numbers.cpu())
        if tokens.is_inference():  # a backbone's output, which autograd refuses
            tokens = tokens.clone()
        if mask is not None:
            mask = mask.to(numbers.device)
        return {**features, "tokens": tokens.to(numbers.device), "mask": mask}

    def save(self, output_path: str, *args: Any, **options: Any) -> None:
        raise NotImplementedError("tokens kept elsewhere are not saved: save the pooling")


class PooledTokens(Module):
    """Second module: the pooling under training."""

    def __init__(self, pooling: Pooling) -> None:
        super().__init__()
        self.pooling = pooling

    def forward(self, features: dict[str, Any], **options: Any) -> dict[str, Any]:
        return {**features, "sentence_embedding": self.pooling(features["tokens"], features["mask"])}

    def save(self, output_path: str, *args: Any, **options: Any) -> None:
        raise NotImplementedError("save the pooling itself")


class Collate:
    """Rows to one batch: every item once, and where queries, positives and negatives are among them.

    Args:
        examples: where queries and positives come from.
        hard: mined negatives of every row; random ones stand in where it has none.
        num_negatives: negatives a query.
        in_batch: whether documents of other rows count, so that related ones must be marked.
        seed: of the random choices.
    """

    valid_label_columns: tuple[str, ...] = ()

    def __init__(
        self, examples: Examples, hard: Negatives | None, num_negatives: int, in_batch: bool, seed: int
    ) -> None:
        self.examples, self.hard, self.num_negatives, self.in_batch = examples, hard, num_negatives, in_batch
        self.rng = np.random.default_rng(seed)

    def __call__(self, rows: list[dict[str, int]]) -> dict[str, Tensor]:
        numbers = np.array([row["row"] for row in rows])
        queries, positives = self.examples.draw(numbers, self.rng)
        negatives, valid = self.examples.negatives(queries, self.num_negatives, self.rng)
        if self.hard is not None:
            chosen, found = self.hard.items[numbers], self.hard.valid[numbers]
            negatives, valid = np.where(found, chosen, negatives), found | valid
        if not self.in_batch:
            some = valid.any(axis=1)
            if not some.any():
                raise ValueError("no document is wrong for any query of a batch: there is nothing to tell apart")
            queries, positives, negatives, valid = (x[some] for x in (queries, positives, negatives, valid))
        parts = [queries, positives, negatives.ravel()]
        items, places = np.unique(np.concatenate(parts), return_inverse=True)
        query, positive, negative = np.split(places, np.cumsum([len(p) for p in parts])[:-1])
        batch = {
            "input_ids": items, "query": query, "positive": positive,
            "negatives": negative.reshape(negatives.shape), "valid": valid,
        }  # fmt: skip
        if self.in_batch:
            batch["related"] = self.examples.related(queries[:, None], np.concatenate(parts[1:])[None])
        # The trainer hands what begins with one column's name to the loss together.
        return {f"items_{name}": torch.from_numpy(np.ascontiguousarray(x)) for name, x in batch.items()}


class ContrastiveLoss(nn.Module):
    """:func:`cenote.tuning.contrastive.info_nce` over a batch that holds every item once."""

    def __init__(self, model: nn.Module, temperature: float, in_batch: bool) -> None:
        super().__init__()
        self.model, self.temperature, self.in_batch = model, temperature, in_batch

    def forward(self, features: list[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        (batch,) = features
        vectors = self.model({"input_ids": batch["input_ids"]})["sentence_embedding"]
        return info_nce(
            vectors[batch["query"]], vectors[batch["positive"]], vectors[batch["negatives"]],
            temperature=self.temperature, in_batch=self.in_batch, negative_mask=batch["valid"],
            false_negatives=batch.get("related"),
        )  # fmt: skip


class _AfterStep(TrainerCallback):
    def __init__(self, act: Callable[[int], None]) -> None:
        self.act = act

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self.act(state.global_step)


class _QuietTrainer(SentenceTransformerTrainer):
    """Without a model card, which would describe a model that is not kept."""

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        pass


def parameter_groups(pooling: Pooling, lr: float, query_factor: float, weight_decay: float) -> list[dict[str, Any]]:
    """Groups of an optimiser: learned queries at ``query_factor`` times the rate; no decay on vectors and on what the
    pooling names in ``no_weight_decay_parameters``."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in pooling.named_parameters():
        if parameter.requires_grad:
            rate = lr * query_factor if name in pooling.query_parameters else lr
            spared = parameter.ndim < 2 or name in pooling.no_weight_decay_parameters
            groups.setdefault((rate, 0.0 if spared else weight_decay), []).append(parameter)
    return [{"params": group, "lr": rate, "weight_decay": decay} for (rate, decay), group in groups.items()]


def train_stage(
    pooling: Pooling,
    read: Read,
    collate: Collate,
    *,
    steps: int,
    batch_size: int,
    groups: list[dict[str, Any]],
    temperature: float,
    warmup: float,
    seed: int,
    after_step: Callable[[int], None],
) -> None:
    """One stage of contrastive training, in place: AdamW, linear warm-up and decay, gradients clipped at norm 1.

    ``after_step(n)`` is called behind step n. Nothing is logged, reported or kept on disk.
    """
    device = next(pooling.parameters()).device
    model = SentenceTransformer(modules=[StoredTokens(read), PooledTokens(pooling)], device=str(device))
    with tempfile.TemporaryDirectory() as folder:
        arguments = SentenceTransformerTrainingArguments(
            output_dir=folder, max_steps=steps, per_device_train_batch_size=batch_size, seed=seed,
            warmup_steps=int(warmup * steps), lr_scheduler_type="linear", use_cpu=device.type == "cpu",
            dataloader_pin_memory=False, dataloader_drop_last=len(collate.examples) >= batch_size,
            logging_strategy="no", save_strategy="no", report_to="none", disable_tqdm=True,
        )  # fmt: skip
        if device.type == "cuda":
            arguments._n_gpu = 1  # several would be used in parallel threads, which cannot share one reader
        trainer = _QuietTrainer(
            model=model, args=arguments, data_collator=collate,  # type: ignore[arg-type]
            train_dataset=Dataset.from_dict({"row": np.arange(len(collate.examples))}),
            loss=ContrastiveLoss(model, temperature, collate.in_batch),
            optimizers=(torch.optim.AdamW(groups), None),  # type: ignore[arg-type]
            callbacks=[_AfterStep(after_step)],
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    pooling.to(device)
