"""PoNet: masked words and sentence structure, on generated stories or on novels."""

from __future__ import annotations

import gzip
import math
import random
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from cenote.integrations.ponet import PoNetConfig, PoNetForPreTraining
from cenote.integrations.ponet_data import PoNetCollator, sentence_pairs

PAD, CLS, SEP, MASK, UNKNOWN, WORDS = range(6)
"""Ids in front, and the first word's."""
TOPICS, STAGES, OWN = 8, 3, 6

Documents = list[list[list[int]]]


class Outcome(NamedTuple):
    """What pre-training reached on documents that it never saw.

    Attributes:
        words: cross-entropy of the masked words in nats.
        unigram: what the frequencies of the words in training give on the same words.
        structure: accuracy of the sentence structure objective in per cent.
    """

    words: float
    unigram: float
    structure: float


def stories(count: int, seed: int) -> tuple[Documents, int]:
    """Documents of six sentences of four to seven words, and the size of the vocabulary.

    A word is one of the document's topic, one of the stage that the story has reached (begin, middle, end), or follows
    from the word before: so masked words can be guessed, halves that change places can be told, and so can a half from
    another story.
    """
    rng = random.Random(seed)
    vocabulary = WORDS + (TOPICS + STAGES) * OWN
    documents = []
    for _ in range(count):
        topic = rng.randrange(TOPICS)
        document: list[list[int]] = []
        for number in range(6):
            stage = TOPICS + number * STAGES // 6
            sentence: list[int] = []
            for _ in range(rng.randint(4, 7)):
                kind = rng.random()
                if sentence and kind < 0.3:
                    group, place = divmod(sentence[-1] - WORDS, OWN)
                    sentence.append(WORDS + group * OWN + (place + 1) % OWN)
                else:
                    sentence.append(WORDS + (topic if kind < 0.7 else stage) * OWN + rng.randrange(OWN))
            document.append(sentence)
        documents.append(document)
    return documents, vocabulary


def novels(folder: Path, most: int = 2000) -> tuple[Documents, int]:
    """Paragraphs of five sentences of the novels in a folder, in their most frequent words; others are unknown."""
    texts = [gzip.decompress(path.read_bytes()).decode().lower() for path in sorted(folder.glob("*.txt.gz"))]
    books = [[re.findall(r"[a-z]+", part) for part in re.split(r"[.!?;]+", text)] for text in texts]
    books = [[sentence for sentence in book if len(sentence) > 1] for book in books]
    counts = Counter(word for book in books for sentence in book for word in sentence)
    ids = {word: WORDS + place for place, (word, _) in enumerate(counts.most_common(most))}
    whole = [[[ids.get(word, UNKNOWN) for word in sentence] for sentence in book] for book in books]
    return [book[n : n + 5] for book in whole for n in range(0, len(book) - 4, 5)], WORDS + len(ids)


def pre_train(
    documents: Documents,
    vocabulary: int,
    seed: int,
    steps: int,
    *,
    dim: int = 32,
    max_length: int = 48,
    batch: int = 32,
) -> Outcome:
    """Two layers from scratch, AdamW with a linear warm-up and decay; a tenth of the documents is kept for the test."""
    order = random.Random(seed).sample(range(len(documents)), len(documents))
    held_out = len(documents) // 10
    build = {"cls_id": CLS, "sep_id": SEP, "max_length": max_length, "seed": seed}
    test = sentence_pairs([documents[i] for i in order[:held_out]], **build)
    train = sentence_pairs([documents[i] for i in order[held_out:]], **build)
    collate = PoNetCollator(PAD, MASK, range(WORDS, vocabulary))
    settings = PoNetConfig(
        vocab_size=vocabulary, hidden_size=dim, num_hidden_layers=2, num_attention_heads=2, intermediate_size=4 * dim,
        max_position_embeddings=max_length, hidden_dropout_prob=0.0, pad_token_id=PAD, special_token_ids=[CLS, SEP],
        initializer_range=0.1,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = PoNetForPreTraining(settings).train()
        optimiser = torch.optim.AdamW(model.parameters(), lr=4e-3)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda s: min((s + 1) / (0.1 * steps), 1 - s / steps))
        for _ in range(steps):
            chosen = torch.randint(len(train), (batch,)).tolist()
            loss = model(**collate([train[i] for i in chosen])).loss
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
        return _judge(model.eval(), collate(train), [collate(test[i : i + 200]) for i in range(0, len(test), 200)])


@torch.no_grad()
def _judge(model: PoNetForPreTraining, train: dict, batches: list[dict]) -> Outcome:
    # Frequencies of the words that training asks for, one added to each so that none is 0.
    counts = torch.bincount(train["labels"][train["labels"] >= 0], minlength=model.config.vocab_size) + 1.0
    frequencies = (counts / counts.sum()).log()
    words, plain, right = [], [], []
    for given in batches:
        out = model(**given)
        asked = given["labels"] >= 0
        words.append(F.cross_entropy(out.prediction_logits[asked], given["labels"][asked], reduction="none"))
        plain.append(-frequencies[given["labels"][asked]])
        right.append(out.seq_relationship_logits.argmax(dim=1) == given["next_sentence_label"])
    mean = [float(torch.cat(each).double().mean()) for each in (words, plain, right)]
    assert all(math.isfinite(value) for value in mean)
    return Outcome(mean[0], mean[1], 100 * mean[2])
