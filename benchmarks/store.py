"""Does the feature store's memory stay flat in the size of the data?

Peak anonymous memory of an extraction and one shuffled epoch of reading, at 1x and 10x the data, each in a process of
its own; what counts is the growth over that process's memory after its imports. The ratio is the growth at 1x over the
growth at 10x: 1 is flat, 0.1 would be memory that grows with the data. Mapped pages of shards belong to their files, so
the system drops them when memory runs short; they are shown beside it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from common import finish

TOKENS, DIM, ITEMS, GOAL = 50, 64, 6000, 0.8


def memory(field: str) -> float:
    """MB of one field of this process's memory."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"the system does not tell {field}")


class Peak:
    """The most memory that was seen, at every call of :meth:`look` and every few milliseconds in between."""

    def __enter__(self) -> Peak:
        self.base = self.anonymous = memory("RssAnon")
        self.mapped = 0.0
        self.done = threading.Event()
        self.watcher = threading.Thread(target=self.watch)
        self.watcher.start()
        return self

    def look(self, *progress: int) -> None:
        self.anonymous = max(self.anonymous, memory("RssAnon"))
        self.mapped = max(self.mapped, memory("RssFile"))

    def watch(self) -> None:
        while not self.done.wait(0.005):
            self.look()

    def __exit__(self, *error: object) -> None:
        self.done.set()
        self.watcher.join()


def measure(scale: int) -> dict[str, Any]:
    """One extraction and one epoch in this process."""
    import torch

    from cenote.backbones.base import Backbone
    from cenote.data.base import Split
    from cenote.probe.extract import extract
    from cenote.types import Features

    torch.set_num_threads(1)

    class Fake(Backbone):
        spec, modality, dim, num_layers, module = "fake", "image", DIM, 1, torch.nn.Identity()

        def collate(self, items):
            return {"items": torch.tensor(items)}

        def encode(self, batch, layers, reduce):
            hidden = batch["items"].float()[:, None, None, None] + torch.arange(TOKENS * DIM).view(TOKENS, DIM)
            return Features(hidden, torch.ones(len(hidden), TOKENS, dtype=torch.bool), layers)

        def transform_id(self):
            return ""

        def fingerprint(self):
            return "0"

    def split(count: int) -> Split:
        return Split(range(count), torch.zeros(count), range(count), str(count))

    count, seen = ITEMS * scale, 0.0
    with tempfile.TemporaryDirectory() as folder:
        extract(Fake(), split(64), cache_dir=folder)
        with Peak() as peak:
            store = extract(Fake(), split(count), cache_dir=folder, shard_items=2000, on_batch=peak.look)
            for _, features in store.batches(128, shuffle_seed=0):
                seen += float(features.hidden[:, 0, 0, 0].double().sum())
                peak.look()
    if seen != count * (count - 1) / 2:
        raise RuntimeError("the epoch did not see every item once")
    return {
        "data": f"{scale}x",
        "items": count,
        "features MB": count * TOKENS * DIM * 4 / 2**20,
        "anonymous MB": peak.anonymous - peak.base,
        "mapped MB": peak.mapped,
    }


def main() -> None:
    if "--measure" in sys.argv:
        print(json.dumps(measure(int(sys.argv[-1]))))
        return
    rows = []
    for scale in (1, 10):
        command = [sys.executable, __file__, "--measure", str(scale)]
        rows.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout))
    value = rows[0]["anonymous MB"] / rows[1]["anonymous MB"]
    finish("feature store: peak memory at 1x the data over that at 10x", "1 is flat", GOAL, rows, value, __doc__)


if __name__ == "__main__":
    main()
