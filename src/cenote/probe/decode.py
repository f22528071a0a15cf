"""Raw items decoded into batches, what cannot be decoded named."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from cenote.data.base import Items, Skipped


def named_items(items: Items | Sequence[Any], ids: Sequence[str] | None) -> list[str]:
    """A name for each item; their positions if not given.

    Raises:
        ValueError: no items, or another number of names.
    """
    names = [str(i) for i in range(len(items))] if ids is None else list(ids)
    if len(items) == 0 or len(names) != len(items):
        raise ValueError(
            f"expected at least one item and a name for each, got {len(items)} items and {len(names)} names"
        )
    return names


def decoded_batches(
    items: Items | Sequence[Any], names: Sequence[str], size: int, on_error: str, skipped: list[Skipped]
) -> Iterator[tuple[list[str], list[Any]]]:
    """Decode items one by one into full batches of names and items.

    Args:
        items: raw items.
        names: one an item.
        size: items a batch.
        on_error: what an item that cannot be decoded does: ``"raise"``, or ``"skip"``, be appended to ``skipped``.
        skipped: grows by what is left out.

    Raises:
        ValueError: ``size`` below 1, an unknown ``on_error``, an item that cannot be decoded (it is named), or none
            that can.
    """
    if size < 1:
        raise ValueError(f"batch_size must be at least 1, got {size}")
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error must be 'raise' or 'skip', got {on_error!r}")
    batch: list[tuple[str, Any]] = []
    for i, name in enumerate(names):
        try:
            batch.append((name, items[i]))
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            if on_error == "raise":
                raise ValueError(
                    f"cannot read {name}: {reason} (on_error='skip', --on-error skip, leaves such items out)"
                ) from error
            skipped.append(Skipped("input", name, reason))
        if len(batch) == size:
            yield [n for n, _ in batch], [item for _, item in batch]
            batch = []
    if batch:
        yield [n for n, _ in batch], [item for _, item in batch]
    if len(skipped) == len(names):
        raise ValueError(
            f"none of the {len(items)} items could be read; the first: {skipped[0].id}: {skipped[0].reason}"
        )
