"""SPP: one length whatever the map's size, maps shared by many regions, and training at several sizes."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cenote.ops.pyramid import pyramid_pool_windows, spatial_pyramid_pool
from cenote.ops.receptive_field import receptive_field
from cenote.ops.regions import spp_regions
from cenote.pooling.spp import SPP
from cenote.reproductions.base import Finding, Reproduction, Settings, finding
from cenote.reproductions.digit_encoders import digits, embedded
from cenote.reproductions.fitting import Labelled
from cenote.reproductions.golden import golden_findings
from cenote.reproductions.rows_figure import draw_rows
from cenote.reproductions.small_cnn import accuracy, fashion, train_cnn
from cenote.reproductions.timing import time_ratio

CLAIM = (
    "A spatial pyramid frees a network from one input size: trained at several sizes it keeps its accuracy at a size "
    "it has not seen, and loses nothing to fixed-size pooling at its own."
)
LEVELS = (6, 3, 2, 1)
FASHION = "fashion_mnist/fashion_mnist_12k_4k.npz"


def run(settings: Settings) -> list[Finding]:
    trained = _digits(settings)
    if not settings.quick and settings.data_dir is not None and (settings.data_dir / FASHION).exists():
        images = fashion(str(settings.data_dir / FASHION), train=3000, test=2000)
        trained = _training(settings, "Fashion-MNIST", *images, sizes=(28, 22), unseen=(24, 36), epochs=7) + trained
    settings.progress("exact properties")
    exact = exact_findings(40 if not settings.quick else 16)
    settings.progress("speed of regions")
    return [*trained, *_speed(settings), *exact]


def exact_findings(largest: int = 16) -> list[Finding]:
    """Everything that holds whatever the data; maps up to ``largest`` cells a side are tried."""
    return [*golden_findings("spp"), *_layer(largest), *_regions()]


def _digits(settings: Settings) -> list[Finding]:
    images = digits(embedded().config)
    return _training(
        settings, "digits", images.train, images.test, sizes=(8, 6), unseen=(7, 10), epochs=9 if settings.quick else 21
    )


def _training(
    settings: Settings,
    data: str,
    train: Labelled,
    test: Labelled,
    sizes: tuple[int, int],
    unseen: Sequence[int],
    epochs: int,
) -> list[Finding]:
    """Networks with each pooling at one size, and with the pyramid at two; one of each a seed."""
    native = sizes[0]
    scores: dict[str, list[float]] = {name: [] for name in ("spp", "max", "average", "flatten")}
    saved: dict[int, list[float]] = {size: [] for size in unseen}
    table: dict[str, list[float]] = {name: [0.0] * (1 + len(unseen)) for name in ("one size", "two sizes")}
    for seed in settings.seeds:
        settings.progress(f"{data}: train five networks, seed {seed}")
        networks = {name: train_cnn(train, name, (native,), seed, epochs) for name in scores}
        for name, network in networks.items():
            scores[name].append(accuracy(network, test, native))
        several = train_cnn(train, "spp", sizes, seed, epochs)
        at = {
            name: [accuracy(network, test, size) for size in (native, *unseen)]
            for name, network in (("one size", networks["spp"]), ("two sizes", several))
        }
        for number, size in enumerate(unseen, 1):
            drops = {name: values[0] - values[number] for name, values in at.items()}
            saved[size].append(drops["one size"] - drops["two sizes"])
        for name, values in at.items():
            table[name] = [total + v / len(settings.seeds) for total, v in zip(table[name], values, strict=True)]
    means = {name: sum(values) / len(values) for name, values in scores.items()}
    written = ", ".join(f"{name} {value:.1f}" for name, value in means.items())
    at_sizes = "; ".join(
        f"trained at {name}: " + ", ".join(f"{v:.1f} % at {s}" for s, v in zip((native, *unseen), values, strict=True))
        for name, values in table.items()
    )
    unit = f"points on {data}"
    return [
        *(
            finding(
                f"{data}: trained at {native} and {sizes[1]} pixels instead of {native} alone, accuracy drops less at "
                f"{size}, which neither saw.",
                "drops at least 3 points less",
                saved[size],
                lambda v: v >= 3,
                unit=unit,
                note=f"Accuracy, mean of the seeds: {at_sizes}. Sizes take turns by epoch."
                if size == unseen[0]
                else "",
            )
            for size in unseen
        ),
        finding(
            f"{data}: at {native} pixels the pyramid {{4, 2, 1}} at least matches global maximum and average.",
            "at least -0.5 points from the better one",
            [own - max(pair) for own, *pair in zip(scores["spp"], scores["max"], scores["average"], strict=True)],
            lambda v: v >= -0.5,
            unit=unit,
            note=f"Accuracy, mean of the seeds, in %: {written}. A small network, settings not tuned.",
        ),
        finding(
            f"{data}: at {native} pixels the pyramid is not worse than a fully connected layer on the flattened map.",
            "at least -1 point",
            [own - other for own, other in zip(scores["spp"], scores["flatten"], strict=True)],
            lambda v: v >= -1,
            paper="ZF-5 with 30 bins, fewer parameters than without: 35.99 to 35.06 % error (ImageNet)",
            unit=unit,
        ),
    ]


def _layer(largest: int) -> list[Finding]:
    generator = torch.Generator().manual_seed(0)
    pool = SPP(3, LEVELS)
    different, lengths, derived = 0.0, set(), 0.0
    for height, width in product(range(1, largest + 1), repeat=2):
        maps = torch.randn(1, 3, height, width, generator=generator)
        pooled = pool.pool_maps(maps)
        lengths.add(pooled.shape[1])
        direct = torch.cat([F.adaptive_max_pool2d(maps, n).flatten(1) for n in LEVELS], dim=1)
        different = max(different, _distance(pooled, direct))
        alone = torch.cat([spatial_pyramid_pool(maps, (n,)) for n in LEVELS], dim=1)
        derived = max(derived, _distance(pooled, alone))
    maps = torch.randint(-99, 99, (2, 3, 11, 14), generator=generator) / 8
    whole = torch.tensor([[0, 0, 14, 11]] * 2)
    plain = pool.pool_maps(maps)
    bins = [p.unflatten(1, (3, 4, 4)) for p in (SPP(3, (4,)).pool_maps(m) for m in (maps, maps.flip(-1)))]
    every = f"all maps from 1 x 1 to {largest} x {largest}"
    return [
        _zero(f"Equal to concatenated adaptive max pooling, {every}.", different),
        _zero("Levels derived from a finer one equal those pooled directly.", derived),
        finding("The length does not depend on the map's size.", "1", len(lengths), lambda v: v == 1, unit="lengths"),
        _zero("Flipping the map permutes the bins.", _distance(bins[1], bins[0].flip(-1))),
        _zero("A constant added to the map is added to the result.", _distance(pool.pool_maps(maps + 7), plain + 7)),
        _zero("Level 1 is global max pooling.", _distance(SPP(3, (1,)).pool_maps(maps), maps.amax(dim=(2, 3)))),
        _zero(
            "A window over the whole map pools as the map.",
            _distance(pyramid_pool_windows(maps, whole, torch.arange(2), LEVELS), plain),
        ),
    ]


def _regions() -> list[Finding]:
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(2, 4, 20, 30, generator=generator)
    windows, owner = random_windows(200, 20, 30), torch.randint(2, (200,), generator=generator)
    pooled = pyramid_pool_windows(maps, windows, owner, LEVELS)
    crops = [maps[b, :, y0:y1, x0:x1] for b, (x0, y0, x1, y1) in zip(owner.tolist(), windows.tolist(), strict=True)]
    order = torch.randperm(200, generator=generator)
    single = torch.cat([pyramid_pool_windows(maps, windows[i : i + 1], owner[i : i + 1], LEVELS) for i in range(20)])
    # No ties: distinct values, further apart than the step of the numerical gradient.
    distinct = torch.randperm(2 * 42, generator=generator).double().view(1, 2, 6, 7).requires_grad_()
    some = torch.tensor([[0, 0, 7, 6], [2, 1, 5, 6]])
    passes = torch.autograd.gradcheck(
        lambda m: pyramid_pool_windows(m, some, torch.zeros(2, dtype=torch.long), (3, 2, 1)), (distinct,)
    )
    return [
        _zero(
            "Windows on a shared map equal the crops pooled one by one.",
            _distance(pooled, spatial_pyramid_pool(crops, LEVELS)),
        ),
        _zero(
            "Order and batching of the windows do not matter.",
            max(
                _distance(pyramid_pool_windows(maps, windows[order], owner[order], LEVELS), pooled[order]),
                _distance(single, pooled[:20]),
            ),
        ),
        finding(
            "Gradients pass gradcheck in float64 on maps without ties.",
            "passes",
            float(passes),
            lambda v: v == 1,
            unit="(1 = passes)",
        ),
    ]


def random_windows(count: int, height: int, width: int, seed: int = 1) -> Tensor:
    """Windows ``x0, y0, x1, y1`` with corners anywhere on a map of ``height x width`` cells."""
    generator = torch.Generator().manual_seed(seed)

    def ends(length: int) -> tuple[Tensor, Tensor]:
        pair = torch.randint(length, (count, 2), generator=generator).sort(dim=1).values
        return pair[:, 0], pair[:, 1] + 1

    (x0, x1), (y0, y1) = ends(width), ends(height)
    return torch.stack([x0, y0, x1, y1], dim=1)


def _speed(settings: Settings) -> list[Finding]:
    found = [_against_crops(settings)]
    if importlib.util.find_spec("torchvision") is not None:
        found.append(_against_roi_pool(settings))
    return found


@torch.no_grad()
def _against_crops(settings: Settings) -> Finding:
    """One pass of the convolutions and 2000 regions, against the convolutions on every region."""
    torch.manual_seed(0)
    layers = [(3, 2, 1)] * 4
    channels = (3, 32, 64, 128, 256)
    network = nn.Sequential(
        *(
            part
            for i, (k, s, p) in enumerate(layers)
            for part in (nn.Conv2d(channels[i], channels[i + 1], k, s, p), nn.ReLU())
        )
    )
    image = torch.randn(1, 3, 960, 1280)
    boxes = 16 * random_windows(2000, 60, 80).double()
    crops = torch.randn(4, 3, 224, 224)

    def shared() -> Tensor:
        maps = network(image)[0]
        field = receptive_field(layers)
        return spp_regions([maps], boxes, (960, 1280), scales=[960], field=field, levels=LEVELS).pooled

    ratio = time_ratio(lambda: network(crops), shared, rounds=3 if settings.quick else 7, warmup=1)
    return finding(
        "2000 regions of one image: one shared map is faster than the convolutions on every region.",
        "at least 10 times (1 to 2 orders of magnitude)",
        ratio * len(boxes) / len(crops),
        lambda v: v >= 10,
        paper="38 to 102 times (R-CNN, five scales and one, ZF-5)",
        unit="times",
        note=(
            "Four convolutions of stride 2 to 256 channels; map of 60 x 80 cells; regions warped to 224 pixels as in "
            f"R-CNN. The time of 2000 regions is that of a batch of {len(crops)}, scaled up."
        ),
    )


@torch.no_grad()
def _against_roi_pool(settings: Settings) -> Finding:
    from torchvision.ops import roi_pool

    maps = torch.randn(1, 256, 60, 80, generator=torch.Generator().manual_seed(0))
    windows = random_windows(500 if settings.quick else 2000, 60, 80)
    owner = torch.zeros(len(windows), dtype=torch.long)
    inclusive = torch.cat([owner[:, None], windows[:, :2], windows[:, 2:] - 1], dim=1).float()

    def peer() -> Tensor:
        return torch.cat([roi_pool(maps, inclusive, n).flatten(1) for n in LEVELS], dim=1)

    def ours() -> Tensor:
        return pyramid_pool_windows(maps, windows, owner, LEVELS)

    different = _distance(ours(), peer())
    return finding(
        f"{len(windows)} regions on a (256, 60, 80) map: the divisor saving is faster than four roi_pool calls.",
        "at least 1.5 times, identical output",
        time_ratio(peer, ours, rounds=3 if settings.quick else 7, warmup=1),
        lambda v: v >= 1.5 and different == 0,
        paper="1.5 to 3 times (specification)",
        unit="times",
        note=f"torchvision; {torch.get_num_threads()} thread(s); largest difference of the outputs {different:g}.",
    )


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def _zero(claim: str, value: float) -> Finding:
    return finding(claim, "0", value, lambda v: v == 0, unit="largest difference")


REPRODUCTION = Reproduction("spp", CLAIM, run, draw_rows, needs=(FASHION,))
