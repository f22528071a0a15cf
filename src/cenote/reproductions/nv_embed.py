"""NV-Embed: one token among many that an average cannot find, and a loss that respects shared labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cenote.pooling import create_pooling
from cenote.reproductions.base import Finding, Reproduction, Settings, finding
from cenote.reproductions.fitting import Labelled, converged_accuracy
from cenote.reproductions.nv_embed_exact import DIM, SIZES, exact_findings, timings
from cenote.reproductions.planted import planted_parts
from cenote.reproductions.rows_figure import draw_rows
from cenote.reproductions.two_views import retrieval, train_two_views
from cenote.tuning.contrastive import info_nce, select_hard_negatives

CLAIM = "Tokens that read a learned dictionary before they are averaged embed better than their plain mean."
RETRIEVAL = "retrieval@1 of 512"
BATCH = 32
"""Queries a batch where labels are shared; there are 8 classes."""


def run(settings: Settings) -> list[Finding]:
    settings.progress("needle among 8 tokens")
    found = _needle_of_8(settings.seeds)
    if not settings.quick:
        settings.progress("needle among 16 tokens")
        found += _needle_of_16(settings.seeds)
    settings.progress("labels shared within a batch")
    found += _shared_labels(settings.seeds, settings.quick)
    settings.progress("exact properties and costs")
    return [*found, *_false_negatives(settings.seeds), *exact_findings(), *timings()]


def needle(items: int, generator: torch.Generator, tokens: int, flag: float) -> tuple[Tensor, Tensor]:
    """Two views of each item, ``(items, tokens, 24)``: standard normal noise but for one token at a random place.

    That token's first 16 channels are the item's own normal vector, the same in both views; ``flag`` is added to its
    channel 16.
    """
    content = torch.randn(items, 16, generator=generator)

    def view() -> Tensor:
        x = torch.randn(items, tokens, DIM, generator=generator)
        every, where = torch.arange(items), torch.randint(tokens, (items,), generator=generator)
        x[every, where, :16] = content
        x[every, where, 16] += flag
        return x

    return view(), view()


def classes(targets: Tensor, generator: torch.Generator, centres: Tensor, shared: Tensor | None = None) -> Tensor:
    """One item for each entry of ``targets``, ``(items, 4, 24)``: three tokens of noise, one flagged by 10.

    To the first 16 channels of the flagged token, noise too, the centre of the class is added, and ``shared``
    ``(items, 16)`` where two items are to have more in common than their class.
    """
    x = torch.randn(len(targets), 4, DIM, generator=generator)
    every, where = torch.arange(len(targets)), torch.randint(4, (len(targets),), generator=generator)
    x[every, where, :16] += centres[targets] if shared is None else centres[targets] + shared
    x[every, where, 16] += 10.0
    return x


class MeanLinear(nn.Sequential):
    """The mean of the tokens and a linear map."""

    def __init__(self) -> None:
        super().__init__(create_pooling("mean", dim=DIM), nn.Linear(DIM, DIM))


def _latents(readout: str) -> nn.Module:
    return create_pooling(readout, dim=DIM, **SIZES)


def _found(
    build: Callable[[], nn.Module], seeds: Sequence[int], tokens: int, flag: float, steps: int
) -> tuple[float, ...]:
    draw = partial(needle, tokens=tokens, flag=flag)
    return tuple(retrieval(train_two_views(build, draw, seed, steps), draw, seed, items=512) for seed in seeds)


def _needle_of_8(seeds: Sequence[int]) -> list[Finding]:
    latent = _found(partial(_latents, "latent_attention"), seeds, tokens=8, flag=10.0, steps=500)
    mean = _found(MeanLinear, seeds, tokens=8, flag=10.0, steps=500)
    return [
        Finding(
            claim="Latent attention finds the one telling token of 8, which mean and linear map cannot.",
            expected="at least 0.99, with the mean at most 0.02",
            values=latent,
            passed=tuple(a >= 0.99 and b <= 0.02 for a, b in zip(latent, mean, strict=True)),
            paper="MTEB average 69.32 against 68.97 for the mean (bidirectional, v1 data); not comparable",
            unit=RETRIEVAL,
            note=(
                "The paper's benchmark, MTEB after fine-tuning Mistral-7B on millions of pairs, is out of reach on one "
                "machine. In its place stand a planted task that needs what the layer adds to a mean, the reference "
                "tensors of the official code, and the layer's algebra. The specification leaves the strength of the "
                "flag open; here 10 is added to one channel of the telling token. A weaker flag is mistaken for noise "
                "now and then, and retrieval falls with it: the strength was raised until 0.99 could be reached."
            ),
        ),
        finding(
            "The mean of 8 tokens and a linear map, trained in the same way, stay near chance.",
            "at most 0.02 (chance is 0.002)",
            mean,
            lambda v: v <= 0.02,
            unit=RETRIEVAL,
        ),
    ]


def _needle_of_16(seeds: Sequence[int]) -> list[Finding]:
    def claim(text: str, readout: str, steps: int, expected: str, note: str = "") -> Finding:
        values = _found(partial(_latents, readout), seeds, tokens=16, flag=5.0, steps=steps)
        good = sum(v >= 0.9 for v in values)
        counted = f"{good} of {len(values)} seeds get there. {note}".strip()
        return finding(text, expected, values, lambda v: v >= 0.9, unit=RETRIEVAL, note=counted)

    return [
        claim(
            "With 16 tokens, a flag of 5 and 300 steps latent attention still finds the token.",
            "latent_attention",
            300,
            "at least 0.9 (specification: one seed of three)",
            "Training stands on a plateau at the loss of chance; the next but one row says that more steps leave it.",
        ),
        claim(
            "With 16 tokens, a flag of 5 and 300 steps latents that ask (latent_pooling) find the token.",
            "latent_pooling",
            300,
            "at least 0.9 (specification: three seeds of three)",
        ),
        claim(
            "With 16 tokens, a flag of 5 and 1000 steps latent attention finds the token.",
            "latent_attention",
            1000,
            "at least 0.9",
        ),
    ]


def _shared_labels(seeds: Sequence[int], quick: bool) -> list[Finding]:
    steps = 200 if quick else 400
    wide = [_gain(seed, steps, width=DIM) for seed in seeds]
    narrow = [_gain(seed, steps, width=4) for seed in seeds]
    setting = (
        "8 classes, 32 queries a batch, 7 negatives of other classes each, the positive another example of the class; "
        f"{steps} steps; accuracy of a converged linear probe on the embeddings of 8000 new items."
    )
    found = [
        finding(
            "Labels shared in the batch: a linear probe is better without in-batch negatives, 24 dimensions.",
            "at least 1 point",
            [own - batch for own, batch in wide],
            lambda v: v >= 1,
            paper="MTEB 71.94 without, 70.83 with in-batch negatives (one stage); not comparable",
            unit="points gained",
            note=(
                f"{setting} {_accuracies(wide)} A trial with 64 classes in place of 8 (two seeds, not part of this "
                "run) went the other way, in-batch negatives ahead by 4 to 9 points."
            ),
        ),
        finding(
            "Labels shared in the batch: a linear probe is better without in-batch negatives, 4 dimensions.",
            "at least 1 point",
            [own - batch for own, batch in narrow],
            lambda v: v >= 1,
            unit="points gained",
            note=(
                f"{_accuracies(narrow)} In-batch negatives make the embedding tell examples of one class apart, which "
                "has its price where there is little room. This width was tried after the wide one had shown no clear "
                "gain."
            ),
        ),
    ]
    if not quick:
        pairs = [_gain(seed, steps, width=4, pairs=True) for seed in seeds]
        found.append(
            finding(
                "The same, 4 dimensions, where query and positive also share a vector of their own.",
                "at least 1 point",
                [own - batch for own, batch in pairs],
                lambda v: v >= 1,
                unit="points gained",
                note=_accuracies(pairs),
            )
        )
    return found


def _accuracies(pairs: Sequence[tuple[float, float]]) -> str:
    own, batch = (", ".join(f"{value:.1f}" for value in values) for values in zip(*pairs, strict=True))
    return f"Accuracies by seed: own negatives only {own} %; with in-batch negatives {batch} %."


def _gain(seed: int, steps: int, width: int, pairs: bool = False) -> tuple[float, float]:
    """Probe accuracies in per cent after training without and with in-batch negatives."""
    centres = torch.randn(8, 16, generator=torch.Generator().manual_seed(9_000 + seed))

    def make(items: int, number: int) -> Labelled:
        generator = torch.Generator().manual_seed(7_000 + number)
        targets = torch.randint(8, (items,), generator=generator)
        return Labelled(classes(targets, generator, centres), targets)

    parts = planted_parts(make, seed, test=8000)
    own, batch = (_classifier(seed, centres, width, pairs, in_batch, steps) for in_batch in (False, True))

    def accuracy(model: nn.Module) -> float:
        return converged_accuracy(parts, lambda x: F.normalize(model(x), dim=-1))

    return accuracy(own), accuracy(batch)


def _classifier(seed: int, centres: Tensor, width: int, pairs: bool, in_batch: bool, steps: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(_latents("latent_attention"), nn.Linear(DIM, width))
    optimiser = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(steps):
        y = torch.randint(8, (BATCH,), generator=generator)
        others = (y[:, None] + torch.randint(1, 8, (BATCH, 7), generator=generator)) % 8
        shared = torch.randn(BATCH, 16, generator=generator) if pairs else None
        items = [classes(y, generator, centres, shared) for _ in range(2)] + [
            classes(others.flatten(), generator, centres)
        ]
        query, positive, negative = model(torch.cat(items)).split([BATCH, BATCH, BATCH * 7])
        loss = info_nce(query, positive, negative.unflatten(0, (BATCH, 7)), in_batch=in_batch)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model.eval()


def _false_negatives(seeds: Sequence[int]) -> list[Finding]:
    kept, unfiltered, alike = zip(*(planted_duplicates(seed) for seed in seeds), strict=True)
    unit = "% of planted documents that become negatives"
    return [
        finding(
            "The filter at 95 % of the positive's score leaves no planted duplicate of it among 7 hard negatives.",
            "0",
            kept,
            lambda v: v == 0,
            unit=unit,
        ),
        finding(
            "Without the filter the planted duplicates become negatives.",
            "at least 95 %",
            unfiltered,
            lambda v: v >= 95,
            unit=unit,
        ),
        finding(
            "The filter also keeps out documents that were made like the positive but apart from it.",
            "0",
            alike,
            lambda v: v == 0,
            unit=unit,
            note="It removes copies, not relevance: a relevant document that scores lower than the positive passes.",
        ),
    ]


def planted_duplicates(seed: int, queries: int = 200) -> tuple[float, float, float]:
    """How many planted documents become hard negatives of their query, in per cent.

    A positive is its query with noise of 0.1 a channel, of 32; a duplicate is the positive with noise of 0.002.

    Returns:
        Duplicates chosen with the filter, and without; with it, other documents made as the positive was.
    """
    generator = torch.Generator().manual_seed(seed)

    def unit(base: Tensor, noise: float) -> Tensor:
        return F.normalize(base + noise * torch.randn(queries, 32, generator=generator), dim=-1)

    query = unit(torch.zeros(queries, 32), 1.0)
    positive, alike = unit(query, 0.1), unit(query, 0.1)
    documents = torch.cat([unit(positive, 0.002), alike, *(unit(torch.zeros(queries, 32), 1.0) for _ in range(5))])
    scores, own = query @ documents.T, (query * positive).sum(dim=1)
    filtered = select_hard_negatives(scores, own, top_k=7)
    mine = torch.arange(queries)[:, None]

    def share(chosen: Tensor) -> float:
        return 100 * chosen.any(dim=1).double().mean().item()

    return (
        share((filtered.chosen == mine) & filtered.valid),
        share(scores.topk(7).indices == mine),
        share((filtered.chosen == mine + queries) & filtered.valid),
    )


REPRODUCTION = Reproduction("nv-embed", CLAIM, run, draw_rows)
