"""A saved readout applied to new items."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from cenote.backbones.base import Backbone
from cenote.data.base import Items, Skipped
from cenote.probe.decode import decoded_batches, named_items
from cenote.probe.readout import Readout

if TYPE_CHECKING:
    import pandas as pd


def predict(
    readout: Readout,
    backbone: Backbone,
    items: Items | Sequence[Any],
    batch_size: int = 32,
    *,
    top: int = 3,
    ids: Sequence[str] | None = None,
    on_error: Literal["raise", "skip"] = "raise",
    allow_other_backbone: bool = False,
) -> pd.DataFrame:
    """Predict items, one row each.

    The table has ``item``, then for classification ``label_1, probability_1, ...`` of the ``top`` most probable
    classes; for multi-label the same, and before them ``labels``, those of probability 0.5 or more joined by
    ``"; "``; for regression ``value`` (``value_1, ...`` where there are several).

    Args:
        readout: from :meth:`Readout.from_pretrained`.
        backbone: the one it was trained on.
        items: raw items, decoded one by one as they are needed (PIL images, strings, clips or graphs).
        batch_size: items in one pass through the backbone.
        top: classes listed for each item.
        ids: names of the items; their positions if not given.
        on_error: what an item that cannot be decoded does: raise, or be left out and listed in
            ``frame.attrs["skipped"]``.
        allow_other_backbone: do not insist on the backbone that the readout was trained on.

    Raises:
        ValueError: no items, none that can be decoded, wrong backbone, batch size or ``top`` below 1, scores that are
            not finite (the item is named).
    """
    import pandas as pd

    if batch_size < 1 or top < 1:
        raise ValueError(f"batch_size and top must be at least 1, got {batch_size} and {top}")
    names = named_items(items, ids)
    if not allow_other_backbone:
        readout.check_backbone(backbone)

    rows: list[dict[str, Any]] = []
    skipped: list[Skipped] = []
    for batch_names, batch in decoded_batches(items, names, batch_size, on_error, skipped):
        outputs = score(readout, backbone, batch)
        if not torch.isfinite(outputs).all():
            broken = [name for name, row in zip(batch_names, outputs, strict=True) if not torch.isfinite(row).all()]
            raise ValueError(f"the scores of {', '.join(broken[:3])} are not finite")
        rows += [{"item": name, **_row(readout, row, top)} for name, row in zip(batch_names, outputs, strict=True)]
    frame = pd.DataFrame(rows)
    frame.attrs["skipped"] = tuple(skipped)
    return frame


def score(readout: Readout, backbone: Backbone, items: Sequence[Any]) -> Tensor:
    """Probabilities (or values, for regression) of one batch of decoded items, ``(items, outputs)`` on the CPU."""
    with torch.inference_mode():
        features = backbone(backbone.collate(items), readout.config.layers)
        features = features.to(readout.head.weight.device)
        call = readout if readout.config.task == "regression" else readout.predict_proba
        return call(features).float().cpu()


def _row(readout: Readout, outputs: Tensor, top: int) -> dict[str, Any]:
    config = readout.config
    if config.task == "regression":
        values = outputs.tolist()
        return {"value": values[0]} if len(values) == 1 else {f"value_{i}": v for i, v in enumerate(values, 1)}
    row: dict[str, Any] = {}
    if config.task == "multilabel":
        row["labels"] = "; ".join(config.classes[i] for i in (outputs >= 0.5).nonzero().flatten().tolist())
    best = outputs.topk(min(top, len(outputs)))
    for rank, (probability, index) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True), 1):
        row |= {f"label_{rank}": config.classes[index], f"probability_{rank}": probability}
    return row
