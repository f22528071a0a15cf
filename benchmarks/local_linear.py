"""Causal local linear attention by conjugate gradients against softmax attention, over lengths.

With J iterations it should take at most J + 2 attentions: one to weigh the pairs, one product with the covariance each,
one to tilt the values. Peer is PyTorch's fused causal attention (forward, no gradient). What is held beyond input and
output is the largest tensor made inside, in numbers a token: it should not grow with the tokens. The ratio is J + 2
attentions over the time taken, at the longest sequence.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
import torch.nn.functional as F
from common import finish, interleaved, ratio

from cenote.ops.local_regression import local_polynomial
from cenote.reproductions.test_time_regression_scaling import LargestTensor

GOAL = 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--iterations", type=int, default=8)
    parser.add_argument("--block", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=9)
    options, _ = parser.parse_known_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    value = 0.0
    for length in options.lengths:
        q, k, v = (torch.randn(1, options.heads, length, options.head_dim, device=device) for _ in range(3))
        settings = {"solver": "cg", "iterations": options.iterations, "block": options.block}
        calls = {
            "attention": lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
            "local linear": lambda q=q, k=k, v=v, s=settings: local_polynomial(q, k, v, **s),
            "solved directly": lambda q=q, k=k, v=v: local_polynomial(q, k, v),
        }
        if length > options.lengths[0]:
            del calls["solved directly"]
        with torch.no_grad():
            times = interleaved(calls, options.repeats, warmup=1)
            with LargestTensor() as seen:
                calls["local linear"]()
        attentions = 1 / ratio(times, "attention", "local linear")
        value = (options.iterations + 2) / attentions
        row: dict[str, Any] = {"device": device, "threads": torch.get_num_threads(), "tokens": length}
        row |= {f"{name} ms": min(numbers) * 1e3 for name, numbers in times.items()}
        row |= {"attentions": attentions, "largest tensor / token": seen.numel / length, "ratio": value}
        rows.append(row)
    peer = f"the time of {options.iterations + 2} attentions"
    finish("local_linear", peer, GOAL, rows, value, __doc__)


if __name__ == "__main__":
    main()
