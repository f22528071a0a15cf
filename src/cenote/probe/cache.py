"""The cache directory: which feature stores it holds, and how they are removed."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from cenote.probe.files import default_cache_dir, is_local, join, local_cache_dir, locate, normalise, sizes
from cenote.probe.manifest import Manifest

Path = str | os.PathLike[str]


def stores_dir(cache_dir: Path | None = None) -> str:
    """The folder of a cache directory that holds the stores, one folder each."""
    return join(normalise(default_cache_dir() if cache_dir is None else cache_dir), "features")


def fetched_path(sha256: str) -> str:
    """The local copy of a remote shard."""
    return join(local_cache_dir(), "fetched", f"{sha256}.safetensors")


@dataclass(frozen=True)
class StoreInfo:
    """One store of a cache directory.

    Attributes:
        path: its folder.
        digest: its name.
        bytes: what it takes on disk.
        problem: why its manifest cannot be read, or ``None``.
        manifest: what it holds, where that can be read.
    """

    path: str
    digest: str
    bytes: int
    problem: str | None
    manifest: Manifest | None

    @property
    def complete(self) -> bool:
        return self.manifest is not None and self.manifest.complete

    def summary(self) -> dict[str, Any]:
        """What a listing shows, ready for JSON."""
        manifest = self.manifest
        key = {} if manifest is None else manifest.key
        return {
            "digest": self.digest,
            "backbone": key.get("backbone"),
            "layers": key.get("layers"),
            "view": key.get("view"),
            "dtype": key.get("dtype"),
            "items": None if manifest is None else manifest.items,
            "stored": None if manifest is None else manifest.stored,
            "bytes": self.bytes,
            "problem": self.problem,
            "path": self.path,
        }


def list_stores(cache_dir: Path | None = None) -> list[StoreInfo]:
    """The stores of a cache directory (default: :func:`cenote.probe.files.default_cache_dir`), also broken ones."""
    root = stores_dir(cache_dir)
    fs, plain = locate(root)
    fs.invalidate_cache(plain)
    try:
        entries = fs.ls(plain, detail=True)
    except FileNotFoundError:
        return []
    names = sorted(entry["name"].rstrip("/").rpartition("/")[2] for entry in entries if entry["type"] == "directory")
    return [_info(join(root, name), name) for name in names if re.fullmatch(r"[0-9a-f]{32}", name)]


def _info(path: str, name: str) -> StoreInfo:
    manifest, problem = None, None
    try:
        manifest = Manifest.read(path)
    except FileNotFoundError:
        problem = "no manifest: interrupted before the first shard"
    except ValueError as error:
        problem = str(error)
    return StoreInfo(path, name, sum(sizes(path).values()), problem, manifest)


def clear(cache_dir: Path | None = None, match: str | None = None, incomplete: bool = False) -> list[StoreInfo]:
    """Remove stores, and the local copies of remote ones; returns what was removed.

    Args:
        cache_dir: the cache directory (default: :func:`cenote.probe.files.default_cache_dir`).
        match: only stores whose digest begins with this or whose backbone contains it.
        incomplete: only stores whose extraction did not finish or whose manifest is broken.
    """
    chosen = select(list_stores(cache_dir), match, incomplete)
    for info in chosen:
        remove(info)
    return chosen


def remove(info: StoreInfo) -> None:
    """Remove one store."""
    fs, plain = locate(info.path)
    if not is_local(fs) and info.manifest is not None:
        for shard in info.manifest.shards:
            with suppress(FileNotFoundError):
                os.unlink(fetched_path(shard.sha256))
    fs.rm(plain, recursive=True)


def select(stores: list[StoreInfo], match: str | None = None, incomplete: bool = False) -> list[StoreInfo]:
    """The stores that :func:`clear` would remove."""

    def fits(info: StoreInfo) -> bool:
        backbone = "" if info.manifest is None else str(info.manifest.key.get("backbone"))
        named = match is None or info.digest.startswith(match) or match in backbone
        return named and not (incomplete and info.complete)

    return [info for info in stores if fits(info)]
