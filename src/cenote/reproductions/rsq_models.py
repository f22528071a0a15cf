"""Small trained language models, text to calibrate on and text to judge by, for the claims about RSQ."""

from __future__ import annotations

import copy
import gzip
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cenote.tuning import Importance, cut_sequences, quantize_rsq

STORIES_MODEL, STORIES_TEXT = "models/stories260K", "tiny_stories_slice/stories.txt.gz"
R_MIN = (0.3, 0.1, 0.02, 0.005)
"""Smallest weights that are tried on validation text."""


@dataclass(frozen=True)
class Subject:
    """A model and its text in three parts that do not overlap.

    Attributes:
        name: for claims.
        model: never changed; quantised copies are made of it.
        train: token ids to calibrate on.
        validation: to choose ``r_min`` by.
        test: to judge by.
        length: tokens of a sequence.
    """

    name: str
    model: Any
    train: Tensor
    validation: Tensor
    test: Tensor
    length: int = 256

    def quantized(self, bits: int, method: str, rotation: str, seed: int, sequences: int, r_min: float = 0.005) -> Any:
        """A quantised copy; the seed draws calibration sequences and the rotation."""
        model = copy.deepcopy(self.model)
        text = None if method == "rtn" else cut_sequences(self.train, self.length, sequences, seed)
        importance = Importance(r_min=r_min)
        quantize_rsq(model, text, bits, method=method, rotation=rotation, seed=seed, importance=importance)
        return model

    @torch.no_grad()
    def perplexity(self, model: Any, tokens: Tensor) -> float:
        """``exp`` of the mean loss over neighbouring windows of the length of a sequence."""
        losses = []
        for part in cut_sequences(tokens, self.length).split(8):
            logits = model(part).logits[:, :-1]
            losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten()) * len(part))
        return float((torch.stack(losses).sum() / (len(tokens) // self.length)).exp())


def embedded_subject() -> Subject:
    """The language model shipped with the package: calibrated on descriptions it knows, judged on ones it never saw."""
    from cenote.backbones.embedded_language import evaluation_text, load_embedded_language, training_descriptions

    model, tokenizer = load_embedded_language()
    train = tokenizer(training_descriptions(), return_tensors="pt")["input_ids"][0]
    held_out = tokenizer(evaluation_text(), return_tensors="pt")["input_ids"][0]
    cut = len(train) * 3 // 4
    return Subject("the embedded language model", model, train[:cut], train[cut:], held_out)


def stories_subject(data: Path) -> Subject | None:
    """stories260K and the stories at hand, nine to calibrate on, four to choose by and eight to judge by."""
    if not (data / STORIES_MODEL).is_dir() or not (data / STORIES_TEXT).is_file():
        return None
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(data / STORIES_MODEL).eval()
    tokenizer = AutoTokenizer.from_pretrained(data / STORIES_MODEL)
    text = gzip.decompress((data / STORIES_TEXT).read_bytes()).decode()
    stories = [
        torch.tensor([1, *tokenizer(story.strip(), add_special_tokens=False)["input_ids"]])
        for story in text.split("<|endoftext|>")
        if story.strip()
    ]
    train, validation, test = (torch.cat(part) for part in (stories[:9], stories[9:13], stories[13:]))
    return Subject("stories260K", model, train, validation, test)


def tuned_r_min(subject: Subject, bits: int, sequences: int, seed: int = 1000) -> float:
    """The ``r_min`` of the lowest perplexity on validation text, with a seed of its own."""
    tried = {
        r_min: subject.perplexity(
            subject.quantized(bits, "rsq", "residual", seed, sequences, r_min), subject.validation
        )
        for r_min in R_MIN
    }
    return min(tried, key=lambda r_min: tried[r_min])


@torch.no_grad()
def with_outliers(model: Any, factor: float, share: float, seed: int) -> Any:
    """A copy that computes the same with outlier channels: some inputs of ``o_proj`` and ``down_proj`` are ``factor``
    times smaller and their weights as many times larger.
    """
    model, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    for layer in model.base_model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        values = attention.v_proj.out_features
        chosen = torch.rand(values, generator=generator) < share
        gain = torch.where(chosen, factor, 1.0)
        attention.v_proj.weight.div_(gain[:, None])
        groups = attention.o_proj.in_features // values
        by_head = gain.view(-1, attention.head_dim).repeat_interleave(groups, 0).flatten()
        attention.o_proj.weight.mul_(by_head)
        gain = torch.where(torch.rand(mlp.up_proj.out_features, generator=generator) < share, factor, 1.0)
        mlp.up_proj.weight.div_(gain[:, None])
        mlp.down_proj.weight.mul_(gain)
    return model
