"""Backbone and readout as one ONNX graph, checked against torch before the file appears."""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cenote.backbones.base import Backbone
from cenote.probe.readout import Readout

# A protobuf message cannot exceed 2 GB; larger weights go into a second file beside the graph.
EMBEDDED_WEIGHTS_LIMIT = 1_800_000_000


class Traceable(nn.Module):
    """The tensors of ``backbone.collate`` in, one positional argument each in the order of ``names``, scores out."""

    def __init__(self, backbone: Backbone, readout: Readout, names: Sequence[str]) -> None:
        super().__init__()
        self.backbone, self.names = backbone, tuple(names)
        # Registered here so that an exporter finds the parameters; `backbone` itself is not a module.
        self.network, self.readout = backbone.module, readout

    def forward(self, *tensors: Tensor) -> Tensor:
        batch = dict(zip(self.names, tensors, strict=True))
        # `encode`, not the call: that one runs in inference mode, which cannot be traced.
        features = self.backbone.encode(batch, self.readout.config.layers, None)
        return self.readout(features)


def traceable(backbone: Backbone, readout: Readout, names: Sequence[str] | None = None) -> Traceable:
    """Backbone and readout as one module from the tensors of ``collate`` to scores ``(batch, outputs)``.

    Args:
        backbone, readout: what to join.
        names: order of the arguments; by default the order in which ``collate`` gives them.
    """
    return Traceable(backbone, readout, names or tuple(backbone.collate(example_items(backbone, 1)))).eval()


def example_items(backbone: Backbone, count: int) -> list[Any]:
    """Made-up items of the backbone's modality: noise images, or sentences of different lengths."""
    if backbone.modality == "text":
        return [" ".join(["an example sentence"] * (1 + i % 3)) for i in range(count)]
    from PIL import Image

    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for _ in range(count)]


@dataclass(frozen=True)
class OnnxExport:
    """Outcome of :func:`export_onnx`.

    Attributes:
        path: the file.
        inputs: names of the graph's inputs, the tensors of ``backbone.collate``.
        max_abs_difference: largest difference from torch over the items it was checked on.
        checked_items: how many those were.
        opset: version of the operator set.
    """

    path: Path
    inputs: tuple[str, ...]
    max_abs_difference: float
    checked_items: int
    opset: int


def export_onnx(
    readout: Readout,
    backbone: Backbone,
    path: str | Path,
    items: Sequence[Any] | None = None,
    *,
    tolerance: float = 1e-3,
    opset: int = 18,
    allow_other_backbone: bool = False,
) -> OnnxExport:
    """Write backbone and readout as one ONNX file with a dynamic batch (and, for text, a dynamic length).

    Inputs are the tensors of ``backbone.collate`` under their names; the output ``scores`` ``(batch, outputs)`` holds
    logits, or values for regression. Class names and task are in the file's metadata under ``cenote``. The graph is
    run with onnxruntime on batches of other sizes than the one it was traced with, and written only if it agrees with
    torch.

    Args:
        readout, backbone: what to export, in float32.
        path: the file to write; weights beyond 1.8 GB go to ``<path>.data`` beside it.
        items: raw items to trace and check with, at least 3; made up if not given.
        tolerance: largest allowed difference from torch, relative to the largest score where that exceeds 1.
        opset: version of the operator set.

    Raises:
        ImportError: onnx, onnxscript or onnxruntime is missing.
        ValueError: wrong backbone, one that reads neither images nor texts, fewer than 3 items, a model that
            torch.export cannot trace, or a difference above ``tolerance`` (nothing is written then).
    """
    if backbone.modality not in ("image", "text"):
        raise ValueError(f"ONNX export serves image and text backbones; {backbone.spec} reads {backbone.modality}")
    _require_packages()
    import onnx

    if not allow_other_backbone:
        readout.check_backbone(backbone)
    items = list(example_items(backbone, 5) if items is None else items)
    if len(items) < 3:
        raise ValueError(f"needs at least 3 items to trace with and to check another batch size, got {len(items)}")
    path = Path(path)
    traced = backbone.collate(items[:2])
    model = traceable(backbone, readout, tuple(traced))
    external = sum(p.numel() * p.element_size() for p in model.parameters()) > EMBEDDED_WEIGHTS_LIMIT
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as staging:
        draft = Path(staging) / path.name
        program = _trace(model, traced, backbone, opset)
        program.save(str(draft), external_data=external)
        proto = onnx.load(str(draft), load_external_data=False)
        config = readout.config
        about = {"task": config.task, "classes": config.classes, "backbone": config.backbone, "pooling": config.pooling}
        onnx.helper.set_model_props(proto, {"cenote": json.dumps(about)})
        draft.write_bytes(proto.SerializeToString())
        largest, scale = _compare(model, draft, backbone, [items, items[:1]])
        if not largest <= tolerance * max(1.0, scale):
            raise ValueError(
                f"the ONNX graph differs from torch by {largest:.3g}, above the tolerance {tolerance:g}: not written"
            )
        # The graph last: whoever sees it finds its weights.
        for file in sorted(Path(staging).iterdir(), key=lambda file: file == draft):
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
            os.replace(file, path.parent / file.name)
    return OnnxExport(path, tuple(traced), largest, len(items), opset)


def _require_packages() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(f"ONNX export needs {error.name}: pip install 'cenote[onnx]'") from None


def _trace(model: Traceable, batch: dict[str, Tensor], backbone: Backbone, opset: int) -> Any:
    shapes: list[dict[int, Any]] = []
    for tensor in batch.values():
        axes: dict[int, Any] = {0: torch.export.Dim.DYNAMIC}
        if backbone.modality == "text" and tensor.ndim > 1:
            axes[1] = torch.export.Dim.DYNAMIC
        shapes.append(axes)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            return torch.onnx.export(
                model,
                tuple(batch.values()),
                dynamo=True,
                dynamic_shapes=(tuple(shapes),),
                input_names=list(batch),
                output_names=["scores"],
                opset_version=opset,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            cause = str(error.__cause__ or error).strip().splitlines()[0]
            raise ValueError(
                f"{backbone.spec} with {model.readout.config.pooling} cannot be traced: {cause}"
            ) from error


def _compare(model: Traceable, path: Path, backbone: Backbone, batches: Sequence[Sequence[Any]]) -> tuple[float, float]:
    """Largest difference of onnxruntime from torch over the batches (NaN is infinite), and torch's largest score."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    wanted = [node.name for node in session.get_inputs()]
    largest, scale = 0.0, 0.0
    for items in batches:
        batch = backbone.collate(items)
        with torch.no_grad():
            expected = model(*batch.values()).cpu().numpy()
        found = session.run(["scores"], {name: batch[name].numpy() for name in wanted})[0]
        difference = np.abs(found - expected).max()
        largest = max(largest, float(difference) if np.isfinite(difference) else float("inf"))
        scale = max(scale, float(np.abs(expected).max()))
    return largest, scale
