"""Where a probe computes: in this process, or on a cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from cenote.probe.feed import Feed
from cenote.probe.outcome import Outcome
from cenote.probe.plan import Candidate, Host
from cenote.probe.tasks import Objective
from cenote.probe.train import Group
from cenote.probe.work import Elsewhere

ENGINES = ("local", "ray")

Source = tuple[str, dict[str, Any]]
"""What :func:`cenote.backbones.load_backbone` is called with: a spec and keywords."""


@runtime_checkable
class Engine(Protocol):
    """The two expensive parts of a probe on other machines; the numbers are those of a run in this process."""

    def extraction(self, source: Source | None = None) -> Elsewhere:
        """For :func:`cenote.probe.extract.extract`; ``source`` says how workers load the backbone themselves."""

    def fit_free(
        self,
        jobs: Sequence[Candidate | str],
        feeds: tuple[Feed, Feed, Feed],
        objective: Objective,
        host: Host,
        stop: Callable[[], bool],
    ) -> Iterator[Outcome | None]:
        """Readouts without parameters, as :func:`cenote.probe.fits.fit_free`, in the order of the jobs."""  # fmt: skip

    def train(
        self,
        groups: Sequence[Group],
        turns: Sequence[Feed],
        validation: Feed,
        folder: Path | None,
        deadline: float,
        on_group: Callable[[Group], Any],
    ) -> bool:
        """As :func:`cenote.probe.train.train_groups`, with a ``deadline`` on the monotonic clock."""  # fmt: skip


def connect(engine: str, address: str | None, device: str, memory: int) -> Engine | None:
    """The engine of that name, ``None`` for this process.

    Raises:
        ValueError: an unknown engine, or an address for an engine that has none.
        ImportError: Ray is missing; the message names the extra to install.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine must be 'local' or 'ray', got {engine!r}")
    if engine == "local":
        if address is not None:
            raise ValueError(f"a Ray address ({address}) is of use to engine 'ray' only")
        return None
    from cenote.integrations.ray import RayEngine

    return RayEngine(address, gpus=int(device.startswith("cuda")), memory=memory)
