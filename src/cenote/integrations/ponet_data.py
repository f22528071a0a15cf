"""Data for PoNet: pairs for the sentence structure objective, masked batches, and long texts cut into sentences."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FOLLOWS, SWAPPED, ELSEWHERE = 0, 1, 2
"""Labels of the sentence structure objective: B follows A, A and B change places, B is from another chunk."""

Sentence = Sequence[int]
Example = dict[str, Any]


def sentence_pairs(
    documents: Iterable[Sequence[Sentence]],
    *,
    cls_id: int,
    sep_id: int,
    max_length: int = 512,
    short_chance: float = 0.1,
    seed: int = 0,
) -> list[Example]:
    """Pairs ``CLS A SEP B SEP`` for pre-training, one for each chunk of consecutive sentences.

    Sentences of a document are collected until they fill a row (or, in a share of ``short_chance``, a random shorter
    length); a random point between two of them parts A from B; then each of the three labels has a third of the
    chance. Where a pair is too long, tokens leave the longer half one by one, from its front or back at random. Each
    sentence is a segment, and so is each special token.

    A chunk has two sentences or more, so a text never becomes a pair with itself: what would be a single sentence is
    joined to its neighbour. (The official builder takes such a sentence twice.) A document of one sentence can only be
    paired with another chunk; without any other it is left out.

    Args:
        documents: each a sequence of sentences, each a sequence of token ids without special tokens.
        cls_id, sep_id: of the tokenizer.
        max_length: most tokens of a row, special ones included.
        short_chance: share of chunks that are cut shorter.
        seed: of all draws.

    Returns:
        One dict a pair, of lists ``input_ids``, ``token_type_ids`` (0 to the first separator, then 1), ``segment_ids``,
        ``special_mask``, and ``next_sentence_label``.

    Raises:
        ValueError: rows too short for a token on either side.
    """
    room = max_length - 3
    if room < 2:
        raise ValueError(f"max_length must be at least 5 (three special tokens and two others), got {max_length}")
    rng = random.Random(seed)
    chunks = [chunk for document in documents for chunk in _chunks(document, room, short_chance, rng)]
    pairs = []
    for number, chunk in enumerate(chunks):
        label = rng.randrange(3) if len(chunks) > 1 else FOLLOWS
        if len(chunk) == 1:
            if len(chunks) == 1:
                continue
            label = ELSEWHERE
        cut = rng.randint(1, max(1, len(chunk) - 1))
        first, second = chunk[:cut], chunk[cut:]
        if label == ELSEWHERE:
            other = chunks[(number + rng.randint(1, len(chunks) - 1)) % len(chunks)]
            second = other[rng.randint(min(1, len(other) - 1), len(other) - 1) :]
        if label == SWAPPED:
            first, second = second, first
        pairs.append(_pair(first, second, room, cls_id, sep_id, rng) | {"next_sentence_label": label})
    return pairs


def _chunks(document: Sequence[Sentence], room: int, short_chance: float, rng: random.Random) -> list[list[Sentence]]:
    """Runs of consecutive sentences of two or more, or the whole of a document of one."""
    chunks: list[list[Sentence]] = []
    current: list[Sentence] = []

    def draw() -> int:
        return rng.randint(2, room) if rng.random() < short_chance else room

    target = draw()
    for sentence in document:
        if len(sentence) == 0:
            continue
        current.append(sentence)
        if len(current) > 1 and sum(map(len, current)) >= target:
            chunks.append(current)
            current, target = [], draw()
    if len(current) == 1 and chunks:
        chunks[-1] = chunks[-1] + current
    elif current:
        chunks.append(current)
    return chunks


def _pair(
    first: Sequence[Sentence], second: Sequence[Sentence], room: int, cls_id: int, sep_id: int, rng: random.Random
) -> Example:
    halves = [[(token, number) for number, s in enumerate(half) for token in s] for half in (first, second)]
    spare = len(halves[0]) + len(halves[1]) - room
    bounds = [[0, len(half)] for half in halves]
    for _ in range(spare):
        longer = bounds[0] if bounds[0][1] - bounds[0][0] > bounds[1][1] - bounds[1][0] else bounds[1]
        if rng.random() < 0.5:
            longer[0] += 1
        else:
            longer[1] -= 1
    ids, segments, types, special = [cls_id], [0], [0], [True]
    for kind, (half, (start, stop)) in enumerate(zip(halves, bounds, strict=True)):
        kept = half[start:stop]
        names = {number: segments[-1] + 1 + place for place, number in enumerate(dict.fromkeys(n for _, n in kept))}
        ids += [token for token, _ in kept] + [sep_id]
        segments += [names[number] for _, number in kept]
        segments.append(segments[-1] + 1)
        types += [kind] * (len(kept) + 1)
        special += [False] * len(kept) + [True]
    return {"input_ids": ids, "token_type_ids": types, "segment_ids": segments, "special_mask": special}


def encode_sentences(sentences: Sequence[Sentence], *, cls_id: int, sep_id: int, max_length: int = 4096) -> Example:
    """One text ``CLS sentences SEP`` for fine-tuning: segment 0 is CLS, each sentence one more, SEP the last.

    A text that is too long loses its end but keeps the separator (the official code cuts that off, too).

    Raises:
        ValueError: rows too short for a token between the special ones.
    """
    if max_length < 3:
        raise ValueError(f"max_length must be at least 3, got {max_length}")
    full = [(token, number) for number, s in enumerate((s for s in sentences if len(s)), 1) for token in s]
    kept = full[: max_length - 2]
    last = kept[-1][1] if kept else 0
    return {
        "input_ids": [cls_id, *(token for token, _ in kept), sep_id],
        "segment_ids": [0, *(number for _, number in kept), last + 1],
        "special_mask": [True, *[False] * len(kept), True],
    }


@dataclass(frozen=True)
class PoNetCollator:
    """Pads rows into a batch and, for pre-training, masks tokens as BERT does.

    Of the tokens that are not special a share is asked for, at least one a row: 80 % of them become the mask token,
    10 % a random word, 10 % stay. Every batch draws anew, where the official code stores five copies of the data with
    different masks.

    Attributes:
        pad_id: fills rows up, on the right.
        mask_id: the mask token; ``None`` masks nothing.
        words: ids that a random word is drawn from: every one that is no special token.
        mask_chance: share of the tokens that is asked for.
    """

    pad_id: int
    mask_id: int | None = None
    words: Sequence[int] = ()
    mask_chance: float = 0.15

    def __post_init__(self) -> None:
        if self.mask_id is not None and (not self.words or not 0 < self.mask_chance <= 1):
            raise ValueError(
                f"masking needs words to draw from and a mask_chance in (0, 1], got {len(self.words)} words and "
                f"{self.mask_chance}"
            )

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Tensors of :class:`cenote.integrations.ponet.PoNetForPreTraining`'s names; other fields are stacked."""
        rows = [name for name in ("input_ids", "token_type_ids", "segment_ids", "special_mask") if name in examples[0]]
        batch = {name: _padded([e[name] for e in examples], self.pad_id * (name == "input_ids")) for name in rows}
        lengths = torch.tensor([len(e["input_ids"]) for e in examples])
        batch["attention_mask"] = (torch.arange(batch["input_ids"].shape[1]) < lengths[:, None]).long()
        for name in ("next_sentence_label", "label", "labels"):
            if name in examples[0]:
                batch["labels" if name == "label" else name] = torch.tensor([e[name] for e in examples])
        if self.mask_id is not None:
            batch["input_ids"], batch["labels"] = self._mask(batch, self.mask_id)
        return batch

    def _mask(self, batch: Mapping[str, Tensor], mask_id: int) -> tuple[Tensor, Tensor]:
        """Input with masks, and what stood there (-100 elsewhere)."""
        ids, plain = batch["input_ids"], batch["attention_mask"].bool() & ~batch["special_mask"].bool()
        count = (plain.sum(dim=1, keepdim=True) * self.mask_chance).round().clamp_min(1)
        # The first ones of a random order in which the others come last.
        rank = torch.rand(ids.shape).masked_fill(~plain, 2.0).argsort(dim=1).argsort(dim=1)
        asked = (rank < count) & plain
        fate = torch.rand(ids.shape)
        masked = torch.where(asked & (fate < 0.8), torch.full_like(ids, mask_id), ids)
        drawn = torch.as_tensor(self.words)[torch.randint(len(self.words), ids.shape)]
        masked = torch.where(asked & (fate >= 0.9), drawn, masked)
        return masked, ids.masked_fill(~asked, -100)


def _padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[*map(int, row), *[value] * (longest - len(row))] for row in rows])
