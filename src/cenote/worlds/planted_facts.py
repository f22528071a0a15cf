"""Facts planted in running text and asked for at its end: can a language model find them, how deep, how far back?

A document is filler text in which sentences such as " The number of Corvin is 4821." stand at chosen depths; its end
asks for some of them (" The number of Corvin is") and the tokens of the answer are scored. Names and numbers are drawn
anew for every document, so nothing can be memorised: the only way to be right is to look the answer up, which is what
attention that leaves keys out puts at risk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cenote.backbones.embedded_language import NAMES, evaluation_text

QUESTION = " The number of {name} is"


@dataclass(frozen=True)
class PlantedFactsBatch:
    """Documents of one length with their questions.

    Attributes:
        input_ids: (documents, tokens), the questions' answers included; the last question's answer ends the document.
        answer_positions: (documents, questions, answer tokens), where in ``input_ids`` the answers stand; the token at
            position ``p`` is predicted by the logits at ``p - 1``.
        targets: (documents, questions, answer tokens), the tokens there.
        question_lengths: (documents, questions), tokens of the question in front of each answer.
        fact_positions: (documents, facts), where the sentence of each fact begins.
        asked: (documents, questions), which fact each question asks for.
        depths: (documents, questions), the share of the filler that stands in front of the asked fact, 0 to 1.
    """

    input_ids: Int[Tensor, "documents tokens"]
    answer_positions: Int[Tensor, "documents questions answer"]
    targets: Int[Tensor, "documents questions answer"]
    question_lengths: Int[Tensor, "documents questions"]
    fact_positions: Int[Tensor, "documents facts"]
    asked: Int[Tensor, "documents questions"]
    depths: Float[Tensor, "documents questions"]

    @property
    def prompts(self) -> Int[Tensor, "documents prompt"]:
        """The documents without their last answer: what a model is given to generate from."""
        return self.input_ids[:, : self.input_ids.shape[1] - self.targets.shape[2]]

    @property
    def chance(self) -> float:
        """How often one is right who sees the facts but not which of them is asked for: one over their number."""
        return 1 / self.fact_positions.shape[1]


@dataclass(frozen=True)
class PlantedFacts:
    """A seeded source of documents with planted facts, for any tokenizer.

    Args:
        tokenizer: of the model that will read the documents; a beginning-of-text token, if it has one, comes first.
        filler: what the facts are planted in, as text or token ids; by default
            :func:`~cenote.backbones.embedded_language.evaluation_text`. Every document takes another stretch of it
            (from the start again where the document is longer).
        names: what is asked for.
        digits: of the numbers.

    Raises:
        ValueError: empty filler, repeated names, no digits, or a tokenizer that joins the end of the question with the
            number behind it.
    """

    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    filler: str | Int[Tensor, " tokens"] | None = field(default=None, repr=False)
    names: tuple[str, ...] = field(default=NAMES, repr=False)
    digits: int = 4
    _filler: np.ndarray = field(init=False, repr=False)
    _questions: list[list[int]] = field(init=False, repr=False)
    _stop: list[int] = field(init=False, repr=False)
    _answer_length: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.digits < 1 or not self.names or len(set(self.names)) < len(self.names):
            raise ValueError(f"digits must be at least 1 and names differ, got {self.digits} and {self.names}")
        filler = evaluation_text() if self.filler is None else self.filler
        ids = self._encode(filler) if isinstance(filler, str) else filler.tolist()
        if not ids:
            raise ValueError("the filler is empty: planted facts need a text to stand in")
        object.__setattr__(self, "_filler", np.asarray(ids))
        object.__setattr__(self, "_questions", [self._encode(QUESTION.format(name=name)) for name in self.names])
        with_stop, without = self._encode("1."), self._encode("1")
        object.__setattr__(self, "_stop", with_stop[len(without) :])
        rng = np.random.default_rng(0)
        lengths = [len(self._answer(self._number(rng))) for _ in range(50)]
        object.__setattr__(self, "_answer_length", max(set(lengths), key=lengths.count))

    @property
    def longest_sentence(self) -> int:
        """Tokens of the longest sentence that states a fact."""
        return max(map(len, self._questions)) + self._answer_length + len(self._stop)

    def batch(
        self,
        batch_size: int,
        length: int,
        num_facts: int = 8,
        depth: float | Sequence[float] | None = None,
        num_questions: int = 1,
        seed: int = 0,
    ) -> PlantedFactsBatch:
        """Draw ``batch_size`` documents of exactly ``length`` tokens, answers included.

        Args:
            num_facts: planted in each document, each with another name and another number.
            depth: of the fact that the last question asks for, 0 = in front of all filler, 1 = behind it; one number,
                one for each document, or ``None`` for a random one. All other facts stand anywhere.
            num_questions: asked at the end of each document, about different facts.
            seed: the same seed gives the same documents.

        Raises:
            ValueError: more facts than names or numbers, more questions than facts, a depth outside [0, 1], or a
                length that leaves no room for the facts.
        """
        most = min(len(self.names), 10**self.digits - 10 ** (self.digits - 1))
        if batch_size < 1 or not 1 <= num_questions <= num_facts <= most:
            raise ValueError(
                f"need batch_size >= 1 and 1 <= num_questions <= num_facts <= {most}, "
                f"got {batch_size}, {num_questions} and {num_facts}"
            )
        depths = [depth] * batch_size if depth is None or isinstance(depth, float | int) else list(depth)
        if len(depths) != batch_size or any(d is not None and not 0 <= d <= 1 for d in depths):
            raise ValueError(f"depth must be one number in [0, 1] or {batch_size} of them, got {depth}")
        rng = np.random.default_rng(seed)
        rows = [self._document(rng, length, num_facts, d, num_questions) for d in depths]
        columns = [torch.as_tensor(np.asarray(column)) for column in zip(*rows, strict=True)]
        ids, positions, questions, facts, asked, shares = columns
        targets = ids.gather(1, positions.flatten(1)).view_as(positions)
        return PlantedFactsBatch(ids, positions, targets, questions, facts, asked, shares.float())

    def grid(
        self,
        documents: int,
        length: int,
        depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
        num_facts: int = 8,
        seed: int = 0,
    ) -> dict[float, PlantedFactsBatch]:
        """One batch of ``documents`` for each depth; filler, names and numbers differ from depth to depth."""
        return {d: self.batch(documents, length, num_facts, d, 1, seed + 7919 * i) for i, d in enumerate(depths)}

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False, verbose=False))

    def _number(self, rng: np.random.Generator) -> str:
        return str(rng.integers(10 ** (self.digits - 1), 10**self.digits))

    def _answer(self, number: str) -> list[int]:
        """The tokens of the number behind a question; they do not depend on which name is asked for."""
        question = self._questions[0]
        ids = self._encode(f"{QUESTION.format(name=self.names[0])} {number}")
        if ids[: len(question)] != question:
            raise ValueError("this tokenizer joins the question with its answer, so that the answer cannot be scored")
        return ids[len(question) :]

    def _facts(self, rng: np.random.Generator, count: int) -> list[tuple[list[int], list[int]]]:
        """Question and answer tokens of ``count`` facts: names differ, numbers differ and have equally many tokens."""
        numbers: dict[str, list[int]] = {}
        while len(numbers) < count:
            number = self._number(rng)
            answer = self._answer(number)
            if len(answer) == self._answer_length:
                numbers[number] = answer
        names = rng.choice(len(self.names), count, replace=False)
        return [(self._questions[n], answer) for n, answer in zip(names, numbers.values(), strict=True)]

    def _document(
        self, rng: np.random.Generator, length: int, num_facts: int, depth: float | None, num_questions: int
    ) -> tuple[list[int], list[list[int]], list[int], list[int], list[int], list[float]]:
        facts = self._facts(rng, num_facts)
        asked = list(range(num_questions))[::-1]  # fact 0 comes last: its depth is the one that was asked for
        start = [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]
        sentences = [question + answer + self._stop for question, answer in facts]
        room = length - len(start) - sum(map(len, sentences)) - sum(len(sentences[i]) for i in asked) + len(self._stop)
        if room < 0:
            raise ValueError(
                f"{num_facts} facts and {num_questions} questions need {length - room} tokens, got {length}"
            )
        gaps = rng.integers(0, room + 1, num_facts)
        if depth is not None:
            gaps[0] = round(depth * room)
        first = rng.integers(len(self._filler))
        filler = self._filler[(first + np.arange(room)) % len(self._filler)].tolist()

        ids, used, places = start, 0, [0] * num_facts
        for i in sorted(rng.permutation(num_facts), key=lambda i: gaps[i]):
            ids += filler[used : gaps[i]]
            used, places[i] = int(gaps[i]), len(ids)
            ids += sentences[i]
        ids += filler[used:]
        positions = []
        for i in asked:
            question, answer = facts[i]
            positions.append(list(range(len(ids) + len(question), len(ids) + len(question) + len(answer))))
            ids += sentences[i]
        ids = ids[:length]  # the full stop behind the last answer
        shares = [gaps[i] / room if room else 0.0 for i in asked]
        return ids, positions, [len(facts[i][0]) for i in asked], places, asked, shares


def answer_accuracy(
    logits: Float[Tensor, "documents tokens vocabulary"], batch: PlantedFactsBatch
) -> Bool[Tensor, "documents questions"]:
    """Which answers are right in every token when the correct tokens in front of each are given (teacher forcing)."""
    rows = torch.arange(len(logits), device=logits.device)[:, None, None]
    guesses = logits[rows, batch.answer_positions.to(logits.device) - 1].argmax(-1)
    return (guesses == batch.targets.to(logits.device)).all(-1)


@torch.no_grad()
def accuracy(model: PreTrainedModel | Float[Tensor, "documents tokens vocabulary"], batch: PlantedFactsBatch) -> float:
    """Share of the questions answered right in every token, teacher forced; takes a model or its logits."""
    logits: Tensor = model if isinstance(model, Tensor) else model(batch.input_ids.to(model.device)).logits
    return answer_accuracy(logits, batch).float().mean().item()


@torch.no_grad()
def generation_accuracy(model: PreTrainedModel, batch: PlantedFactsBatch) -> float:
    """Share of the documents whose last question the model answers right by greedy generation."""
    count = batch.targets.shape[2]
    prompts = batch.prompts.to(model.device)
    generated = cast(Any, model).generate(
        prompts, attention_mask=torch.ones_like(prompts), do_sample=False, min_new_tokens=count, max_new_tokens=count
    )
    return (generated[:, -count:].cpu() == batch.targets[:, -1].cpu()).all(-1).float().mean().item()


def look_up(batch: PlantedFactsBatch) -> Int[Tensor, "documents questions answer"]:
    """The best predictor: copy what followed the same question where it first stood in the document.

    It reads the tokens in front of each answer only, and is always right.
    """
    found = torch.empty_like(batch.targets)
    count = batch.targets.shape[2]
    for row, ids in enumerate(batch.input_ids):
        for q, place in enumerate(batch.answer_positions[row, :, 0].tolist()):
            size = int(batch.question_lengths[row, q])
            windows = ids[:place].unfold(0, size, 1)
            same = (windows == ids[place - size : place]).all(-1).nonzero()[0].item()
            found[row, q] = ids[int(same) + size : int(same) + size + count]
    return found
