"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path


def write_whole(path: str | Path, content: bytes | str) -> Path:
    """Write a file by way of a temporary neighbour, fsync and rename; a failed write leaves nothing behind."""
    path = Path(path)
    return write_all(path.parent, {path.name: content})[0]


def write_all(folder: str | Path, contents: Mapping[str, bytes | str]) -> list[Path]:
    """Write several files of one folder together.

    All are written and flushed under temporary names before the first is renamed, so a full disk changes nothing. The
    last name is the one that makes the others valid: an older file of that name goes first and the new one comes
    last, so that a reader who finds it finds its companions too.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    staged: dict[str, str] = {}
    try:
        for name, content in contents.items():
            handle, temporary = tempfile.mkstemp(dir=folder, prefix=f".{name}.", suffix=".part")
            staged[name] = temporary
            with os.fdopen(handle, "wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~_umask())
        *_, last = staged
        if len(staged) > 1:
            (folder / last).unlink(missing_ok=True)
        for name, temporary in staged.items():
            os.replace(temporary, folder / name)
        _sync_folder(folder)
    finally:
        for temporary in staged.values():
            Path(temporary).unlink(missing_ok=True)
    return [folder / name for name in contents]


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def _sync_folder(folder: Path) -> None:
    """Flush the renames themselves, where the system allows a folder to be opened."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)
