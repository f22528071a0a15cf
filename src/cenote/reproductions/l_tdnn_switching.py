"""Clips in which the layer that tells the speaker changes from frame to frame, and verification on unseen speakers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cenote.ops.verification import equal_error_rate
from cenote.pooling.attentive_statistics import AttentiveStatistics
from cenote.pooling.l_tdnn import LTDNN
from cenote.pooling.layers import WeightedLayers
from cenote.tuning.margin import AAMSoftmax

LAYERS, DIM, FRAMES = 5, 16, 12
TRAIN_SPEAKERS, TEST_SPEAKERS, TEST_CLIPS = 100, 60, 6
NOISE = 0.3
VECTOR = 32


class StaticSum(nn.Module):
    """The usual back end: one learned weighted sum of the layers, a 1-D TDNN over frames, attentive statistics."""

    def __init__(self, channels: int = 16, hidden_size: int = 32) -> None:
        super().__init__()
        self.layers = WeightedLayers(DIM, LAYERS)
        steps: list[nn.Module] = [nn.BatchNorm1d(DIM)]
        for width, kernel, dilation in ((DIM, 5, 1), (channels, 3, 2), (channels, 3, 3), (channels, 3, 4)):
            conv = nn.Conv1d(width, channels, kernel, dilation=dilation, padding="same")
            steps += [conv, nn.ReLU(), nn.BatchNorm1d(channels)]
        self.tdnn = nn.Sequential(*steps, nn.Conv1d(channels, hidden_size, 1), nn.ReLU(), nn.BatchNorm1d(hidden_size))
        self.pool = AttentiveStatistics(hidden_size)
        self.out = nn.Sequential(
            nn.BatchNorm1d(2 * hidden_size), nn.Linear(2 * hidden_size, VECTOR), nn.BatchNorm1d(VECTOR)
        )

    def forward(self, hidden: Tensor) -> Tensor:
        return self.out(self.pool(self.tdnn(self.layers(hidden).mT).mT))


def layer_aware() -> nn.Module:
    """L-TDNN at the size of the task."""
    return LTDNN(DIM, LAYERS, conv_dim=16, hidden_size=32, num_heads=4, pool_dim=VECTOR)


def speakers(count: int, generator: torch.Generator) -> Tensor:
    """What a speaker sounds like: ``(count, DIM - 1)``, standard normal."""
    return torch.randn(count, DIM - 1, generator=generator)


def switching_clips(voices: Tensor, generator: torch.Generator, distractor: bool = True) -> Tensor:
    """One clip of each voice, ``(clips, LAYERS, FRAMES, DIM)``.

    At every frame one random layer carries the voice and, in the last channel, a flag of 1; the other layers carry
    the clip's distractor, a vector like a voice that belongs to nobody and changes from clip to clip, or nothing.
    Normal noise of deviation 0.3 is added everywhere.
    """
    count = len(voices)
    other = torch.randn(voices.shape, generator=generator) * distractor
    telling = torch.randint(LAYERS, (count, FRAMES), generator=generator)
    flag = F.one_hot(telling, LAYERS).mT.unsqueeze(-1).float()
    clips = torch.cat([torch.where(flag > 0, voices[:, None, None], other[:, None, None]), flag], dim=-1)
    return clips + NOISE * torch.randn(clips.shape, generator=generator)


def train_speakers(
    build: Callable[[], nn.Module],
    seed: int,
    distractor: bool = True,
    margin: float = 0.0,
    scale: float = 10.0,
    steps: int = 220,
    batch: int = 64,
) -> nn.Module:
    """Train ``build()`` to tell 100 speakers apart on new clips at every step (Adam at 3e-3); in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    voices = speakers(TRAIN_SPEAKERS, generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, loss = build(), AAMSoftmax(VECTOR, TRAIN_SPEAKERS, margin=margin, scale=scale)
        parameters = [*model.parameters(), *loss.parameters()]
        optimiser = torch.optim.Adam(parameters, lr=3e-3)
        for _ in range(steps):
            labels = torch.randint(TRAIN_SPEAKERS, (batch,), generator=generator)
            optimiser.zero_grad()
            loss(model(switching_clips(voices[labels], generator, distractor)), labels).loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 5.0)
            optimiser.step()
    return model.eval()


@torch.no_grad()
def verification_error(model: Callable[[Tensor], Tensor], seed: int, distractor: bool = True) -> float:
    """Equal error rate over all pairs of six clips each of 60 speakers that training has not seen."""
    generator = torch.Generator().manual_seed(10_000 + seed)
    labels = torch.arange(TEST_SPEAKERS).repeat_interleave(TEST_CLIPS)
    voices = speakers(TEST_SPEAKERS, generator)[labels]
    vectors = F.normalize(model(switching_clips(voices, generator, distractor)), dim=-1)
    first, second = torch.triu_indices(len(labels), len(labels), offset=1)
    scores = (vectors @ vectors.T)[first, second].double().numpy()
    return equal_error_rate(scores, np.asarray(labels[first] == labels[second]))
