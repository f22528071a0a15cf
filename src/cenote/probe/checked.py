"""Access to the shards of a store that never gives a bad one.

The size of every shard is compared with the manifest when a store is opened: one listing of the folder, so thousands of
shards open at once. The SHA-256 of a shard is compared when it is first used in a session, over the very pages that are
then read; a shard whose file has changed since is checked again when it is next mapped.
"""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from cenote.probe.cache import fetched_path
from cenote.probe.files import is_local, join, locate, sizes, write_atomically
from cenote.probe.manifest import Manifest
from cenote.probe.shards import checksum, map_file, parse


class DamagedStoreError(ValueError):
    """Shards are missing, of the wrong size or of the wrong checksum; extracting again repairs exactly these."""


class CheckedShards:
    """The shards that a manifest lists, memory-mapped and checked. Those of a remote folder are first copied here.

    Args:
        path: the store's folder, a plain path or an fsspec URL.
        manifest: what it should hold.
    """

    def __init__(self, path: str, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest
        self.remote = not is_local(locate(path)[0])
        self._mapped: dict[int, dict[str, Tensor]] = {}
        self._checked: dict[int, tuple[int, ...]] = {}  # shard: the state of its file when the checksum was right

    def tensors(self, number: int) -> dict[str, Tensor]:
        """The tensors of a shard, views of its mapped pages, or :class:`DamagedStoreError`."""
        found = self._mapped.get(number)
        if found is None:
            found = self._mapped[number] = self._open(number)
        return found

    def release(self) -> None:
        """Unmap every shard."""
        self._mapped.clear()

    def wrong_size(self) -> list[int]:
        """Numbers of the shards that are missing or of the wrong size."""
        found = sizes(self.path)
        return [n for n, shard in enumerate(self.manifest.shards) if found.get(shard.file) != shard.bytes]

    def damaged(self) -> list[int]:
        """Numbers of the shards that are missing or whose size or checksum is wrong. Reads everything once."""
        bad = set(self.wrong_size())
        for number in set(range(len(self.manifest.shards))) - bad - self._mapped.keys():
            try:
                self._open(number)
            except DamagedStoreError:
                bad.add(number)
        return sorted(bad)

    def trust(self, other: CheckedShards) -> None:
        """Take over which shards of the same folder have been checked, as far as they are the same."""
        for number, (mine, theirs) in enumerate(zip(self.manifest.shards, other.manifest.shards, strict=False)):
            if mine == theirs and number in other._checked:
                self._checked[number] = other._checked[number]

    def refuse(self, bad: list[int]) -> None:
        """Raise :class:`DamagedStoreError` if there are bad shards."""
        if bad:
            raise self._error(bad)

    def _error(self, bad: list[int]) -> DamagedStoreError:
        names = ", ".join(self.manifest.shards[n].file for n in bad[:3]) + (", ..." if len(bad) > 3 else "")
        return DamagedStoreError(
            f"{self.path}: {names} missing, truncated or altered; run the extraction again to repair the store"
        )

    def _open(self, number: int) -> dict[str, Tensor]:
        shard = self.manifest.shards[number]
        # A local copy of a remote shard that has gone bad is fetched once more: the original may be well.
        for _ in range(2 if self.remote else 1):
            try:
                path = self._fetched(number) if self.remote else join(self.path, shard.file)
                stat = os.stat(path)
                content = map_file(path)
            except FileNotFoundError:
                break
            state = (stat.st_size, stat.st_mtime_ns, stat.st_ino)
            known = self._checked.get(number) == state
            if known or (len(content) == shard.bytes and checksum(content) == shard.sha256):
                self._checked[number] = state
                return parse(content)
            if self.remote:
                with suppress(FileNotFoundError):
                    os.unlink(path)
        raise self._error([number])

    def _fetched(self, number: int) -> str:
        """The local copy of a remote shard, kept under its checksum; made if it is not there."""
        shard = self.manifest.shards[number]
        copy = fetched_path(shard.sha256)
        if not Path(copy).exists():
            fs, folder = locate(self.path)
            with fs.open(join(folder, shard.file), "rb") as remote:
                write_atomically(copy, lambda file: shutil.copyfileobj(remote, file, 1 << 20))
        return copy
