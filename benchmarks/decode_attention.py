"""One query over 10 % of 16 thousand cached keys against dense attention: 8 heads of 64, a set of positions a head.

The ratio is the time of torch's scaled_dot_product_attention in float32 over ours, the same layer again and again
("repeated"). The rows hold the matmul form too, bfloat16, and the same with the layers of a whole model taken in turn
("in turn"), where nothing chosen is left in the processor's caches from the step before. What a selecting layer costs
beyond attention, and choosing, is in the rows "select". Outputs are compared with masked dense attention first.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from itertools import cycle
from typing import Any

import torch
import torch.nn.functional as F
from common import finish, interleaved, ratio
from torch import Tensor

from cenote.ops.gather_attention import Positions, decode_logits, gather_attention, topk_positions, weigh_values

GOALS = {torch.float32: 10.0, torch.bfloat16: 1.0}
Layer = tuple[Tensor, Tensor]


def matmul(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1) @ value


def select(query: Tensor, key: Tensor, value: Tensor, budget: int) -> tuple[Tensor, Positions]:
    logits = decode_logits(query, key)
    return weigh_values(logits.softmax(-1), value), topk_positions(logits, budget)


def over(layers: list[Layer], attend: Callable[[Tensor, Tensor], Any]) -> Callable[[], Any]:
    turn: Iterator[Layer] = cycle(layers)
    return lambda: attend(*next(turn))


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--budget", type=float, default=0.1, help="share of the keys")
    parser.add_argument("--layers", type=int, default=8, help="taken in turn")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=25)
    options, _ = parser.parse_known_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    budget = max(1, round(options.budget * options.tokens))
    rows: list[dict[str, Any]] = []
    value = 0.0
    for dtype in (torch.float32, torch.bfloat16):
        shape = (options.layers, 2, 1, options.heads, options.tokens + options.tokens // 64, options.head_dim)
        caches = torch.randn(shape, device=device).to(dtype)[:, :, :, :, : options.tokens]
        layers = [(cache[0], cache[1]) for cache in caches]
        query = torch.randn(1, options.heads, 1, options.head_dim, device=device).to(dtype)
        positions = topk_positions(decode_logits(query, layers[0][0]), budget)
        key, worth = layers[0]
        hidden = torch.full((1, options.heads, 1, options.tokens), float("-inf"), device=device, dtype=dtype)
        hidden.masked_fill_(positions.to_mask(options.tokens).unsqueeze(2), 0.0)
        expected = F.scaled_dot_product_attention(query.float(), key.float(), worth.float(), attn_mask=hidden.float())
        got = gather_attention(query, key, worth, positions).float()
        torch.testing.assert_close(got, expected, rtol=1e-4 if dtype == torch.float32 else 0.05, atol=2e-2)

        def dense(k: Tensor, v: Tensor, q: Tensor = query) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v)

        def plain(k: Tensor, v: Tensor, q: Tensor = query) -> Tensor:
            return matmul(q, k, v)

        def ours(k: Tensor, v: Tensor, q: Tensor = query, chosen: Positions = positions) -> Tensor:
            return gather_attention(q, k, v, chosen)

        def choosing(k: Tensor, v: Tensor, q: Tensor = query) -> Any:
            return select(q, k, v, budget)

        for name, used in (("repeated", layers[:1]), ("in turn", layers)):
            times: dict[str, list[float]] = {}
            for peer, call in (("sdpa", dense), ("matmul", plain), ("ours", ours), ("select", choosing)):
                # Each by itself: a dense call in between would empty the caches, which "in turn" shows.
                times |= interleaved({peer: over(used, call)}, options.repeats, warmup=max(3, len(used)))
            for peer in ("sdpa", "matmul"):
                row = {"device": device, "threads": options.threads, "dtype": str(dtype).removeprefix("torch.")}
                row |= {"layers": name, "keys": options.tokens, "chosen": budget, "peer": peer}
                row |= {f"{which} ms": min(times[at]) * 1e3 for which, at in (("peer", peer), ("cenote", "ours"))}
                row |= {"select ms": min(times["select"]) * 1e3, "ratio": ratio(times, peer, "ours")}
                if name == "repeated" and peer == ("sdpa" if dtype == torch.float32 else "matmul"):
                    row["goal"] = GOALS[dtype]
                    value = value or row["ratio"]
                rows.append(row)
    finish("decode_attention", "dense attention in float32", GOALS[torch.float32], rows, value, __doc__)


if __name__ == "__main__":
    main()
