"""Training or fine-tuning an image classifier whose attention is kept diverse."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from cenote.files import write_whole
from cenote.integrations.attention_capture import AttentionCapture, Keep
from cenote.ops.patch_augment import augment_patches

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class DiversitySettings:
    """How :func:`train_diverse` trains: AdamW, linear warm-up, cosine to 0, cross-entropy plus ``weight`` times ADL.

    Attributes:
        weight: lambda of the attention diversification loss; 0 trains without.
        threshold: of its gates, in multiples of uniform attention.
        epochs: passes over the images.
        batch_size: images a step.
        lr, weight_decay: of AdamW.
        warmup: share of the steps in which the rate grows.
        clip: largest norm of the gradient.
        patch_size: also learn, without ADL, from a view whose patches of this side are augmented one by one (RVT's
            recipe, :func:`cenote.ops.patch_augment.augment_patches`); ``None`` for no such view.
        pixel_range: smallest and largest pixel of that view.
        keep: how attention is read; ``"query_key"`` leaves fused attention on and stores no maps.
        seed: of order and augmentation; the model's weights are the caller's.
    """

    weight: float = 1.0
    threshold: float = 2.0
    epochs: int = 10
    batch_size: int = 64
    lr: float = 1e-3
    weight_decay: float = 0.05
    warmup: float = 0.1
    clip: float = 1.0
    patch_size: int | None = None
    pixel_range: tuple[float, float] | None = None
    keep: Keep = "query_key"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.weight < 0 or self.threshold <= 0:
            raise ValueError(
                f"expected a weight of at least 0 and a positive threshold, got {self.weight} and {self.threshold}"
            )
        if self.epochs < 1 or self.batch_size < 1:
            raise ValueError(f"expected an epoch and an image at least, got {self.epochs} and {self.batch_size}")


class Diversity(NamedTuple):
    """How alike the attention rows of a network are on some images.

    Attributes:
        adl: the thresholded loss; see :func:`~cenote.ops.attention_diversity.attention_diversification_loss`.
        similarity: the same without thresholds, to tell diverse attention from uniform attention.
    """

    adl: float
    similarity: float


class Epoch(NamedTuple):
    """Means over the steps of one pass.

    Attributes:
        epoch: from 1.
        task: cross-entropy on the images as they are.
        adl: the diversification loss, NaN where it is not asked for.
    """

    epoch: int
    task: float
    adl: float


@dataclass(frozen=True)
class DiverseTraining:
    """What :func:`train_diverse` did.

    Attributes:
        model: the trained network, in eval mode.
        epochs: one row a pass.
        settings: as given.
    """

    model: nn.Module
    epochs: tuple[Epoch, ...]
    settings: DiversitySettings

    def frame(self) -> pd.DataFrame:
        """One row a pass, with the settings' weight and threshold."""
        import pandas as pd

        rows = [each._asdict() for each in self.epochs]
        return pd.DataFrame(rows).assign(weight=self.settings.weight, threshold=self.settings.threshold)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``model.safetensors``, ``settings.json`` and ``epochs.csv``."""
        import json

        from safetensors.torch import save

        state = {name: value.contiguous().clone() for name, value in self.model.state_dict().items()}
        write_whole(Path(folder) / "epochs.csv", self.frame().to_csv(index=False))
        write_whole(Path(folder) / "settings.json", json.dumps(asdict(self.settings), indent=2) + "\n")
        write_whole(Path(folder) / "model.safetensors", save(state))


def train_diverse(
    model: nn.Module,
    images: Float[Tensor, "items channels height width"],
    labels: Int[Tensor, "labels"],
    settings: DiversitySettings | None = None,
    *,
    progress: Callable[[Epoch], None] = lambda epoch: None,
) -> DiverseTraining:
    """Train a network in place: ``cross_entropy + weight * ADL`` over its self-attention layers.

    With ``patch_size`` each step first adds the gradient of the cross-entropy on a patch-wise augmented view, as the
    paper does for RVT.

    Args:
        model: images to logits (or an output with ``logits``), with attention that
            :class:`~cenote.integrations.attention_capture.AttentionCapture` knows. Parameters that need no gradient
            stay. Wrap it with :class:`~cenote.integrations.tap.InsertedPooling` for TAP.
        images: as the model takes them.
        labels: right classes.
        settings: see there.
        progress: told every pass.

    Raises:
        ValueError: unequal numbers of images and labels, no image, attention that is not known.
        RuntimeError: a loss that is not finite.
    """
    settings = settings or DiversitySettings()
    if len(images) != len(labels) or not len(images):
        raise ValueError(f"expected as many images as labels and one at least, got {len(images)} and {len(labels)}")
    device = next(model.parameters()).device
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay)
    steps = settings.epochs * -(-len(images) // settings.batch_size)
    rising = max(1, round(settings.warmup * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min((step + 1) / rising, 0.5 * (1 + math.cos(math.pi * step / steps)))
    )
    generator = torch.Generator().manual_seed(settings.seed)
    rows: list[Epoch] = []
    model.train()
    capture = AttentionCapture(model, settings.keep) if settings.weight else None
    with capture or contextlib.nullcontext():
        for number in range(1, settings.epochs + 1):
            seen, task, adl = 0, 0.0, 0.0
            for index in torch.randperm(len(images), generator=generator).split(settings.batch_size):
                batch, targets = images[index].to(device), labels[index].to(device)
                optimiser.zero_grad()
                if settings.patch_size is not None:
                    low, high = settings.pixel_range or (None, None)
                    view = augment_patches(batch, settings.patch_size, low=low, high=high, generator=generator)
                    F.cross_entropy(_logits(model, view), targets).backward()
                loss = F.cross_entropy(_logits(model, batch), targets)
                diversity = loss.new_tensor(math.nan) if capture is None else capture.loss(settings.threshold)
                total = loss if capture is None else loss + settings.weight * diversity
                if not bool(total.isfinite()):
                    raise RuntimeError(f"the loss is {total.item()} in epoch {number}: lower lr={settings.lr}")
                total.backward()
                nn.utils.clip_grad_norm_(parameters, settings.clip)
                optimiser.step()
                schedule.step()
                seen += len(index)
                task += loss.item() * len(index)
                adl += diversity.item() * len(index)
            rows.append(Epoch(number, task / seen, adl / seen))
            progress(rows[-1])
    return DiverseTraining(model.eval(), tuple(rows), settings)


@torch.no_grad()
def measure_diversity(
    model: nn.Module,
    images: Float[Tensor, "items channels height width"],
    *,
    threshold: float = 2.0,
    batch_size: int = 256,
    keep: Keep = "query_key",
) -> Diversity:
    """Both similarities in eval mode, means over the images.

    Raises:
        ValueError: no image, attention that is not known.
    """
    if not len(images):
        raise ValueError("expected an image at least, got none")
    training, device = model.training, next(model.parameters()).device
    adl = similarity = 0.0
    try:
        with AttentionCapture(model.eval(), keep) as seen:
            for part in images.split(batch_size):
                model(part.to(device))
                adl += seen.loss(threshold).item() * len(part)
                similarity += seen.similarity().item() * len(part)
    finally:
        model.train(training)
    return Diversity(adl / len(images), similarity / len(images))


def _logits(model: nn.Module, images: Tensor) -> Tensor:
    output: Any = model(images)
    return getattr(output, "logits", output)
