"""What pooling costs against the number of cells, and attention beside it."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from cenote.mixing import create_mixer
from cenote.reproductions.base import Finding, finding

DIM = 64
POOL_UNIT, ATTENTION_UNIT = "ns a cell (pooling)", "ns a cell (attention)"


@torch.no_grad()
def cost_findings(sides: Sequence[int], rounds: int = 7) -> list[Finding]:
    """Time a cell of both mixers on square maps of the sides given, and their ratio at 64."""
    torch.manual_seed(0)
    mixers = {
        "pool": create_mixer("pool", dim=DIM),
        "attention": create_mixer("softmax_attention(head_dim=32)", dim=DIM),
    }
    nanoseconds: dict[str, list[float]] = {name: [] for name in mixers}
    for side in sides:
        items = max(1, (64 // side) ** 2)  # as many cells at every side, so that caches serve all alike
        x = torch.randn(items, DIM, side, side).contiguous(memory_format=torch.channels_last)
        for name, mixer in mixers.items():
            times = []
            for _ in range(rounds if side <= 64 or name == "pool" else 2):
                start = time.perf_counter()
                mixer.mix_map(x)
                times.append(time.perf_counter() - start)
            nanoseconds[name].append(1e9 * min(times) / (items * side * side))
    pool, attention = nanoseconds["pool"], nanoseconds["attention"]
    middle, at = sorted(pool)[len(pool) // 2], list(sides).index(64)
    named = ", ".join(map(str, sides))
    return [
        finding(
            "The time of the pooling mixer is linear in the number of pixels.",
            "time a cell within a factor of 2 of the median",
            pool,
            lambda v: middle / 2 <= v <= 2 * middle,
            unit=POOL_UNIT,
            note=f"Width {DIM}, square maps of side {named}, one value each; the best of {rounds} runs.",
        ),
        finding(
            "The time of attention grows faster than the number of pixels.",
            "time a cell above that of pooling at every size",
            attention,
            lambda v: v > max(pool),
            unit=ATTENTION_UNIT,
            note=f"The same maps, sides {named}; heads of 32 channels as in the paper's hybrids.",
        ),
        finding(
            "At 64 x 64 tokens the pooling mixer is faster than attention of equal width.",
            "at least 5 x",
            attention[at] / pool[at],
            lambda v: v >= 5,
            unit="x",
            note=f"{torch.get_num_threads()} thread(s).",
        ),
    ]
