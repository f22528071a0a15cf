"""Tables of texts for the judged tasks: reading, columns by their usual names, every text once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cenote.data.base import Skipped
from cenote.data.columns import SPLIT_COLUMNS
from cenote.data.source import PARTS, SPLIT_NAMES, PartName, near, part_name
from cenote.data.table import table_format

if TYPE_CHECKING:
    import pandas as pd


class Texts:
    """Strings held in memory."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = tuple(texts)

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> str:
        return self.texts[index]


class TextPool:
    """Collects texts; one that comes again, in whatever role, keeps the number it got first."""

    def __init__(self) -> None:
        self.ids: list[str] = []
        self._numbers: dict[str, int] = {}

    def add(self, text: str, name: str) -> int:
        """The item number of a text; ``name`` is kept for the first of its kind."""
        number = self._numbers.setdefault(text, len(self.ids))
        if number == len(self.ids):
            self.ids.append(name)
        return number

    def items(self) -> Texts:
        return Texts(list(self._numbers))

    def fingerprint(self) -> str:
        """Digest of all texts in order."""
        digest = hashlib.sha256()
        for text in self._numbers:
            content = text.encode()
            digest.update(len(content).to_bytes(8, "little") + content)
        return digest.hexdigest()


class Troubles:
    """What cannot be used: raised at once, or listed, as ``on_error`` says."""

    def __init__(self, name: str, on_error: str) -> None:
        if on_error not in ("raise", "skip"):
            raise ValueError(f"on_error must be 'raise' or 'skip', got {on_error!r}")
        self.name, self.on_error = name, on_error
        self.skipped: list[Skipped] = []

    def report(self, part: str, item: str, reason: str) -> None:
        """Raise ``ValueError`` naming the item, or note that it is left out."""
        if self.on_error == "raise":
            raise ValueError(f"{item} of {self.name}: {reason} (on_error='skip', --on-error skip, leaves it out)")
        self.skipped.append(Skipped(part, item, reason))


def read_table(path: Path) -> pd.DataFrame:
    """A csv, tsv, parquet, json or jsonl file (``.gz`` may follow) as a frame.

    Raises:
        ValueError: not such a file, malformed, or without rows.
    """
    import pandas as pd

    kind = table_format(path)
    separator = "\t" if ".tsv" in [suffix.lower() for suffix in path.suffixes] else ","
    lines = any(suffix.lower() in (".jsonl", ".ndjson") for suffix in path.suffixes)
    readers: dict[str | None, Callable[[], pd.DataFrame]] = {
        "parquet": lambda: pd.read_parquet(path),
        # Identifiers of digits stay as they are written: a document 007 is not 7.
        "csv": lambda: pd.read_csv(path, sep=separator, dtype=str, keep_default_na=False, na_values=[""]),
        "json": lambda: pd.read_json(path, lines=lines, dtype=False),
    }
    if kind not in readers:
        raise ValueError(f"cannot read {path}: expected a csv, tsv, parquet, json or jsonl file")
    try:
        frame = readers[kind]()
    except Exception as error:  # a malformed table surfaces as an error of pandas or pyarrow
        raise ValueError(f"cannot read {path}: {str(error).strip().splitlines()[0]}") from error
    if not len(frame):
        raise ValueError(f"{path} has no rows")
    return frame


def read_frame(spec: str) -> pd.DataFrame:
    """A table from a file, a folder with a table a split (``train.csv``, ...), or a data set of the hub.

    Several splits come as one frame with a column ``split``.

    Raises:
        ValueError: nothing of that name, or not a table.
    """
    import pandas as pd

    path = Path(spec).expanduser()
    if path.is_file():
        return read_table(path)
    if path.is_dir() and not any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        tables = [entry for entry in sorted(path.iterdir()) if entry.is_file() and table_format(entry)]
        named = [entry for entry in tables if entry.name.split(".")[0].lower() in SPLIT_NAMES]
        if not named and len(tables) == 1:
            return read_table(tables[0])
        if not named:
            raise ValueError(f"{spec} holds no table named after a split (train, validation, test)")
        return pd.concat([read_table(entry).assign(split=entry.name.split(".")[0]) for entry in named])
    if path.is_absolute() or spec.startswith((".", "~")) or spec.count("/") > 1:
        siblings = [str(entry) for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise ValueError(f"there is no file or folder {spec!r}{near(spec, siblings)}")
    from datasets import Dataset, load_dataset, load_from_disk

    name, _, configuration = spec.removeprefix("datasets:").partition(":")
    try:
        loaded = load_from_disk(spec) if path.is_dir() else load_dataset(name, configuration or None)
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"the datasets library cannot load {spec!r}: {reason}") from error
    if isinstance(loaded, Dataset):
        return loaded.to_pandas()
    return pd.concat([table.to_pandas().assign(split=split) for split, table in loaded.items()])


def column_names(spec: str) -> list[str]:
    """The columns of a table in a file; empty for anything else."""
    path = Path(spec).expanduser()
    if not path.is_file() or table_format(path) is None:
        return []
    if table_format(path) == "parquet":
        import pyarrow.parquet as pq

        return list(pq.read_schema(path).names)
    return list(read_table(path).columns)


def choose(columns: Sequence[str], asked: str | None, usual: Sequence[str], what: str, where: str) -> str:
    """The column asked for, or the first that has a usual name.

    Raises:
        ValueError: no such column, or nothing to guess from; the message lists the columns.
    """
    if asked is not None:
        if asked not in columns:
            raise ValueError(
                f"{where} has no column {asked!r}: its columns are {', '.join(columns)}{near(asked, columns)}"
            )
        return asked
    found = optional(columns, usual)
    if found is None:
        raise ValueError(f"cannot tell which column of {where} is {what}: its columns are {', '.join(columns)}")
    return found


def optional(columns: Sequence[str], usual: Sequence[str]) -> str | None:
    """The first column that has a usual name, or ``None``."""
    lower = {str(column).lower().replace("-", "_"): column for column in reversed(columns)}
    return next((lower[name] for name in usual if name in lower), None)


def parts_of(frame: pd.DataFrame, asked: str | None, where: str) -> dict[PartName, Any]:
    """Row numbers of each part that has any; a table without a split column is all test.

    Raises:
        ValueError: no such column, an unknown split, or no test part.
    """
    import numpy as np

    columns = list(frame.columns)
    column = choose(columns, asked, (), "the split", where) if asked else optional(columns, SPLIT_COLUMNS)
    if column is None or asked == "":
        return {"test": np.arange(len(frame))}
    values = frame[column].tolist()
    names = {value: part_name(value, f"the column {column!r} of {where}") for value in set(values)}
    found = np.array([names[value] for value in values])
    parts: dict[PartName, Any] = {part: np.flatnonzero(found == part) for part in PARTS if (found == part).any()}
    return parts


def text_of(value: Any) -> str:
    """A cell as text; empty where there is none."""
    return value.strip() if isinstance(value, str) else ""
