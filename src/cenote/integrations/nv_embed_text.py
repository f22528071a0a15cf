"""Texts behind an instruction, as decoders that embed read them: begin of sequence, instruction, text, end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from cenote.backbones.bidirectional import instruction_mask


def query_instruction(task: str) -> str:
    """``"Instruct: {task}\\nQuery: "``, the form of NV-Embed's instructions. Passages have none, ``""``."""
    return f"Instruct: {task}\nQuery: "


class Row(NamedTuple):
    """One text in tokens.

    Attributes:
        ids: token numbers, without padding.
        instruction: how many of them are the instruction's, begin of sequence not counted.
    """

    ids: list[int]
    instruction: int


class InstructedTokenizer:
    """``instruction + text`` through a tokenizer, the end-of-sequence token appended.

    What the tokenizer puts in front (begin of sequence) stays; an end that it appends itself is not doubled; a text
    that is too long loses its own end, not the end-of-sequence token. Masks are made from lengths, never from token
    ids, since padding with the end-of-sequence token is usual.

    Args:
        tokenizer: of transformers. It is set to cut long rows on the right: on the left the instruction would go.
        max_length: most tokens of a row.
        exact: how many tokens count as the instruction. ``True``: those that end within it, by their place in the
            text; a token that reaches from the instruction into the text is text. ``False``, as published: as many as
            the instruction gives by itself, counted from the begin of sequence on, so that its last one is pooled.
        mask_instruction: leave the instruction out of the pooling.
        add_eos: append the end-of-sequence token.
        padding_side: where rows are filled up; the result does not depend on it.

    Raises:
        ValueError: a tokenizer without an end-of-sequence token.
    """

    def __init__(
        self,
        tokenizer: Any,
        max_length: int,
        *,
        exact: bool = True,
        mask_instruction: bool = True,
        add_eos: bool = True,
        padding_side: Literal["left", "right"] = "right",
    ) -> None:
        if padding_side not in ("left", "right"):
            raise ValueError(f"padding_side must be 'left' or 'right', got {padding_side!r}")
        if add_eos and tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no end-of-sequence token to append")
        tokenizer.truncation_side = "right"
        self.tokenizer, self.max_length, self.exact = tokenizer, max_length, exact
        self.mask_instruction, self.add_eos, self.padding_side = mask_instruction, add_eos, padding_side
        first = tokenizer("a")["input_ids"][:1]
        self.bos = tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id]
        self.pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)

    def rows(self, texts: Sequence[str], instruction: str = "", max_length: int | None = None) -> list[Row]:
        """Tokens of every text behind one instruction.

        Raises:
            TypeError: texts that are not strings.
            ValueError: a text of which nothing is left, because the instruction takes all ``max_length`` tokens.
        """
        for text in texts:
            if not isinstance(text, str):
                raise TypeError(f"expected texts, got {type(text).__name__}")
        limit = max_length or self.max_length
        room = limit - self.add_eos
        if room < 1 + self.bos:
            raise ValueError(f"max_length must leave room for a token of the text, got {limit}")
        if not len(texts):
            return []
        fast = self.tokenizer.is_fast
        found = self.tokenizer(
            [instruction + text for text in texts], truncation=True, max_length=room, return_offsets_mapping=fast
        )
        alone = len(self.tokenizer(instruction, add_special_tokens=False)["input_ids"]) if instruction else 0
        rows = []
        for number, (text, ids) in enumerate(zip(texts, found["input_ids"], strict=True)):
            if self.add_eos and ids and ids[-1] == self.tokenizer.eos_token_id:
                ids = ids[:-1]
            ends = [end for _, end in found["offset_mapping"][number][self.bos : len(ids)]] if fast else None
            inside = alone if ends is None else next((i for i, e in enumerate(ends) if e > len(instruction)), len(ends))
            left = len(ids) - self.bos - inside
            ids = [*ids, self.tokenizer.eos_token_id] if self.add_eos else list(ids)
            counted = (inside if self.exact else alone) if instruction else 0
            dropped = counted + (self.bos if self.exact and counted else 0)
            if len(ids) <= dropped or (instruction and text.strip() and left < 1):
                raise ValueError(
                    f"nothing is left of the text {text[:60]!r} behind an instruction of {alone} tokens: at most "
                    f"{limit} fit in a row"
                )
            rows.append(Row(ids, counted))
        return rows

    def collate(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """``input_ids``, ``attention_mask`` and ``pool_mask``, each ``(rows, tokens)``; the masks are boolean."""
        width = max(len(row.ids) for row in rows)
        ids = torch.full((len(rows), width), self.pad)
        mask = torch.zeros(len(rows), width, dtype=torch.bool)
        for i, row in enumerate(rows):
            place = slice(0, len(row.ids)) if self.padding_side == "right" else slice(width - len(row.ids), width)
            ids[i, place], mask[i, place] = torch.tensor(row.ids), True
        pool = mask
        if self.mask_instruction:
            pool = instruction_mask(mask, [row.instruction for row in rows], exact=self.exact, bos=self.bos)
        return {"input_ids": ids, "attention_mask": mask, "pool_mask": pool}
