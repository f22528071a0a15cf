"""Latent attention in eval mode: folded projections and an early mean, against the published order of operations.

``--large`` adds the released layer's sizes (0.74 G parameters, some 7 GB of memory, minutes on a CPU).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from common import finish, interleaved, ratio

from cenote.allocator import keep_freed_memory
from cenote.pooling.latent_attention import LatentAttention

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from reference.latent_heads import latent_attention, random_state

SMALL = {"dim": 512, "latents": 64, "heads": 8, "head_dim": 512, "batch": 8, "tokens": 24}
LARGE = {"dim": 4096, "latents": 512, "heads": 8, "head_dim": 4096, "batch": 1, "tokens": 64}


@torch.no_grad()
def row(sizes: dict[str, int], threads: int, device: str, repeats: int) -> dict[str, Any]:
    """One line of the table: medians, and the median ratio of rounds taken in turn."""
    if device == "cpu":
        torch.set_num_threads(threads)
    heads = sizes["heads"]
    state = random_state(sizes["dim"], sizes["latents"], heads, sizes["head_dim"])
    pool = LatentAttention.from_reference(state, num_cross_heads=heads).eval().to(device)
    state = {name: weight.to(device) for name, weight in state.items()}
    x = torch.randn(sizes["batch"], sizes["tokens"], sizes["dim"], device=device)
    mask = torch.ones(x.shape[:2], dtype=torch.bool, device=device)
    torch.testing.assert_close(pool(x, mask), latent_attention(state, x, mask, heads), rtol=1e-4, atol=1e-5)
    calls = {"folded": lambda: pool(x, mask), "published order": lambda: latent_attention(state, x, mask, heads)}
    times = interleaved(calls, repeats=repeats, warmup=1)
    return {
        **sizes,
        "device": torch.cuda.get_device_name() if device == "cuda" else f"cpu, {threads} thread(s)",
        "folded_ms": 1e3 * sorted(times["folded"])[repeats // 2],
        "published_ms": 1e3 * sorted(times["published order"])[repeats // 2],
        "ratio": ratio(times, "published order", "folded"),
    }


def main() -> None:
    keep_freed_memory()  # as cenote probe does; the peers run in the same process
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = [row(SMALL, threads, device, 15) for threads in ((1, 2) if device == "cpu" else (0,))]
    if "--large" in sys.argv:
        rows.append(row(LARGE, 2, device, 3))
    # Judged on one thread, as the figure it is held against was measured; more threads are rows of the table.
    finish("latent_attention", "the published order", 6, rows, rows[0]["ratio"], __doc__)


if __name__ == "__main__":
    main()
