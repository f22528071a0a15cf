"""Tables, hub data sets and saved ones, through the `datasets` library."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from collections.abc import Sequence as RowNames
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cenote.data.audio import ColumnSounds, is_sound_name
from cenote.data.columns import choose_columns
from cenote.data.items import ColumnImages, ColumnTexts
from cenote.data.source import PartName, Source, near, part_name

FORMATS = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".json": "json", ".jsonl": "json", ".ndjson": "json"}
DIGEST_BYTES = 1 << 30


def table_format(path: Path) -> str | None:
    """``"csv"``, ``"parquet"`` or ``"json"`` from a file's name (``.gz`` may follow), else ``None``."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    return FORMATS.get(suffixes[-1]) if suffixes else None


def file_source(path: Path, **columns: str | None) -> Source:
    """One csv, tsv, parquet, json or jsonl file; paths of images and sounds are relative to its folder.

    The digest covers the file's bytes; above 1 GiB its name, size and time of change.
    """
    from datasets import load_dataset

    options: dict[str, Any] = {"data_files": str(path), "split": "train"}
    if path.suffixes and ".tsv" in [suffix.lower() for suffix in path.suffixes]:
        options["sep"] = "\t"
    with _quiet():
        try:
            table = load_dataset(table_format(path), **options)
        except Exception as error:  # a malformed table surfaces as an error of pandas, pyarrow or datasets
            cause = error.__cause__ or error
            raise ValueError(f"cannot read {path}: {str(cause).strip().splitlines()[0]}") from error
    status = path.stat()
    if status.st_size <= DIGEST_BYTES:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    else:
        digest = hashlib.sha256(f"{path.name} {status.st_size} {status.st_mtime_ns}".encode()).hexdigest()
    return tables_source({None: table}, str(path), digest, path.parent, columns)


def saved_source(folder: Path, **columns: str | None) -> Source:
    """A folder written by ``save_to_disk``."""
    from datasets import Dataset, load_from_disk

    with _quiet():
        loaded = load_from_disk(str(folder))
    tables = {None: loaded} if isinstance(loaded, Dataset) else dict(loaded)
    return tables_source(tables, str(folder), _digest_of(tables), folder, columns)


def hub_source(spec: str, **columns: str | None) -> Source:
    """A data set of the hub, ``ID`` or ``ID:CONFIGURATION``, or a folder with the hub's layout (``train.csv``, ...)."""
    from datasets import load_dataset

    name, _, configuration = spec.partition(":")
    with _quiet():
        try:
            tables = load_dataset(name, configuration or None)
        except Exception as error:
            reason = str(error.__cause__ or error).strip().splitlines()[0]
            raise ValueError(f"the datasets library cannot load {spec!r}: {reason}") from error
    return tables_source(dict(tables), spec, _digest_of(tables), None, columns)


def tables_source(
    tables: dict[Any, Any], name: str, digest: str, folder: Path | None, columns: dict[str, str | None]
) -> Source:
    """Rows of one table, or of one a split.

    Args:
        tables: by split; a single one under ``None`` may have a column that says the split.
        name: for messages.
        digest: of the content.
        folder: what relative paths of images and sounds start from.
        columns: as asked for; see :func:`cenote.data.columns.choose_columns`.
    """
    from datasets import ClassLabel, concatenate_datasets

    if not tables or not any(len(table) for table in tables.values()):
        raise ValueError(f"{name} has no rows")
    first = next(iter(tables.values()))
    chosen = choose_columns(first.features, name, **columns)
    kept = [column for column in chosen[1:] if column]
    for split, table in tables.items():
        for column in kept:
            if column not in table.column_names:
                raise ValueError(
                    f"the split {split!r} of {name} has no column {column!r}{near(column, table.column_names)}"
                )
    table = concatenate_datasets([table.select_columns(kept) for table in tables.values()])
    if table._indices is not None:
        table = table.flatten_indices()
    # The memory-mapped columns themselves: reading a row through the library costs a hundred times as much.
    arrow = table.with_format("arrow")[:]

    feature = table.features[chosen.label]
    inner = getattr(feature, "feature", feature)
    classes = tuple(inner.names) if isinstance(inner, ClassLabel) else None
    labels = [_missing_to_none(label, classes is not None) for label in arrow.column(chosen.label).to_pylist()]

    parts: list[PartName] | None = None
    if len(tables) > 1 or (len(tables) == 1 and next(iter(tables)) in ("validation", "test")):
        parts = [part for split, table_ in tables.items() for part in [part_name(split, name)] * len(table_)]
    elif chosen.split is not None:
        values = arrow.column(chosen.split).to_pylist()
        names = {value: part_name(value, f"the column {chosen.split!r} of {name}") for value in set(values)}
        parts = [names[value] for value in values]
    column = arrow.column(chosen.item)
    if chosen.modality == "image" and not columns.get("image_column") and is_sound_name(column[0].as_py()):
        chosen = chosen._replace(modality="audio")  # a column of paths is guessed to hold images
    items: Any = ColumnTexts(column)
    if chosen.modality != "text":
        items = (ColumnImages if chosen.modality == "image" else ColumnSounds)(column, folder)
    return Source(
        name=name,
        modality=chosen.modality,
        items=items,
        labels=labels,
        ids=_Rows(tables),
        digest=hashlib.sha256(f"{digest} {chosen}".encode()).hexdigest(),
        parts=parts,
        classes=classes,
        label_names=arrow.column(chosen.label_name).to_pylist() if chosen.label_name else None,
        problems={row: "there is no label" for row, label in enumerate(labels) if label is None},
    )


class _Rows(RowNames[str]):
    """Names of rows, made when asked for: ``"row 3"``, or ``"train row 3"`` where there are several tables."""

    def __init__(self, tables: dict[Any, Any]) -> None:
        self.sizes = [(split, len(table)) for split, table in tables.items()]

    def __len__(self) -> int:
        return sum(size for _, size in self.sizes)

    def __getitem__(self, row: int) -> str:  # type: ignore[override]
        for split, size in self.sizes:
            if row < size:
                return f"row {row}" if len(self.sizes) == 1 else f"{split} row {row}"
            row -= size
        raise IndexError(row)


def _missing_to_none(label: Any, declared: bool) -> Any:
    if isinstance(label, float) and math.isnan(label):
        return None
    if declared and label == -1:  # how the datasets library marks a hidden label
        return None
    return label


def _digest_of(tables: Any) -> str:
    fingerprints = sorted(f"{split} {table._fingerprint}" for split, table in tables.items())
    return hashlib.sha256("\n".join(fingerprints).encode()).hexdigest()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's progress bars: the caller has its own."""
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
