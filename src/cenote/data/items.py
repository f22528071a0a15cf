"""Raw items, decoded when asked for."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from cenote.data.base import Items


class Unreadable(ValueError):
    """An item that cannot be decoded."""


def open_image(content: Any, folder: Path | None = None) -> Image.Image:
    """Open an image without decoding its pixels.

    Args:
        content: encoded bytes, a path, or ``{"bytes": ..., "path": ...}`` as the `datasets` library keeps images.
        folder: what relative paths start from.

    Raises:
        Unreadable: nothing there, or nothing that looks like an image.
    """
    if isinstance(content, dict):
        content = content.get("bytes") or content.get("path")
    if content is None:
        raise Unreadable("there is no image")
    if isinstance(content, Image.Image):
        return content
    try:
        if isinstance(content, bytes | bytearray | memoryview):
            return Image.open(io.BytesIO(content))
        path = Path(content)
        return Image.open(path if folder is None else folder / path)
    except FileNotFoundError as error:
        raise Unreadable(f"there is no file {error.filename!r}") from error
    except (
        Exception
    ) as error:  # image formats fail in their own ways: OSError, SyntaxError, struct.error, bomb warnings
        raise Unreadable(f"not a readable image ({error})") from error


def read_image(content: Any, folder: Path | None = None) -> Image.Image:
    """Decode an image whole, turned the way its camera held it; see :func:`open_image`."""
    image = open_image(content, folder)
    try:
        image.load()
        return ImageOps.exif_transpose(image)
    except Exception as error:
        raise Unreadable(f"not a readable image ({error})") from error


class ImageFiles:
    """Images in files."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Image.Image:
        return read_image(self.paths[index])

    def check(self, index: int) -> None:
        """Raise :class:`Unreadable` if even the head of the file is wrong."""
        with open_image(self.paths[index]):
            pass


class ColumnImages:
    """Images in an Arrow column: encoded bytes, or paths relative to ``folder``."""

    def __init__(self, column: Any, folder: Path | None) -> None:
        self.column = column
        self.folder = folder

    def __len__(self) -> int:
        return len(self.column)

    def __getitem__(self, index: int) -> Image.Image:
        return read_image(self.column[index].as_py(), self.folder)

    def check(self, index: int) -> None:
        """Raise :class:`Unreadable` if even the head of the image is wrong."""
        open_image(self.column[index].as_py(), self.folder)


class ColumnTexts:
    """Strings in an Arrow column."""

    def __init__(self, column: Any) -> None:
        self.column = column

    def __len__(self) -> int:
        return len(self.column)

    def __getitem__(self, index: int) -> str:
        text = self.column[index].as_py()
        if not isinstance(text, str) or not text.strip():
            raise Unreadable(
                "there is no text" if text is None or isinstance(text, str) else f"not a text but {text!r}"
            )
        return text

    def check(self, index: int) -> None:
        """Raise :class:`Unreadable` if there is no text."""
        self[index]


class ArrayImages:
    """Images held as one ``uint8`` array ``(items, height, width)`` or ``(items, height, width, 3)``."""

    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> Image.Image:
        return Image.fromarray(self.pixels[index])

    def check(self, index: int) -> None:
        """Arrays are always readable."""


class Chosen:
    """Some of the items, with a message that names the one that cannot be decoded."""

    def __init__(self, items: Items, index: np.ndarray, ids: Sequence[str], name: str) -> None:
        self.items, self.index, self.ids, self.name = items, index, ids, name

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: int) -> Any:
        try:
            return self.items[int(self.index[index])]
        except Unreadable as error:
            raise ValueError(f"cannot read {self.ids[index]} of {self.name}: {error}") from error
