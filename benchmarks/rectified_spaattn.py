"""Rectified block-sparse attention of video tokens against dense scaled-dot-product attention.

One grid of 16 x 32 x 32 tokens by default (16384), blocks of 128, float32. Rows go through the densities that the
paper's settings keep (0.1 to 0.25) and 0.5; each gives dense time over ours, and what the estimate and the correction
cost on top of plain block-sparse attention over the same blocks. Every part is in the time: means, selection,
correction. The curve is made once per grid and is not.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
import torch.nn.functional as F
from common import finish, interleaved, ratio

from cenote.ops.block_sparse import block_sparse_attention
from cenote.ops.rectified_attention import rectified_attention

GOAL = 3.0
DENSITIES = (0.2, 0.1, 0.25, 0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--backend", default="auto", help="auto, torch or flex")
    options, _ = parser.parse_known_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, options.heads, options.tokens, options.head_dim, device=device)
    blocks = -(-options.tokens // options.block_size)
    rows: list[dict[str, Any]] = []
    for density in DENSITIES:
        settings: dict[str, Any] = {"block_size": options.block_size, "backend": options.backend}
        keep = {"top_k": max(1, round(density * blocks)), "p": 1e-9}
        with torch.no_grad():
            first = rectified_attention(q, k, v, **keep, **settings)
            peer = rectified_attention(q, k, v, **keep, **settings | {"backend": "torch"})
            torch.testing.assert_close(first.output, peer.output, rtol=1e-3, atol=1e-4)

            def rectified(keep: dict[str, Any] = keep, settings: dict[str, Any] = settings) -> None:
                rectified_attention(q, k, v, **keep, **settings)

            def plain(mask: torch.Tensor = first.block_mask, settings: dict[str, Any] = settings) -> None:
                block_sparse_attention(q, k, v, mask, causal=False, **settings)

            def dense() -> None:
                F.scaled_dot_product_attention(q, k, v)

            times = interleaved({"dense": dense, "plain": plain, "ours": rectified}, options.repeats, warmup=2)
        rows.append(
            {
                "device": device,
                "threads": torch.get_num_threads(),
                "tokens": options.tokens,
                "density": float(first.block_mask.float().mean()),
                "dense ms": min(times["dense"]) * 1e3,
                "plain ms": min(times["plain"]) * 1e3,
                "cenote ms": min(times["ours"]) * 1e3,
                "ratio": ratio(times, "dense", "ours"),
                "over plain": ratio(times, "ours", "plain"),
            }
        )
    finish("rectified_spaattn", "dense attention at 20 % density", GOAL, rows, rows[0]["ratio"], __doc__)


if __name__ == "__main__":
    main()
