"""Language models on which sharing of attention maps can be watched, their texts, and what is measured."""

from __future__ import annotations

import gzip
import itertools
import random
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from cenote.attention import EchoAtt
from cenote.backbones.embedded_language import evaluation_text, load_embedded_language
from cenote.inspection.attention_similarity import AttentionSimilarity, attention_similarity_of_layers
from cenote.worlds.characters import CharacterText
from cenote.worlds.planted_facts import PlantedFacts, accuracy
from cenote.worlds.training import fit_sequences

BOOKS = "books/moby_dick.txt.gz"
STORIES = "models/stories260K/model.safetensors"
STORY_TEXT = "tiny_stories_slice/stories.txt.gz"
SHAKESPEARE = "tiny_shakespeare/input.txt.gz"


@dataclass(frozen=True)
class Subject:
    """A trained model and its texts, each ``(items, tokens)``.

    Attributes:
        judged: what losses are measured on; no model was trained on it.
        read: what layers are chosen on.
        train: what students learn from, ``None`` where there is nothing of the teacher's own kind.
    """

    model: Any
    judged: Tensor
    read: Tensor
    train: Tensor | None = None

    @cached_property
    def similarity(self) -> AttentionSimilarity:
        """Of the layers on what there is to read."""
        return attention_similarity_of_layers(self.model, [{"input_ids": part} for part in self.read.split(8)])


def embedded(seed: int, data_dir: Path | None = None, length: int = 128, items: int = 24) -> Subject:
    """The shipped language model; with the novels it was trained on, judged on the last 5 % it never saw."""
    model, _ = load_embedded_language()
    generator = torch.Generator().manual_seed(seed)

    def drawn(rows: Tensor, count: int) -> Tensor:
        return rows[torch.randperm(len(rows), generator=generator)[:count]]

    if data_dir is None or not (data_dir / BOOKS).is_file():
        rows = drawn(_stretches(evaluation_text(), length), 2 * items)
        return Subject(model, rows[:items], rows[items:])
    learnt, held_out = _novels((data_dir / BOOKS).parent, length)
    unseen = drawn(held_out, items)
    train = drawn(learnt, 3000)
    return Subject(model, unseen, train[:items], train[items:])


@cache
def _novels(folder: Path, length: int) -> tuple[Tensor, Tensor]:
    """Stretches of the first 95 % of each novel, and of the rest."""
    novels = [_text(path) for path in sorted(folder.glob("*.txt.gz"))]
    cuts = [(text, round(0.95 * len(text))) for text in novels]
    learnt, held_out = ("\n\n".join(parts) for parts in zip(*((t[:cut], t[cut:]) for t, cut in cuts), strict=True))
    return _stretches(learnt, length), _stretches(held_out, length)


def _stretches(text: str, length: int) -> Tensor:
    _, tokenizer = load_embedded_language()
    ids = torch.tensor(tokenizer(text, verbose=False, add_special_tokens=False)["input_ids"])
    return ids[: len(ids) // length * length].view(-1, length)


def stories(data_dir: Path, length: int = 128) -> Subject:
    """A published model of 260 thousand parameters and 5 layers, and stories of its kind."""
    folder = (data_dir / STORIES).parent
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(_text(data_dir / STORY_TEXT), return_tensors="pt", verbose=False)["input_ids"][0]
    rows = ids[: len(ids) // length * length].view(-1, length)
    half = len(rows) // 2
    return Subject(model, rows[half:], rows[:half])


def shakespeare(seed: int, data_dir: Path, steps: int, length: int = 64, layers: int = 6) -> Subject:
    """A Llama of 6 layers and 64 channels trained on the first 90 % of tiny Shakespeare, letter by letter."""
    world = CharacterText.from_file(data_dir / SHAKESPEARE, length=length)
    test = CharacterText(world.text, length=length, part="test")
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=world.vocabulary, hidden_size=64, intermediate_size=192, num_hidden_layers=layers,
        num_attention_heads=4, max_position_embeddings=4 * length, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    fit_sequences(model, world, steps, batch=32, lr=3e-3, seed=seed, forward=lambda x: model(x, use_cache=False).logits)
    train = world.sample(4000, seed + 10_000).inputs
    return Subject(model.eval(), test.sample(128, seed).inputs, train[:32], train[32:])


@dataclass(frozen=True)
class Measured:
    """What a model does on the judged text.

    Attributes:
        loss: cross-entropy of the next token, nats.
        right: share of next tokens that come first.
    """

    loss: float
    right: float


@torch.no_grad()
def measure(model: Any, texts: Tensor) -> Measured:
    """Means over all next tokens."""
    losses, right = [], []
    for part in texts.split(16):
        logits, targets = model(part, use_cache=False).logits[:, :-1], part[:, 1:]
        losses.append(F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none"))
        right.append((logits.argmax(-1) == targets).flatten())
    return Measured(torch.cat(losses).mean().item(), torch.cat(right).float().mean().item())


def damage(subject: Subject, shared: tuple[int, ...], dense: float) -> float:
    """Nats that the loss rises when these layers share, without training."""
    with EchoAtt(shared_layers=shared)(subject.model):
        return measure(subject.model, subject.judged).loss - dense


def random_sets(layers: int, count: int, most: int, seed: int) -> list[tuple[int, ...]]:
    """``most`` different sets of ``count`` layers that may share, or all of them where there are no more."""
    every = list(itertools.combinations(range(1, layers), count))
    return every if len(every) <= most else random.Random(seed).sample(every, most)


def retrieval(subject: Subject, shared: tuple[int, ...], seed: int, documents: int, length: int = 384) -> float:
    """Share of planted facts that the embedded model finds, in per cent."""
    _, tokenizer = load_embedded_language()
    batch = PlantedFacts(tokenizer).batch(documents, length, seed=seed)
    with EchoAtt(shared_layers=shared)(subject.model):
        return 100 * accuracy(subject.model, batch)


def _text(path: Path) -> str:
    return gzip.decompress(path.read_bytes()).decode("utf-8")
