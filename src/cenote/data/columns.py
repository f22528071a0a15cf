"""Which column of a table is what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from cenote.data.source import near
from cenote.types import Modality

IMAGE_NAMES = ("image", "img", "images", "picture", "photo", "image_bytes", "image_path", "image_file")
AUDIO_NAMES = ("audio", "speech", "wav", "clip", "sound", "recording", "audio_bytes", "audio_path", "audio_file",
               "wav_path", "wav_file", "clip_path")  # fmt: skip
TEXT_NAMES = ("text", "sentence", "content", "document", "review", "question", "query", "utterance", "body", "title")
PATH_NAMES = ("path", "file", "file_name", "filename", "filepath", "file_path")
LABEL_NAMES = ("label", "labels", "target", "targets", "class", "category", "intent", "fine_label", "coarse_label", "y",
               "label_name", "score", "rating")  # fmt: skip
SPLIT_COLUMNS = ("split", "partition", "subset")


class Columns(NamedTuple):
    """The columns that matter."""

    modality: Modality
    item: str
    label: str
    split: str | None
    label_name: str | None


def choose_columns(
    features: Mapping[str, Any],
    name: str,
    image_column: str | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
    split_column: str | None = None,
    audio_column: str | None = None,
) -> Columns:
    """The columns asked for, and the usual names for the rest.

    Args:
        features: the table's columns, as the `datasets` library describes them.
        name: of the table, for messages.
        image_column, audio_column, text_column: one of them, or none to have it guessed.
        label_column: guessed if not given.
        split_column: guessed if not given; ``""`` to take the table as undivided.

    Raises:
        ValueError: no such column, or nothing to guess from; the message lists the columns.
    """
    columns = list(features)
    items: dict[Modality, str | None] = {"image": image_column, "audio": audio_column, "text": text_column}
    for asked in (*items.values(), label_column, split_column):
        if asked and asked not in features:
            raise ValueError(
                f"{name} has no column {asked!r}: its columns are {', '.join(columns)}{near(asked, columns)}"
            )
    if sum(map(bool, items.values())) > 1:
        given = ", ".join(f"{modality}_column={column!r}" for modality, column in items.items() if column)
        raise ValueError(f"give one of image, audio and text column, not both ({given})")
    if split_column is None:
        split_column = _first(columns, SPLIT_COLUMNS)
    if label_column is None:
        label_column = _first(columns, LABEL_NAMES)
    if label_column is None:
        raise ValueError(
            f"cannot tell which column of {name} is the label (label_column): its columns are {', '.join(columns)}"
        )
    modality, item = _item_column(features, items)
    if item is None or modality is None:
        raise ValueError(
            f"cannot tell which column of {name} is the image (image_column) or the text (text_column) or the audio "
            f"(audio_column): its columns are {', '.join(columns)}"
        )
    readable = next((c for c in (f"{label_column}_name", f"{label_column}_text") if c in features), None)
    return Columns(modality, item, label_column, split_column or None, readable)


def _item_column(
    features: Mapping[str, Any], asked: Mapping[Modality, str | None]
) -> tuple[Modality | None, str | None]:
    """What was asked for; else a declared image or audio; else the usual names of images, audio, texts, paths."""
    for modality, column in asked.items():
        if column:
            return modality, column
    declared: dict[str, Modality] = {"Image": "image", "Audio": "audio"}
    for column, feature in features.items():
        if type(feature).__name__ in declared:
            return declared[type(feature).__name__], column
    usual: dict[Modality, tuple[str, ...]] = {"image": IMAGE_NAMES, "audio": AUDIO_NAMES, "text": TEXT_NAMES}
    for modality, names in usual.items():
        found = _first(list(features), names)
        if found is not None:
            return modality, found
    path = _first(list(features), PATH_NAMES)
    return ("image", path) if path is not None else (None, None)


def _first(columns: Sequence[str], names: Sequence[str]) -> str | None:
    lower = {column.lower(): column for column in reversed(columns)}
    return next((lower[name] for name in names if name in lower), None)
