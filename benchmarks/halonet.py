"""Halo attention against timm's layer and against dense attention: 64 channels, 4 heads, blocks of 8, halo 3.

Forward, and forward with backward (into the input and all parameters), at 32, 64 and 96 pixels a side. timm's layer
has the same weights and gives the same outputs. Dense attention with two-dimensional relative positions is our layer
with one block as large as the map; it is run forward only, up to ``--dense`` pixels. The ratio is the least one against
timm's over sizes and modes; that against dense attention (goal 10x at 64) is in the rows.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from common import finish, interleaved, ratio
from timm.layers.halo_attn import HaloAttn
from torch import Tensor, nn

from cenote.mixing.halo_attention import HaloAttention

DIM, GOAL = 64, 1.0
SETTINGS: dict[str, int] = {"num_heads": 4, "block_size": 8, "halo_size": 3}


def forward(layer: nn.Module, x: Tensor) -> Callable[[], Any]:
    def call() -> None:
        with torch.no_grad():
            layer(x)

    return call


def training(layer: nn.Module, x: Tensor) -> Callable[[], Any]:
    def call() -> None:
        layer.zero_grad()
        layer(x.detach().requires_grad_()).sum().backward()

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", type=int, nargs="+", default=[32, 64, 96])
    parser.add_argument("--dense", type=int, default=64, help="largest side at which dense attention is run")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    options, _ = parser.parse_known_args()
    torch.set_num_threads(options.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    theirs = HaloAttn(DIM, **SETTINGS).to(device)
    ours = HaloAttention.from_reference(theirs.state_dict(), dim=DIM, **SETTINGS).to(device)
    rows: list[dict[str, Any]] = []
    for side in options.sides:
        x = torch.randn(options.batch, DIM, side, side, device=device)
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
        for mode, timed in (("forward", forward), ("forward and backward", training)):
            calls = {"timm": timed(theirs, x), "cenote": timed(ours, x)}
            times = interleaved(calls, options.repeats)
            row = {"device": device, "threads": torch.get_num_threads(), "batch": options.batch, "pixels": side}
            row |= {"mode": mode, **{f"{name} ms": 1e3 * statistics.median(times[name]) for name in calls}}
            rows.append(row | {"ratio": ratio(times, "timm", "cenote")})
        if side <= options.dense:
            whole = HaloAttention(DIM, num_heads=4, block_size=side, halo_size=0).to(device)
            calls = {"dense": forward(whole, x), "cenote": forward(ours, x)}
            times = interleaved(calls, repeats=max(3, options.repeats // 5), warmup=1)
            rows[-2]["dense ms"] = 1e3 * statistics.median(times["dense"])
            rows[-2]["against dense"] = ratio(times, "dense", "cenote")
    finish("halonet", "timm's HaloAttn", GOAL, rows, min(row["ratio"] for row in rows), __doc__)


if __name__ == "__main__":
    main()
