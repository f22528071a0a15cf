"""The main job: extract once, train every readout together, compare, report, export."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cenote.probe.readout import Readout
    from cenote.probe.result import ProbeResult, Row
    from cenote.probe.run import probe

__all__ = ["ProbeResult", "Readout", "Row", "probe"]


def __getattr__(name: str) -> Any:
    if name in ("ProbeResult", "Row"):
        from cenote.probe import result

        return getattr(result, name)
    if name == "Readout":
        from cenote.probe.readout import Readout

        return Readout
    if name == "probe":
        from cenote.probe.run import probe

        return probe
    raise AttributeError(f"module 'cenote.probe' has no attribute {name!r}")
