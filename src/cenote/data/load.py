"""A data set from its one-line name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cenote.data.source import near

if TYPE_CHECKING:
    from cenote.data.base import Data
    from cenote.data.source import Source
    from cenote.types import Task


def load_data(
    spec: str | Path,
    *,
    image_column: str | None = None,
    audio_column: str | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
    split_column: str | None = None,
    validation_fraction: float = 0.1,
    test_fraction: float = 0.2,
    seed: int = 0,
    on_error: Literal["raise", "skip"] = "raise",
    limit: int | None = None,
    task: Task | Literal["auto"] | None = None,
    fold: int | None = None,
) -> Data:
    """Load labelled images, sounds or texts in three parts.

    Splits that the data set has are kept under their usual names (train, val, dev, test, ...). Missing ones are taken
    out of the training part, the test part first: stratified by class, drawn by ``seed``, the same on every machine.
    Items are decoded when asked for, so memory does not grow with their size.

    Args:
        spec: ``"digits"`` (bundled, its test part fixed); a folder of images or sounds (``CLASS/FILE`` or
            ``SPLIT/CLASS/FILE``); a csv, tsv, parquet, json or jsonl file; an ``.npz`` archive of images or graphs;
            ``"tu:MUTAG"`` and other graph sets of the TU collection; a folder written by ``save_to_disk``; or an id of
            the hub, which the `datasets` library loads. ``"datasets:ID"`` and ``"datasets:ID:CONFIGURATION"`` say so
            in as many words.
        image_column: column with encoded images or paths (relative to the table's folder); guessed from usual names.
        audio_column: column with encoded sounds, paths, or samples with their rate; guessed likewise.
        text_column: column with texts; guessed from usual names.
        label_column: column with integers, strings, lists (multi-label) or floats (regression); guessed likewise.
        split_column: column that says the part of each row; guessed from usual names, ``""`` for none.
        validation_fraction: share of the training part that is taken for validation where there is none.
        test_fraction: share of the training part that is taken for the test where there is none.
        seed: of the parts that are made, and of ``limit``.
        on_error: an item that cannot be read (or has no label or text) is an error (``"raise"``), or left out and
            listed in :attr:`~cenote.data.base.Data.skipped` (``"skip"``). Under ``"raise"`` the heads of images
            and sounds are checked now and the rest when it is asked for; under ``"skip"`` each is decoded once now.
        limit: at most this many items a part, stratified.
        task: ``"classification"``, ``"multilabel"`` or ``"regression"``; inferred from the labels unless given.
        fold: of the ten folds of a set of graphs, the one that is the test part; the next is the validation part.

    Raises:
        ValueError: nothing of that name, an unknown column (nearest names suggested), an empty folder or table, an
            unknown split, labels missing in a part, one class only, labels that the training part never shows, an
            unreadable item.
    """
    from cenote.data.assemble import assemble

    columns = {
        "image_column": image_column,
        "audio_column": audio_column,
        "text_column": text_column,
        "label_column": label_column,
        "split_column": split_column,
    }
    return assemble(
        find_source(str(spec), columns, fold),
        validation_fraction=validation_fraction,
        test_fraction=test_fraction,
        seed=seed,
        on_error=on_error,
        limit=limit,
        task=None if task == "auto" else task,
    )


def find_source(spec: str, columns: dict[str, str | None], fold: int | None = None) -> Source:
    """Recognise what ``spec`` names and read its rows."""
    asked = {name: column for name, column in columns.items() if column}
    from cenote.data.graphs import graph_source, holds_graphs, tu_source

    if spec.startswith("tu:"):
        _refuse_columns(spec, asked)
        return tu_source(spec.removeprefix("tu:"), fold)
    if holds_graphs(Path(spec).expanduser()):
        _refuse_columns(spec, asked)
        return graph_source(Path(spec).expanduser(), fold)
    if fold is not None:
        raise ValueError(f"fold applies to sets of graphs, not to {spec!r}")
    if spec == "digits":
        from cenote.data.digits import digits_source

        _refuse_columns(spec, asked)
        return digits_source()
    from cenote.data.table import FORMATS, file_source, hub_source, saved_source, table_format

    scheme, _, rest = spec.partition(":")
    named = scheme == "datasets" and rest != ""
    path = Path(rest if named else spec).expanduser()
    if path.is_file():
        if path.suffix.lower() == ".npz":
            from cenote.data.arrays import archive_source

            _refuse_columns(spec, asked)
            return archive_source(path)
        if table_format(path) is None:
            raise ValueError(
                f"cannot read {path}: expected a folder or a file ending in {', '.join([*FORMATS, '.npz'])}"
            )
        return file_source(path, **columns)
    if path.is_dir():
        if any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
            return saved_source(path, **columns)
        from cenote.data.audio import sound_files
        from cenote.data.folder import folder_source, image_files

        tables = [entry.name for entry in path.iterdir() if entry.is_file() and table_format(entry)]
        images, sounds = image_files(path), sound_files(path)
        metadata = [name for name in tables if name.startswith("metadata.")]
        if metadata and sounds and not images:
            # As a table with paths: for sounds the library would want a decoder of its own.
            return file_source(path / metadata[0], **columns)
        if metadata or (tables and not images and not sounds):
            return hub_source(str(path), **columns)
        _refuse_columns(spec, asked)
        return folder_source(path)
    if named:
        return hub_source(rest, **columns)
    siblings = [str(entry) for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    hint = near(spec, ["digits", *siblings])
    if path.is_absolute() or spec.startswith((".", "~")) or table_format(path) or spec.count("/") > 1:
        raise ValueError(f"there is no file or folder {spec!r}{hint}")
    if hint and "/" not in spec:
        raise ValueError(f"unknown data set {spec!r}{hint}")
    return hub_source(spec, **columns)


def _refuse_columns(spec: str, asked: dict[str, str]) -> None:
    if asked:
        name, column = next(iter(asked.items()))
        raise ValueError(f"{spec!r} is no table, so {name}={column!r} has nothing to choose from")
