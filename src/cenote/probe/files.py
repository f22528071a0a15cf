"""Files that appear whole or not at all, on local disks and behind any fsspec URL."""

from __future__ import annotations

import json
import logging
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import fsspec
from fsspec.implementations.local import LocalFileSystem

PARTIAL = ".partial-"
"""How the names of unfinished files begin."""


@runtime_checkable
class Writable(Protocol):
    """A binary file open for writing, of any file system."""

    def write(self, data: Any, /) -> Any: ...


log = logging.getLogger(__name__)


def default_cache_dir() -> str:
    """``$CENOTE_CACHE`` (a path or an fsspec URL), else ``~/.cache/cenote``."""
    return os.environ.get("CENOTE_CACHE") or str(Path.home() / ".cache" / "cenote")


def local_cache_dir() -> str:
    """The default cache where it is a local folder, else ``~/.cache/cenote``."""
    fs, plain = locate(default_cache_dir())
    return plain if is_local(fs) else str(Path.home() / ".cache" / "cenote")


def locate(path: str | os.PathLike[str]) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a path or URL, and its name there (absolute for local paths)."""
    return fsspec.url_to_fs(os.fspath(path))


def is_local(fs: fsspec.AbstractFileSystem) -> bool:
    """Whether names of this file system are plain paths."""
    return isinstance(fs, LocalFileSystem)


def normalise(path: str | os.PathLike[str]) -> str:
    """A plain absolute path for anything local (``file://`` too), the URL without closing slash for the rest."""
    fs, plain = locate(path)
    return plain if is_local(fs) else os.fspath(path).rstrip("/")


def join(path: str | os.PathLike[str], *names: str) -> str:
    """Names below a path or URL."""
    return "/".join([os.fspath(path).rstrip("/"), *names])


def write_atomically(path: str | os.PathLike[str], content: bytes | Callable[[Writable], Any]) -> None:
    """Write a file under a temporary name in the same folder, flush it to the disk, and rename it.

    A reader sees the old file or the new one. Whatever stops the writing (a full disk, Ctrl-C) leaves the old file as
    it was and no temporary file. Missing folders are made.

    Args:
        path: path or fsspec URL.
        content: the bytes, or a function that writes them to the open binary file.

    Raises:
        OSError: with the cause's error number; says which file could not be written and why.
    """
    fs, target = locate(path)
    folder, _, name = target.rpartition("/")
    partial = f"{folder}/{PARTIAL}{name}.{secrets.token_hex(4)}"
    try:
        fs.makedirs(folder, exist_ok=True)
        with open(partial, "wb") if is_local(fs) else fs.open(partial, "wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content)
            if is_local(fs):
                file.flush()
                os.fsync(file.fileno())
        if is_local(fs):
            os.replace(partial, target)
            _sync_folder(folder)
        else:
            fs.mv(partial, target)
    except BaseException as error:
        with suppress(OSError):
            fs.rm_file(partial)
        if isinstance(error, OSError):
            message = f"could not write {os.fspath(path)}: {error.strerror or error}; no partial file is left"
            raise (OSError(error.errno, message) if error.errno else OSError(message)) from error
        raise


def _sync_folder(folder: str) -> None:
    """Flush the rename itself, where the system allows a folder to be opened."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write JSON atomically; NaN and infinities, which JSON does not know, raise ``ValueError``."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(path, f"{text}\n".encode())


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read JSON; ``FileNotFoundError`` if it is not there, ``ValueError`` naming the file if it is not JSON."""
    fs, plain = locate(path)
    with fs.open(plain, "rb") as file:
        content = file.read()
    try:
        return json.loads(content)
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)} is not a JSON file: {error}") from None


def sizes(folder: str | os.PathLike[str]) -> dict[str, int]:
    """Byte size of every file of a folder by name, in one listing; empty if there is no such folder."""
    fs, plain = locate(folder)
    fs.invalidate_cache(plain)
    try:
        entries = fs.ls(plain, detail=True)
    except FileNotFoundError:
        return {}
    return {entry["name"].rpartition("/")[2]: entry["size"] for entry in entries if entry["type"] == "file"}


def remove_leftovers(folder: str | os.PathLike[str]) -> None:
    """Remove unfinished files of a writer that was killed. Only for a folder without a living writer."""
    fs, plain = locate(folder)
    for name in sizes(folder):
        if name.startswith(PARTIAL):
            fs.rm_file(f"{plain}/{name}")


@contextmanager
def exclusive(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Hold a local folder for one writer; a second process waits until the first is done or dead.

    Remote folders, and systems without ``flock``, are not guarded: there one writer at a time is the user's care.
    """
    fs, plain = locate(folder)
    try:
        import fcntl
    except ImportError:
        fcntl = None  # type: ignore[assignment]
    if fcntl is None or not is_local(fs):
        yield
        return
    os.makedirs(plain, exist_ok=True)
    with open(f"{plain}/.lock", "wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.warning("waiting for another process that writes to %s", plain)
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:  # some network disks know no locks
            log.debug("%s cannot be locked", plain)
        yield
