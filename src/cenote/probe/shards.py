"""The shard file: a safetensors file with the tokens of consecutive items, without padding.

Tensors: ``offsets`` int64 ``(items + 1,)``; ``layer.<n>`` ``(tokens, dim)`` for every stored hidden state, item i being
rows ``offsets[i]`` to ``offsets[i + 1]``; ``pooled`` ``(items, pooled_dim)`` where the encoder has its own pooler. The
file is written here rather than by the safetensors library because its tensors arrive in pieces, one a batch: writing
them one after the other needs no second copy in memory.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from cenote.probe.files import Writable, write_atomically

Buffer = bytes | memoryview

CODES = {"I64": torch.int64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def write_shard(path: str, tensors: dict[str, Sequence[Tensor]]) -> tuple[int, str]:
    """Write tensors, each given as pieces to be joined along the first axis; returns byte size and SHA-256.

    ``offsets`` must come first: the other tensors then need no padding to be aligned.
    """
    codes = {dtype: code for code, dtype in CODES.items()}
    header: dict[str, Any] = {}
    position = 0
    for name, pieces in tensors.items():
        size = sum(piece.nbytes for piece in pieces)
        shape = [sum(len(piece) for piece in pieces), *pieces[0].shape[1:]]
        header[name] = {"dtype": codes[pieces[0].dtype], "shape": shape, "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    checksum, written = hashlib.sha256(), 0

    def write(file: Writable) -> None:
        nonlocal written
        head: list[Buffer] = [len(text).to_bytes(8, "little"), text]
        for data in chain(head, (_bytes(piece) for pieces in tensors.values() for piece in pieces)):
            checksum.update(data)
            file.write(data)
            written += len(data)

    write_atomically(path, write)
    return written, checksum.hexdigest()


def _bytes(piece: Tensor) -> memoryview:
    return piece.contiguous().view(torch.uint8).numpy().data.cast("B")


def map_file(path: str) -> Tensor:
    """A file's bytes as a tensor over its memory-mapped pages: nothing is read until it is used.

    The pages belong to the file, not to the process, so the system drops them when memory runs short. They must not
    be written to. No file handle stays open, so thousands of files can be mapped.
    """
    return torch.from_file(path, shared=False, size=os.path.getsize(path), dtype=torch.uint8)


def checksum(content: Tensor) -> str:
    """SHA-256 of mapped bytes."""
    return hashlib.sha256(content.numpy().data).hexdigest()


def parse(content: Tensor) -> dict[str, Tensor]:
    """The tensors of a mapped shard, as views."""
    start = 8 + int.from_bytes(content[:8].numpy().tobytes(), "little")
    header = json.loads(content[8:start].numpy().tobytes())
    tensors = {}
    for name, entry in header.items():
        low, high = entry["data_offsets"]
        tensors[name] = content[start + low : start + high].view(CODES[entry["dtype"]]).view(entry["shape"])
    return tensors
