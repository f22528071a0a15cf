"""The main job: extract once, train every readout together, compare, report, export."""

from cenote.probe.result import ProbeResult, Row
from cenote.probe.run import probe

__all__ = ["ProbeResult", "Row", "probe"]
