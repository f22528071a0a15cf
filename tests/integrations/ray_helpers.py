"""Things that go to Ray workers, which import them from here, and that hold a worker still until its node is killed."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import ray
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem

from cenote.probe.tasks import Objective


class Bucket(DirFileSystem):
    """``bucket://``, a folder that the library knows through fsspec only, as it does an object store."""

    protocol = "bucket"

    def __init__(self, **options: Any) -> None:
        super().__init__(path=os.environ["CENOTE_TEST_BUCKET"], fs=LocalFileSystem(auto_mkdir=True), **options)


fsspec.register_implementation("bucket", Bucket, clobber=True)


@dataclass(frozen=True)
class Trap:
    """On the victim's node: says so in a file and sleeps. On other nodes: waits until the victim is caught."""

    folder: str
    victim: str
    driver: int

    @property
    def caught(self) -> Path:
        return Path(self.folder) / "caught"

    def step(self) -> None:
        if os.getpid() == self.driver:
            return
        if ray.get_runtime_context().get_node_id() == self.victim:
            self.caught.touch()
            time.sleep(600)
        begin = time.monotonic()
        while not self.caught.exists():
            if time.monotonic() - begin > 240:  # a busy machine takes long to start a worker
                raise RuntimeError("no task ran on the node that is to be killed")
            time.sleep(0.02)


@dataclass(frozen=True)
class TrappedItems:
    """Items of which every fourth springs the trap, in the middle of a shard."""

    items: list[Any]
    trap: Trap | None = None

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        if self.trap is not None and index % 4 == 3:
            self.trap.step()
        return self.items[index]


@dataclass(frozen=True)
class TrappedObjective(Objective):
    """An objective whose loss springs the trap."""

    trap: Trap | None = None

    def loss(self, outputs, targets):
        if self.trap is not None:
            self.trap.step()
        return super().loss(outputs, targets)


@dataclass(frozen=True)
class UselessObjective(Objective):
    """An objective that must not be asked for a loss."""

    def loss(self, outputs, targets):
        raise ValueError("there is nothing left to train")
