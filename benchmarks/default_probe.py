"""``cenote probe`` on its default, in a process of its own with an empty feature cache: seconds against the budget of
120 s."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
from common import finish

BUDGET = 120.0


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        command = [sys.executable, "-m", "cenote", "probe", "--out", f"{folder}/out", "--cache-dir", f"{folder}/cache"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - start
        table = pd.read_parquet(Path(folder) / "out" / "results.parquet")
    rows = [
        {
            "readouts": len(table),
            "seconds": seconds,
            "budget": BUDGET,
            "best": table.readout[0],
            "score": table.score[0],
        }
    ]
    finish("default_probe", "the budget of 120 s", 1.0, rows, BUDGET / seconds, __doc__)


if __name__ == "__main__":
    main()
