"""Decoding and training of students with shared attention maps against their dense teacher, by share of layers.

Sources are explicit, all else runs the model's own fused kernel. The last layers share, so that there is one source.
Lengths show where sharing begins to pay. The ratio is that of decoding behind the longest past at three quarters of the
layers; the paper reports 1.42x at 77 % (TinyLlama on a V100, context not stated).
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

import torch
from common import finish, interleaved, ratio

from cenote.reproductions.echo_att_speed import build, decoding, training

GOAL = 1.2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 2048, 8192])
    parser.add_argument("--train-lengths", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--repeats", type=int, default=15)
    options, _ = parser.parse_known_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    heads = max(2, options.hidden // 64)
    sizes = (options.layers, options.hidden, heads, max(1, heads // 2), 2 * max(options.lengths))
    counts = {share: round(share * options.layers) for share in (0.25, 0.5, 0.75)}
    models = {"dense": build(*sizes).to(device)}
    models |= {f"{share:.0%}": build(*sizes, shared=count).to(device) for share, count in counts.items()}
    kernel = copy.deepcopy(models["75%"])
    for part in kernel.modules():
        if hasattr(part, "form"):
            part.form = "query_key"
    for config in {id(m.config): m.config for m in kernel.modules() if hasattr(m, "config")}.values():
        config.shared_form = "query_key"
    models["75% by queries and keys"] = kernel
    rows: list[dict[str, Any]] = []
    value = 0.0
    for kind, lengths in (("decode", options.lengths), ("train", options.train_lengths)):
        for length in lengths:
            ids = torch.zeros(2, length, dtype=torch.long, device=device)
            calls = {
                name: decoding(model, length) if kind == "decode" else training(model, ids)
                for name, model in models.items()
            }
            times = interleaved(calls, options.repeats)
            row: dict[str, Any] = {"device": device, "threads": torch.get_num_threads(), "kind": kind, "tokens": length}
            row |= {f"{name} ms": 1e3 * sorted(each)[len(each) // 2] for name, each in times.items()}
            row |= {f"{name} x": ratio(times, "dense", name) for name in models if name != "dense"}
            rows.append(row)
            if kind == "decode":
                value = row["75% x"]
    finish("echo_att", "the dense model's decoding step", GOAL, rows, value, __doc__)


if __name__ == "__main__":
    main()
