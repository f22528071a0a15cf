"""Small whole numbers packed to exactly their bits."""

from __future__ import annotations

import torch
from jaxtyping import Integer
from torch import Tensor


def pack_codes(codes: Integer[Tensor, "rows columns"], bits: int) -> Integer[Tensor, "rows bytes"]:
    """Codes below ``2^bits`` as bytes, ``ceil(columns / 8) * bits`` a row.

    A row is one stream of bits, least significant first: code ``c`` fills the bits ``c * bits`` to
    ``(c + 1) * bits - 1``, and bit ``b`` of the stream is bit ``b % 8`` of byte ``b // 8``. For 2 and 4 bits that is
    the usual packing of four and two neighbours into a byte. Rows are filled up with zeros to a multiple of eight.

    Raises:
        ValueError: bits outside of 1 to 8, or a code that does not fit.
    """
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must be from 1 to 8, got {bits}")
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= 2**bits):
        raise ValueError(f"codes of {bits} bits lie in 0..{2**bits - 1}, got {int(codes.min())}..{int(codes.max())}")
    rows, columns = codes.shape
    eights = torch.nn.functional.pad(codes.long(), (0, -columns % 8)).view(rows, -1, 8)
    words = (eights << (torch.arange(8, device=codes.device) * bits)).sum(-1)
    return ((words[..., None] >> (8 * torch.arange(bits, device=codes.device))) & 255).to(torch.uint8).flatten(1)


def unpack_codes(packed: Integer[Tensor, "rows bytes"], bits: int, columns: int) -> Integer[Tensor, "rows columns"]:
    """Undo :func:`pack_codes`; uint8.

    Raises:
        ValueError: a number of bytes that does not belong to ``columns`` codes.
    """
    expected = -(-columns // 8) * bits
    if packed.shape[1] != expected:
        raise ValueError(f"{columns} codes of {bits} bits take {expected} bytes a row, got {packed.shape[1]}")
    parts = packed.long().view(len(packed), -1, bits)
    words = (parts << (8 * torch.arange(bits, device=packed.device))).sum(-1)
    codes = (words[..., None] >> (bits * torch.arange(8, device=packed.device))) & (2**bits - 1)
    return codes.flatten(1)[:, :columns].to(torch.uint8)
