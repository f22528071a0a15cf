"""PoNet: small networks from scratch on the film reviews of SST-2."""

from __future__ import annotations

import re
from collections import Counter
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from cenote.mixing.base import MixerContext
from cenote.mixing.metaformer import MetaFormer

PAD, CLS, SEP, UNKNOWN, WORDS = range(5)
LENGTH, DIM, BATCH, EPOCHS = 48, 64, 64, 4


class ReviewModel(nn.Module):
    """Words and positions through two blocks with a mixer; the answer is read at the class token."""

    def __init__(self, vocabulary: int, mixer: str) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(vocabulary, DIM), nn.Embedding(LENGTH, DIM)
        for table in (self.words, self.positions):
            nn.init.normal_(table.weight, std=0.1)  # type: ignore[arg-type]
        self.stack = MetaFormer(DIM, 2, mixer, options={"num_heads": 4}, dropout=0.2)
        self.dropout, self.head = nn.Dropout(0.3), nn.Linear(DIM, 2)

    def forward(self, ids: Tensor) -> Tensor:
        tokens = self.dropout(self.words(ids) + self.positions.weight[: ids.shape[1]])
        context = MixerContext(special_mask=(ids == CLS) | (ids == SEP))
        return self.head(self.dropout(self.stack(tokens, ids != PAD, context)[:, 0]))


@cache
def read_reviews(path: Path) -> tuple[dict[str, tuple[Tensor, Tensor]], int]:
    """Ids ``(texts, 48)`` and labels of each part, and the size of the vocabulary (words seen twice in training)."""
    import pandas as pd

    table = pd.read_parquet(path)
    column = next(name for name in ("text", "sentence") if name in table.columns)
    split = [re.findall(r"[a-z0-9']+|[^\sa-z0-9']", text.lower()) for text in table[column]]
    counts = Counter(word for words, part in zip(split, table["split"], strict=True) if part == "train"
                     for word in words)  # fmt: skip
    ids = {word: WORDS + place for place, word in enumerate(w for w, n in counts.items() if n > 1)}
    rows = [[CLS, *(ids.get(word, UNKNOWN) for word in words[: LENGTH - 2]), SEP] for words in split]
    whole = torch.tensor([row + [PAD] * (LENGTH - len(row)) for row in rows])
    labels = torch.tensor(table["label"].to_numpy()).long()
    parts = {part: torch.tensor((table["split"] == part).to_numpy()) for part in ("train", "test")}
    return {part: (whole[chosen], labels[chosen]) for part, chosen in parts.items()}, WORDS + len(ids)


def review_accuracy(mixer: str, path: Path, seed: int, epochs: int = EPOCHS) -> float:
    """Test accuracy in per cent after so many epochs of AdamW with a linear decay."""
    parts, vocabulary = read_reviews(path)
    ids, labels = parts["train"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ReviewModel(vocabulary, mixer).train()
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
        batches = [part for _ in range(epochs) for part in torch.randperm(len(ids)).split(BATCH)]
        for number, chosen in enumerate(batches):
            for group in optimiser.param_groups:
                group["lr"] = 1e-3 * (1 - number / len(batches))
            text = ids[chosen]
            text = text[:, : int((text != PAD).sum(dim=1).max())]
            loss = nn.functional.cross_entropy(model(text), labels[chosen])
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
    model.eval()
    with torch.no_grad():
        answers = torch.cat([model(part).argmax(dim=1) for part in parts["test"][0].split(500)])
    return 100 * float((answers == parts["test"][1]).double().mean())
