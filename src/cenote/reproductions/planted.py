"""Generated token data in which it is known where the class is written."""

from __future__ import annotations

from collections.abc import Callable

import torch

from cenote.reproductions.fitting import Labelled, Parts

CLASSES = 4


def planted_parts(make: Callable[[int, int], Labelled], seed: int, train: int = 2000, test: int = 2000) -> Parts:
    """Training, validation (a quarter of its size) and test part from ``make(items, seed)``."""
    return Parts(make(train, 3 * seed), make(train // 4, 3 * seed + 1), make(test, 3 * seed + 2))


def two_kinds_of_evidence(items: int, seed: int, noise: float = 1.0) -> Labelled:
    """A class of two bits, one of which a maximum shows best and the other an average.

    16 tokens of two groups of 8 channels. First group: uniform(0, 1) noise; where the first bit is set, the group's
    first channel is 1.5 larger in one random token. Second group: exponential noise of mean ``noise``; where the
    second bit is set, the group's first channel is 0.45 larger in every token.
    """
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(CLASSES, (items,), generator=generator)
    first, second = targets % 2, targets // 2
    uniform = torch.rand(items, 16, 8, generator=generator)
    exponential = -noise * torch.rand(items, 16, 8, generator=generator).neg().log1p()
    where = torch.randint(16, (items,), generator=generator)
    uniform[torch.arange(items), where, 0] += 1.5 * first
    exponential[:, :, 0] += 0.45 * second[:, None]
    return Labelled(torch.cat([uniform, exponential], dim=2), targets)


def one_token_among(distractors: int, dim: int = 32) -> Callable[[int, int], Labelled]:
    """Items of ``distractors`` tokens of standard normal noise and, at a random place, one that tells the class.

    The telling token is noise too, with 5 added to channel 0, which marks it, and 3 to one of the channels 1 to 4,
    which is the class. The mean of the tokens holds that in proportion ``1 / (distractors + 1)``, against noise that
    falls only with the root.
    """

    def make(items: int, seed: int) -> Labelled:
        generator = torch.Generator().manual_seed(seed)
        targets = torch.randint(CLASSES, (items,), generator=generator)
        tokens = torch.randn(items, distractors + 1, dim, generator=generator)
        every, where = torch.arange(items), torch.randint(distractors + 1, (items,), generator=generator)
        tokens[every, where, 0] += 5.0
        tokens[every, where, 1 + targets] += 3.0
        return Labelled(tokens, targets)

    return make
