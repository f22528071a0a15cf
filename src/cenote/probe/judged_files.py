"""What a judged probe keeps: finished readouts to resume from, and the results folder."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from cenote.backbones.base import Backbone
from cenote.files import write_whole
from cenote.probe.embedding_readout import EmbeddingConfig, EmbeddingReadout
from cenote.probe.outcome import Outcome
from cenote.probe.plan import Candidate, Host
from cenote.probe.result import ProbeResult
from cenote.probe.write import Folder, write_results

FIELDS = ("validation", "params", "seconds", "lr", "query_factor", "epochs", "status")


class Finished:
    """Readouts that are done, one file each; a run that goes on takes them up instead of training them again.

    Args:
        folder: where they are kept, or ``None`` to keep nothing.
        resuming: whether files that are there may be used.
    """

    def __init__(self, folder: Path | None, resuming: bool) -> None:
        self.folder, self.resuming = folder, resuming

    def _path(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.judged.safetensors"

    def keep(self, outcome: Outcome) -> None:
        """Write an outcome; the file appears whole or not at all."""
        if self.folder is None:
            return
        tensors: dict[str, Tensor] = {"predictions": torch.from_numpy(outcome.predictions)}
        for name, module in (("pooling", outcome.pooling), ("head", outcome.head)):
            tensors |= {f"{name}.{key}": value for key, value in (module.state_dict() if module else {}).items()}
        scalars = {name: getattr(outcome, name) for name in FIELDS}
        ready = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
        write_whole(self._path(outcome.key), save(ready, metadata={"state": json.dumps(scalars)}))

    def take(self, candidate: Candidate, dim: int) -> Outcome | None:
        """The outcome of a candidate, or ``None`` where there is none that can be read."""
        if self.folder is None or not self.resuming or not self._path(candidate.key).exists():
            return None
        content = self._path(candidate.key).read_bytes()
        try:
            tensors = load(content)
        except SafetensorError:
            return None
        length = int.from_bytes(content[:8], "little")
        scalars = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["state"])
        pooling = candidate.make(dim).eval()
        pooling.load_state_dict(_below(tensors, "pooling."))
        norm = _below(tensors, "head.0.")
        head = nn.Sequential()
        if norm:
            head.append(nn.BatchNorm1d(len(norm["running_mean"]), eps=1e-6, affine=False))
            head[0].load_state_dict(norm)
        return Outcome(
            readout=candidate.readout, layers=candidate.layers, tokens=candidate.tokens, candidate=candidate,
            pooling=pooling, head=head.eval(), predictions=tensors["predictions"].numpy(), **scalars,
        )  # fmt: skip


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def write_judged(
    folder: Folder, result: ProbeResult, outcomes: Sequence[Outcome], backbone: Backbone, host: Host
) -> ProbeResult:
    """Write table, outputs, report and the best readout; each file appears whole or not at all."""
    from cenote.report import write_report

    result = dataclasses.replace(result, folder=folder.path)
    write_results(result, folder.path)
    arrays = io.BytesIO()
    named = {"targets": result.targets} | {key.replace("/", "_"): value for key, value in result.predictions.items()}
    np.savez_compressed(arrays, **named)  # type: ignore[arg-type]
    write_whole(folder.path / "predictions.npz", arrays.getvalue())
    write_report(result, folder.path / "report.html")
    best_embedding(result, outcomes, backbone, host).save_pretrained(folder.path / "best")
    return result


def best_embedding(
    result: ProbeResult, outcomes: Sequence[Outcome], backbone: Backbone, host: Host
) -> EmbeddingReadout:
    """The first row of the table as an artefact."""
    outcome = next(o for o in outcomes if o.key == ProbeResult.key(result.rows[0]))
    candidate, head, settings = outcome.candidate, outcome.head, result.settings
    norm = head[0] if head is not None and len(head) else None
    assert norm is None or isinstance(norm, nn.BatchNorm1d)
    config = EmbeddingConfig(
        pooling="encoder_pooler" if candidate is None else candidate.readout,
        options={} if candidate is None else dict(candidate.options),
        dim=(backbone.pooled_dim or 0) if candidate is None else host.dim, layers=outcome.layers, tokens=outcome.tokens,
        grid=host.grid, task=settings["task"], standardise=norm is not None, backbone=backbone.spec,
        revision=getattr(backbone, "revision", None), backbone_options=settings["backbone_options"],
        backbone_fingerprint=backbone.fingerprint(), query_prompt=settings["query_prompt"],
        document_prompt=settings["document_prompt"], data=str(settings["data"]), metric=result.rows[0].metric,
        score=result.rows[0].score,
    )  # fmt: skip
    return EmbeddingReadout(config, outcome.pooling, norm)  # type: ignore[arg-type]
