"""The tiny language model shipped with the package, and others trained by the same tool."""

from __future__ import annotations

import importlib.resources
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from cenote.files import write_all

SHIPPED = Path(__file__).with_name("embedded_language.safetensors")
HELD_OUT_DESCRIPTIONS = ("breast_cancer", "diabetes", "olivetti_faces", "twenty_newsgroups")

# One token each in the shipped vocabulary, and not in the novels it was trained on: what planted facts are about.
_NAMES = (
    "Alvar Anouk Aziza Bodil Benno Bruna Caius Casimir Cedric Corvin Dagny Delphine Dorian Edda Egon Elspeth Enzo "
    "Fabian Farid Fiorella Gaspard Gerda Gideon Greta Hadrian Hedda Horst Ilka Imogen Ingrid Ivo Jarek Jasper Joris "
    "Juno Kaspar Katya Kenji Lambert Leif Linus Lorenz Magda Marlow Milo Nadia Nestor Ottilie Pavel Petra Quentin "
    "Ragna Rufus Sabine Selma Soren Tamsin Tibor Ulrich Vesna Viggo Willem Xenia Yorick"
)
NAMES = tuple(_NAMES.split())


def load_embedded_language(
    path: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Load the shipped language model, or another that ``tools/train_embedded_language.py`` wrote.

    The shipped one is a Llama of 8 layers, 96 channels and 6 query over 3 key-value heads, for up to 2048 tokens of a
    byte-level byte-pair vocabulary of 1024. It was trained on four public-domain novels, on a part of scikit-learn's
    data set descriptions and on :mod:`~cenote.worlds.planted_facts`, of whose questions (8 facts) it answers nearly all
    up to 512 tokens, about 95 % at 1024 and 80 % at 2048.

    Its training did not find looking back by itself: the heads of layers 0 and 3 started from weights set by hand for
    it (the tool's ``start_with_lookup``). A finding about *where* this model retrieves is partly a finding about that.

    Args:
        path: a ``.safetensors`` file with its ``.json`` (configuration and tokenizer) beside it, or a folder that holds
            ``embedded_language.safetensors``; ``None`` for the shipped one.
        dtype: of the weights; float32 unless given (they are stored in float16).
        device: where to put the model.

    Returns:
        The model in evaluation mode, and its tokenizer, which puts the beginning-of-text token in front.

    Raises:
        ValueError: no such file, or files that do not hold such a model.
    """
    file = SHIPPED if path is None else Path(path)
    if file.is_dir():
        file = file / SHIPPED.name
    settings = file.with_suffix(".json")
    for needed in (file, settings):
        if not needed.is_file():
            raise ValueError(
                f"an embedded language model is a .safetensors file with its .json beside it; there is no {needed}"
            )
    try:
        read: dict[str, Any] = json.loads(settings.read_text(encoding="utf-8"))
        tokenizer = make_tokenizer(Tokenizer.from_str(json.dumps(read["tokenizer"])), read["special_tokens"])
        model = LlamaForCausalLM(LlamaConfig(**read["config"]))
        state = {name: tensor.to(dtype or torch.float32) for name, tensor in load(file.read_bytes()).items()}
        missing, unexpected = model.load_state_dict(state, strict=False)
        if unexpected or set(missing) - {"lm_head.weight"}:
            raise ValueError(f"missing {sorted(missing)}, unexpected {sorted(unexpected)}")
    except Exception as error:  # tokenizers raises bare Exceptions
        raise ValueError(f"{file} and {settings.name} do not hold an embedded language model: {error}") from error
    moved: LlamaForCausalLM = torch.nn.Module.to(model, device, dtype or torch.float32)
    return moved.eval(), tokenizer


def save_embedded_language(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, path: str | os.PathLike[str]
) -> None:
    """Write weights (float16) to ``path``, a ``.safetensors`` file or a folder, and the ``.json`` beside them."""
    file = Path(path)
    if file.suffix != ".safetensors":
        file = file / SHIPPED.name
    state = {n: t.detach().half().cpu().contiguous() for n, t in model.state_dict().items() if n != "lm_head.weight"}
    special = {key: str(value) for key, value in tokenizer.special_tokens_map.items()}
    settings = {
        "config": model.config.to_diff_dict(),
        "special_tokens": special,
        "tokenizer": json.loads(tokenizer.backend_tokenizer.to_str()),
    }
    content = json.dumps(settings, ensure_ascii=False, separators=(",", ":")) + "\n"
    write_all(file.parent, {file.with_suffix(".json").name: content, file.name: save(state)})


def make_tokenizer(backend: Tokenizer, special_tokens: dict[str, str]) -> PreTrainedTokenizerFast:
    """A transformers tokenizer around ``backend``, padding on the left as generation needs."""
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, padding_side="left", clean_up_tokenization_spaces=False, **special_tokens
    )


def evaluation_text() -> str:
    """English prose on every machine that the shipped model never saw: some of scikit-learn's data set descriptions."""
    return "\n\n".join(description(name) for name in HELD_OUT_DESCRIPTIONS)


def training_descriptions() -> str:
    """The data set descriptions that the shipped model was trained on: all others."""
    return "\n\n".join(description(name) for name in description_names() if name not in HELD_OUT_DESCRIPTIONS)


def description_names() -> list[str]:
    """Names of the data sets that scikit-learn describes."""
    files = importlib.resources.files("sklearn.datasets.descr").iterdir()
    return sorted(file.name.removesuffix(".rst") for file in files if file.name.endswith(".rst"))


def description(name: str) -> str:
    """The text of ``sklearn/datasets/descr/<name>.rst``."""
    return importlib.resources.files("sklearn.datasets.descr").joinpath(f"{name}.rst").read_text(encoding="utf-8")
