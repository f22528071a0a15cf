"""What every method is measured on: a model, stretches of text, documents with planted facts, calibration batches."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from cenote.worlds.planted_facts import PlantedFacts, PlantedFactsBatch

EMBEDDED = "embedded"
TEXT_ROWS, CALIBRATION_ROWS = 4, 4


@dataclass(frozen=True)
class Inputs:
    """The same for every method.

    Attributes:
        text: stretches of the second part of the text, ``(rows, context)``.
        documents: with planted facts, by length; empty where the tokenizer or the context has no room for them.
        calibration: of the first part of the text, and other documents.
        notes: what could not be made, and why.
    """

    text: Int[Tensor, "rows context"]
    documents: dict[int, PlantedFactsBatch]
    calibration: list[dict[str, Tensor]]
    notes: tuple[str, ...]


def load_model(model: Any, tokenizer: Any = None, device: str = "cpu", dtype: str | None = None) -> tuple[Any, Any]:
    """A causal language model with its tokenizer: the embedded one, a transformers name or folder, or a model.

    Raises:
        ValueError: a model without a tokenizer, or a name that transformers cannot load.
    """
    if not isinstance(model, str | Path):
        if tokenizer is None:
            raise ValueError("a model that is given as an object needs its tokenizer beside it")
        return model.eval(), tokenizer
    wanted = None if dtype is None else _dtype(dtype)
    if str(model) == EMBEDDED:
        from cenote.backbones.embedded_language import load_embedded_language

        return load_embedded_language(dtype=wanted, device=device)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=wanted or "auto")
        tokenizer = AutoTokenizer.from_pretrained(model) if tokenizer is None else tokenizer
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"transformers cannot load a language model from {str(model)!r}: {error}") from error
    return loaded.to(device).eval(), tokenizer


def load_text(text: str | Path | None, data: str | None) -> tuple[str, str]:
    """The text and what to call it: a file, the items of a data set of texts, or prose that every machine has.

    Raises:
        ValueError: both given, a file that is not UTF-8, or data that are no texts.
    """
    if text is not None and data is not None:
        raise ValueError("give text or data, not both")
    if data is not None:
        from cenote.data import load_data

        loaded = load_data(data)
        if loaded.modality != "text":
            raise ValueError(f"{data} holds items of kind {loaded.modality}; compress measures on text")
        return "\n\n".join(str(loaded.test.items[i]) for i in range(len(loaded.test))), data
    if text is not None:
        try:
            return Path(text).read_text(encoding="utf-8"), Path(text).name
        except UnicodeDecodeError as error:
            raise ValueError(f"{text} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    from cenote.backbones.embedded_language import evaluation_text

    return evaluation_text(), "data set descriptions"


def make_inputs(
    tokenizer: Any, text: str, context: int, depths: Sequence[float], documents: int, seed: int, device: Any
) -> Inputs:
    """Cut the text and draw the documents; the first two fifths of the text are for calibration alone.

    Raises:
        ValueError: a text shorter than two contexts.
    """
    ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False))
    if len(ids) < 2 * context:
        raise ValueError(
            f"the text has {len(ids)} tokens; a context of {context} needs {2 * context}: give a longer text or a "
            "smaller context"
        )
    cut = max(context, 2 * len(ids) // 5)
    notes, found, learn = [], {}, [_stretches(ids[:cut], context, CALIBRATION_ROWS // 2, tokenizer)]
    lengths = [length for length in (context // 4, context // 2, context) if length >= 64]
    try:
        facts = PlantedFacts(tokenizer, filler=ids[cut:])
        for number, length in enumerate(lengths):
            batch = _documents(facts, length, list(depths) * documents, seed + 101 * number)
            if batch is not None:
                found[length] = batch
        other = _documents(PlantedFacts(tokenizer, filler=ids[:cut]), context, None, seed + 997)
        learn += [] if other is None else [other.input_ids]
        if not found:
            notes.append(f"no planted facts: documents of {context} tokens have no room for them")
    except ValueError as error:
        notes.append(f"no planted facts: {error}")
    calibration = [
        {"input_ids": rows.to(device), "attention_mask": torch.ones_like(rows, device=device)} for rows in learn
    ]
    return Inputs(_stretches(ids[cut:], context, TEXT_ROWS, tokenizer).to(device), found, calibration, tuple(notes))


def fingerprint(model: Any, tokenizer: Any, text: str) -> str:
    """A digest that changes with the weights, the tokenizer and the text."""
    digest = hashlib.sha256(text.encode())
    for name, value in model.state_dict().items():
        flat = value.detach().flatten()
        sample = flat[:: max(1, len(flat) // 4096)].float().cpu().contiguous()
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(sample.numpy().tobytes())
    digest.update(str(tokenizer.encode("The quick brown fox")).encode())
    return digest.hexdigest()[:32]


def _stretches(ids: Tensor, length: int, rows: int, tokenizer: Any) -> Tensor:
    """Evenly spaced stretches, each behind the beginning-of-text token where there is one."""
    bos = getattr(tokenizer, "bos_token_id", None)
    body = length - (bos is not None)
    starts = torch.linspace(0, len(ids) - body, rows).long()
    stretches = ids[starts[:, None] + torch.arange(body)]
    return stretches if bos is None else torch.cat((torch.full((rows, 1), bos), stretches), dim=1)


def _documents(facts: PlantedFacts, length: int, depths: list[float] | None, seed: int) -> PlantedFactsBatch | None:
    """Documents with as many facts as there is room for; ``None`` where two are too many."""
    rows = CALIBRATION_ROWS // 2 if depths is None else len(depths)
    for count in (8, 4, 2):
        try:
            return facts.batch(rows, length, count, depths, 1, seed)
        except ValueError:
            continue
    return None


def _dtype(name: str) -> torch.dtype:
    known = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if name not in known:
        raise ValueError(f"dtype must be one of {', '.join(known)}, got {name!r}")
    return known[name]
