"""How a classifier's errors grow under common corruptions, alone and against a baseline."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from cenote.files import write_whole
from cenote.ops.corruptions import CORRUPTIONS, SEVERITIES, corrupt

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Robustness:
    """Errors of one classifier, as shares of 1.

    Attributes:
        clean: on the images as they are.
        errors: by corruption, one value a severity.
        severities: which ones.
    """

    clean: float
    errors: dict[str, tuple[float, ...]]
    severities: tuple[int, ...] = SEVERITIES

    @property
    def mean_error(self) -> float:
        """Plain mean over corruptions and severities."""
        return fmean(fmean(errors) for errors in self.errors.values())

    @property
    def mean_accuracy(self) -> float:
        """``1 - mean_error``."""
        return 1 - self.mean_error

    def corruption_errors(self, baseline: Robustness) -> dict[str, float]:
        """``CE_c = sum_s E_{s,c} / sum_s E^baseline_{s,c}`` by corruption, as ImageNet-C defines it.

        Raises:
            ValueError: other corruptions or severities, a corruption under which the baseline makes no error.
        """
        return {
            name: sum(errors) / _positive(name, sum(baseline.errors[name]))
            for name, errors in self._beside(baseline).items()
        }

    def mean_corruption_error(self, baseline: Robustness) -> float:
        """mCE: 100 times the mean of :meth:`corruption_errors`; 100 for the baseline itself, lower is better."""
        return 100 * fmean(self.corruption_errors(baseline).values())

    def relative_mean_corruption_error(self, baseline: Robustness) -> float:
        """The same of what corruption adds: ``sum_s (E_{s,c} - E_clean)`` over the baseline's, mean over c, times 100.

        Raises:
            ValueError: as :meth:`corruption_errors`, and a corruption that adds nothing to the baseline's error.
        """
        count = len(self.severities)
        return 100 * fmean(
            (sum(errors) - count * self.clean) / _positive(name, sum(baseline.errors[name]) - count * baseline.clean)
            for name, errors in self._beside(baseline).items()
        )

    def frame(self) -> pd.DataFrame:
        """One row a corruption, one column a severity, and their mean, in per cent."""
        import pandas as pd

        table = pd.DataFrame.from_dict(self.errors, orient="index", columns=[str(s) for s in self.severities]) * 100
        return table.assign(mean=table.mean(axis=1)).rename_axis("corruption")

    def save(self, path: str | Path) -> None:
        """Write the numbers as JSON."""
        content = {"clean": self.clean, "severities": self.severities, "errors": self.errors}
        write_whole(path, json.dumps(content, indent=2) + "\n")

    def _beside(self, baseline: Robustness) -> dict[str, tuple[float, ...]]:
        if self.errors.keys() != baseline.errors.keys() or self.severities != baseline.severities:
            raise ValueError(
                f"the baseline was measured under {sorted(baseline.errors)} at {baseline.severities}, "
                f"expected {sorted(self.errors)} at {self.severities}"
            )
        return self.errors


def measure_robustness(
    model: nn.Module | Callable[[Tensor], Any],
    images: Float[Tensor, "items channels height width"],
    labels: Int[Tensor, "labels"],
    *,
    corruptions: Sequence[str] = tuple(CORRUPTIONS),
    severities: Sequence[int] = SEVERITIES,
    prepare: Callable[[Tensor], Tensor] = lambda pixels: pixels,
    batch_size: int = 256,
    seed: int = 0,
) -> Robustness:
    """Errors on clean and on corrupted images.

    What is drawn depends on ``seed`` and the place of a batch alone, so that every model sees the same pictures.

    Args:
        model: images to logits ``(batch, classes)`` (or an output with ``logits``); a module is put into eval mode
            meanwhile.
        images: in [0, 1], as they are before normalisation.
        labels: right classes.
        corruptions: names, see :data:`cenote.ops.corruptions.CORRUPTIONS`.
        severities: of 1 to 5.
        prepare: what the model wants done to pixels in [0, 1], such as normalising.
        batch_size: images at a time.
        seed: of the corruptions.

    Raises:
        ValueError: nothing to measure, unequal numbers of images and labels; see also
            :func:`cenote.ops.corruptions.corrupt`.
    """
    if not len(images) or not corruptions or not severities:
        raise ValueError("expected at least one image, one corruption and one severity")
    if len(images) != len(labels):
        raise ValueError(f"{len(images)} images have {len(labels)} labels")
    training = isinstance(model, nn.Module) and model.training
    device = next(iter(model.parameters()), images).device if isinstance(model, nn.Module) else images.device
    if isinstance(model, nn.Module):
        model.eval()

    def error(change: Callable[[Tensor, int], Tensor]) -> float:
        wrong = 0
        for start in range(0, len(images), batch_size):
            part = change(images[start : start + batch_size], seed + start)
            output = model(prepare(part).to(device))
            guesses = getattr(output, "logits", output).argmax(dim=-1).to(labels.device)
            wrong += int((guesses != labels[start : start + batch_size]).sum())
        return wrong / len(images)

    try:
        with torch.inference_mode():
            clean = error(lambda part, _: part)
            errors = {
                name: tuple(error(lambda part, s, n=name, v=level: corrupt(part, n, v, s)) for level in severities)  # type: ignore[misc]
                for name in corruptions
            }
    finally:
        if isinstance(model, nn.Module):
            model.train(training)
    return Robustness(clean, errors, tuple(severities))


def _positive(name: str, value: float) -> float:
    if not value > 0:
        raise ValueError(f"the baseline's error under {name} is {value:.3g}, so there is no ratio to it")
    return value
