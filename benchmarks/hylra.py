"""HyLRA's decoding: a reusing layer against a dense one, and a whole model by its share of reusing layers.

Layer: attention of one new token, 8 heads of 64 channels, 16384 keys, float32, sets of 10 % of them in chunks of
64. The peer is torch's fused scaled-dot-product attention over all keys; the ratio is its time over the reusing
layer's.
Model: a random Llama of 8 layers with as many keys in a preallocated cache; one layer is full, 0 to 6 reuse, the rest
select. What a layer computes is checked against masked dense attention before anything is timed.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import torch
from common import finish, interleaved, ratio

from cenote.allocator import keep_freed_memory
from cenote.reproductions.hylra_cost import Decoding, layer_costs

GOAL = 10.0


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keys", type=int, default=16384)
    parser.add_argument("--share", type=float, default=0.1, help="of the keys that a set holds")
    parser.add_argument("--repeats", type=int, default=25)
    options, _ = parser.parse_known_args()
    keep_freed_memory()
    threads = torch.get_num_threads()
    costs = layer_costs(options.keys, share=options.share)
    torch.testing.assert_close(costs.select(), costs.reuse())
    torch.testing.assert_close(layer_costs(2048, share=1.0).reuse(), layer_costs(2048, share=1.0).dense())
    rows: list[dict[str, Any]] = []
    times = interleaved({"dense": costs.dense, "select": costs.select, "reuse": costs.reuse}, options.repeats, 5)
    for name in ("dense", "select", "reuse"):
        row = {"part": "layer", "threads": threads, "keys": options.keys, "what": name, "ms": min(times[name]) * 1e3}
        rows.append(row | {"dense / this": ratio(times, "dense", name)})
    value = rows[-1]["dense / this"]
    decoding = Decoding(options.keys, share=options.share)
    calls = {"dense": decoding.steps}
    calls |= {f"{reuse} of 8 reuse": partial(decoding.steps, decoding.plan(reuse)) for reuse in (0, 2, 4, 6)}
    times = interleaved(calls, max(3, options.repeats // 3), 1)
    for name in calls:
        row = {"part": "model, 4 tokens", "threads": threads, "keys": options.keys, "what": name}
        rows.append(row | {"ms": min(times[name]) * 1e3, "dense / this": ratio(times, "dense", name)})
    finish("hylra", "dense attention over all keys (reusing layer)", GOAL, rows, value, __doc__)


if __name__ == "__main__":
    main()
