"""Measure what docs/scale.md reckons with, and write the page's tables.

    python tools/measure_scale.py             measure (minutes, an idle machine), write docs/scale.json and the page
    python tools/measure_scale.py --page      only write the tables anew from docs/scale.json
    python tools/measure_scale.py --quick     print measurements at tiny sizes, to see that it runs

All on one thread: a machine with so many cores does so many times as much, as far as its memory follows.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from cenote.files import write_all
from cenote.probe.scale import amount, duration, footprint, stored_bytes, vit_macs

DOCS = Path(__file__).resolve().parents[1] / "docs"
SCALES = (10**5, 10**6, 10**7, 10**8, 10**9)
BANDWIDTHS = {"disk, 0.5 GB/s": 0.5e9, "object store, 10 Gb/s": 1.25e9, "NVMe, 3 GB/s": 3e9, "100 Gb/s": 12.5e9}
HOSTS = {  # name: tokens, width, blocks
    "embedded (8 x 8 image)": (17, 64, 4),
    "ViT-S/16 at 224": (197, 384, 12),
    "ViT-B/16 at 224": (197, 768, 12),
    "BERT-base, 128 tokens": (128, 768, 12),
}
KEPT = {  # what is kept: (tokens of a host, layers of a host) to (tokens, layers), and the stored type
    "one vector, float32": (lambda tokens, layers: (1, 1), "float32"),
    "one vector a layer, float32": (lambda tokens, layers: (1, layers), "float32"),
    "tokens of one layer, float16": (lambda tokens, layers: (tokens, 1), "float16"),
    "tokens of one layer, float32": (lambda tokens, layers: (tokens, 1), "float32"),
    "tokens of all layers, float16": (lambda tokens, layers: (tokens, layers), "float16"),
}
GPU_MACS = 1e14
"""Multiply-accumulates a second of one large GPU in half precision at some 20 % of its peak: an assumption."""


# --- measuring


def rate(call: Callable[[], Any], items: int, seconds: float) -> float:
    """Items a second of a call on ``items``: the best of the runs that fit the time, three at least."""
    call()
    best, begin, runs = float("inf"), time.perf_counter(), 0
    while runs < 3 or time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        call()
        best, runs = min(best, time.perf_counter() - start), runs + 1
    return items / best


def measure(quick: bool = False) -> dict[str, Any]:
    """Rates on one thread of this machine."""
    import timm
    import torch

    from cenote.backbones import load_backbone
    from cenote.data.base import Split
    from cenote.data.items import ArrayImages
    from cenote.probe.extract import extract
    from cenote.probe.feed import Feed
    from cenote.probe.heads import Member
    from cenote.probe.plan import Candidate
    from cenote.probe.tasks import Objective
    from cenote.probe.train import Group, Schedule

    torch.set_num_threads(1)
    torch.manual_seed(0)
    seconds = 0.0 if quick else 10.0
    count, batch = (128, 1) if quick else (20_000, 16)
    embedded = load_backbone("embedded")
    pixels = torch.randint(0, 256, (count, 8, 8), dtype=torch.uint8).numpy()
    split = Split(ArrayImages(pixels), torch.arange(count) % 10, [str(n) for n in range(count)], "random")
    with tempfile.TemporaryDirectory() as cache:
        start = time.perf_counter()
        store = extract(embedded, split, layers="all", cache_dir=cache)
        extraction = count / (time.perf_counter() - start)
        order = torch.randperm(count)
        reading = rate(lambda: [store.batch(part) for part in order.split(128)], count, seconds)
        feed = Feed(store, split.targets, store.layers)
    vit = timm.create_model("vit_small_patch16_224", num_classes=0).eval()
    images = torch.randn(batch, 3, 224, 224)
    with torch.inference_mode():
        small = rate(lambda: vit.forward_features(images), batch, seconds)
    tokens = torch.randn(2 if quick else 64, 1, 196, 384)
    readouts = {}
    for name in ("ep(num_queries=32)", "simpool", "cait"):
        options: dict[str, Any] = {"cait": {"num_heads": 4}, "simpool": {"num_heads": 1}}.get(name, {})
        candidate = Candidate(name, (12,), "both", tuple(options.items()), (Member(0.01, 1.0, 0),))
        group = Group.create(candidate, 384, Objective("classification", 10), Schedule(8, 1.0), True)
        features, targets = _features(tokens), torch.arange(len(tokens)) % 10
        readouts[name] = rate(lambda: group.step(features, targets, 1.0), len(tokens), seconds)  # noqa: B023
    assert len(feed) == count
    item = stored_bytes(17, 64, 4)
    return {
        "machine": f"{_processor()}, one thread",
        "torch": torch.__version__,
        "extraction, items a second": {"embedded, transform and store included": extraction},
        "backbone, items a second": {"ViT-S/16, random weights, float32": small},
        "reading in random order, bytes a second": reading * item,
        "training, items a second, one learning rate and seed, 196 tokens of 384": readouts,
    }


def _features(hidden: Any) -> Any:
    import torch

    from cenote.types import Features

    return Features(hidden, torch.ones(hidden.shape[0], hidden.shape[2], dtype=torch.bool), (12,))


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


# --- the page


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    lines = [list(head), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def bytes_table() -> str:
    def cell(host: tuple[int, int, int], kept: Any) -> str:
        tokens, layers = kept[0](host[0], host[2])
        return amount(stored_bytes(tokens, host[1], layers, kept[1]))

    return table(
        ["kept of an item", *HOSTS],
        [[name, *(cell(host, kept) for host in HOSTS.values())] for name, kept in KEPT.items()],
    )


def totals_table() -> str:
    tokens, dim, layers = HOSTS["ViT-B/16 at 224"]
    rows = []
    for name, (choose, dtype) in KEPT.items():
        kept = choose(tokens, layers)
        rows.append([name, *(amount(n * stored_bytes(kept[0], dim, kept[1], dtype)) for n in SCALES)])
    return table(["kept, ViT-B/16", *(f"{n:.0e} items".replace("e+0", "e") for n in SCALES)], rows)


def bandwidth_table() -> str:
    tokens, dim, layers = HOSTS["ViT-B/16 at 224"]
    rows = []
    for name, (choose, dtype) in KEPT.items():
        kept = choose(tokens, layers)
        times = [
            footprint(10**6, kept[0], dim, kept[1], dtype, backbone_rate=1, bandwidth=b).read_seconds
            for b in BANDWIDTHS.values()
        ]
        rows.append([name, *map(duration, times)])
    return table(["kept, ViT-B/16", *BANDWIDTHS], rows)


def backbone_table(measured: dict[str, Any]) -> str:
    vit = measured["backbone, items a second"]["ViT-S/16, random weights, float32"]
    small, base = vit_macs(224, 16, 384, 12), vit_macs(224, 16, 768, 12)
    tiny = vit_macs(8, 2, 64, 4, channels=1)
    speed = small * vit  # multiply-accumulates a second of this machine
    embedded = measured["extraction, items a second"]["embedded, transform and store included"]
    rows = []
    for name, macs, own, how in (
        ("embedded", tiny, embedded, "measured, with transform and store"),
        ("ViT-S/16", small, vit, "measured, network alone"),
        ("ViT-B/16", base, speed / base, "from ViT-S by multiply-accumulates"),
    ):
        gpu = "" if name == "embedded" else duration(1e6 / (GPU_MACS / macs))
        gpus = "" if name == "embedded" else duration(1e9 / (64 * GPU_MACS / macs))
        rows.append([name, amount(macs, "MAC"), amount(own, "items/s"), how, duration(1e6 / own), gpu, gpus])
    head = [
        "backbone",
        "an item",
        "one thread",
        "",
        "1e6 items, one thread",
        "1e6 items, one GPU",
        "1e9 items, 64 GPUs",
    ]
    return table(head, rows)


def training_table(measured: dict[str, Any]) -> str:
    read = measured["reading in random order, bytes a second"]
    found = measured["training, items a second, one learning rate and seed, 196 tokens of 384"]
    rows = []
    for name, own in found.items():
        cost = footprint(10**6, 196, 384, dtype="float16", backbone_rate=1, readout_rate=own, bandwidth=read)
        epoch = duration(cost.epoch_seconds)
        rows.append(
            [f"`{name}`", amount(own, "items/s"), duration(cost.read_seconds), epoch, duration(cost.train_seconds)]
        )
    return table(["readout", "one thread", "1e6 items: reading", "an epoch", "8 epochs"], rows)


def settings_table() -> str:
    """What to keep at each scale, by what fits: tokens to a few TB, vectors beyond."""
    tokens, dim, layers = HOSTS["ViT-S/16 at 224"]
    advice = {
        10**5: ("tokens of all layers", (tokens, layers), "float16", "up to 3", "all", "1", "local"),
        10**6: ("tokens of one layer", (tokens, 1), "float16", "1", "all of one layer", "1", "local"),
        10**7: ("tokens of one layer", (tokens, 1), "float16", "none", "the few best on a tenth", "10", "ray"),
        10**8: ("one vector a layer", (1, layers), "float32", "none", "fixed poolings, layer reductions", "64", "ray"),
        10**9: ("one vector", (1, 1), "float16", "none", "the pooling chosen on 1e6 items", "64", "ray"),
    }
    rows = []
    for items, (what, (kept, depth), dtype, views, readouts, machines, engine) in advice.items():
        cost = footprint(
            items,
            kept,
            dim,
            depth,
            dtype,
            backbone_rate=GPU_MACS / vit_macs(224, 16, dim, layers),
            machines=int(machines),
        )
        rows.append(
            [
                f"1e{len(str(items)) - 1}", f"{what}, {dtype}", views, amount(cost.bytes), f"{cost.shards:,}", readouts,
                engine, f"{machines}: {duration(cost.extract_seconds)}",
            ]
        )  # fmt: skip
    return table(["items", "keep", "views", "store", "shards", "readouts", "engine", "GPUs: extraction"], rows)


def tables(measured: dict[str, Any]) -> dict[str, str]:
    """Every table of the page by its mark."""
    return {
        "machine": f"Measured: {measured['machine']}, torch {measured['torch']}. Reading a store in random order: "
        f"{amount(measured['reading in random order, bytes a second'], 'B/s')}.",
        "bytes": bytes_table(),
        "totals": totals_table(),
        "bandwidth": bandwidth_table(),
        "backbone": backbone_table(measured),
        "training": training_table(measured),
        "settings": settings_table(),
    }


def fill(page: str, measured: dict[str, Any]) -> str:
    """The page with its tables written anew."""
    for mark, text in tables(measured).items():
        pattern = rf"(<!-- {mark} -->\n).*?(<!-- end -->)"
        fresh = lambda found, text=text: found[1] + text + "\n" + found[2]  # noqa: E731
        page, count = re.subn(pattern, fresh, page, flags=re.DOTALL)
        if count != 1:
            raise ValueError(f"the page has {count} places marked {mark!r}")
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", action="store_true", help="only write the tables anew")
    parser.add_argument("--quick", action="store_true", help="print measurements at tiny sizes")
    options = parser.parse_args()
    if options.quick:
        print(json.dumps(measure(quick=True), indent=2))
        return
    known = DOCS / "scale.json"
    measured = json.loads(known.read_text()) if options.page else measure()
    print(json.dumps(measured, indent=2))
    page = fill((DOCS / "scale.md").read_text(), measured)
    write_all(DOCS, {"scale.json": json.dumps(measured, indent=2) + "\n", "scale.md": page})


if __name__ == "__main__":
    main()
