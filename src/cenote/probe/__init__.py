"""The main job: extract once, train every readout together, compare, report, export."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cenote.probe.embedding_readout import EmbeddingReadout
    from cenote.probe.judged import probe_judged
    from cenote.probe.readout import Readout
    from cenote.probe.result import ProbeResult, Row
    from cenote.probe.run import probe

__all__ = ["EmbeddingReadout", "ProbeResult", "Readout", "Row", "probe", "probe_judged"]

_FILES = {
    "EmbeddingReadout": "embedding_readout",
    "ProbeResult": "result",
    "Readout": "readout",
    "Row": "result",
    "probe": "run",
    "probe_judged": "judged",
}


def __getattr__(name: str) -> Any:
    if name not in _FILES:
        raise AttributeError(f"module 'cenote.probe' has no attribute {name!r}")
    return getattr(importlib.import_module(f"cenote.probe.{_FILES[name]}"), name)
