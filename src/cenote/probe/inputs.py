"""Unlabelled inputs named on a command line: files and folders of images or sounds, texts, files of texts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cenote.data.audio import SoundFiles, sound_files
from cenote.data.folder import image_files
from cenote.data.items import ImageFiles
from cenote.types import Modality

TABLE_SEPARATORS = {".csv": ",", ".tsv": "\t"}


def read_inputs(
    inputs: Sequence[str], modality: Modality, column: str | None = None
) -> tuple[ImageFiles | SoundFiles | list[str], list[str]]:
    """Items and a name for each.

    For images and sounds every input is a file or a folder, which is searched to the bottom. For text it is a ``.csv``
    or ``.tsv`` file (one text a row, from ``column``), a ``.txt`` file (one text a line, empty lines left out), or the
    text itself.

    Raises:
        ValueError: nothing given or found, a file that does not exist, a table without the column, a modality that is
            not read from files.
    """
    if not inputs:
        raise ValueError("nothing to predict: give at least one input")
    if modality in ("image", "audio"):
        paths = [path for given in inputs for path in _paths(Path(given), modality)]
        return (ImageFiles if modality == "image" else SoundFiles)(paths), [str(path) for path in paths]
    if modality != "text":
        raise ValueError(f"{modality}s cannot be named on the command line: use cenote.probe.predict")
    pairs = [pair for given in inputs for pair in _texts(given, column)]
    return [text for text, _ in pairs], [name for _, name in pairs]


def _paths(path: Path, modality: Modality) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(f"no such {modality} file or folder: {path}")
    found = (image_files if modality == "image" else sound_files)(path)
    if not found:
        raise ValueError(f"no {'images' if modality == 'image' else 'sounds'} in {path}")
    return found


def _texts(given: str, column: str | None) -> list[tuple[str, str]]:
    suffix = Path(given).suffix.lower()
    if suffix not in (".txt", *TABLE_SEPARATORS) or "\n" in given or not Path(given).is_file():
        if suffix in (".txt", *TABLE_SEPARATORS) and not any(c.isspace() for c in given):
            raise ValueError(f"no such file: {given}")
        return [(given, given)]
    if suffix == ".txt":
        lines = Path(given).read_text(encoding="utf-8").splitlines()
        found = [(line, f"{given}:{n}") for n, line in enumerate(lines, 1) if line.strip()]
    else:
        found = [
            (text, f"{given}:{n}") for n, text in enumerate(_column(Path(given), TABLE_SEPARATORS[suffix], column), 1)
        ]
    if not found:
        raise ValueError(f"{given} holds no text")
    return found


def _column(path: Path, separator: str, column: str | None) -> list[str]:
    import pandas as pd

    table = pd.read_csv(path, sep=separator, dtype=str, keep_default_na=False)
    name = column or ("text" if "text" in table.columns else table.columns[0] if len(table.columns) == 1 else None)
    if name is None or name not in table.columns:
        wanted = f"no column {column!r}" if column else "no column 'text' (name one with --column)"
        raise ValueError(f"{path} has {wanted}; it has {', '.join(map(str, table.columns))}")
    return table[name].tolist()
