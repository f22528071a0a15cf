"""What the probe says while it works: what is running, how long it will take, the best so far."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

QUIET_SECONDS = 15.0
"""Between lines where there is no terminal."""


@runtime_checkable
class Display(Protocol):
    """Stages with a known number of steps, and lines of text."""

    def stage(self, name: str, total: int) -> None: ...
    def advance(self, steps: int = 1, best: str = "") -> None: ...
    def say(self, line: str) -> None: ...


class Quiet:
    """Says nothing."""

    def stage(self, name: str, total: int) -> None: ...
    def advance(self, steps: int = 1, best: str = "") -> None: ...
    def say(self, line: str) -> None: ...


class Terminal(AbstractContextManager):
    """A progress bar on standard error with the time left and the best readout so far; plain lines where there is no
    terminal."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        self.progress = Progress(
            TextColumn("[bold]{task.description}"), BarColumn(bar_width=30), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[best]}"), console=self.console,
        )  # fmt: skip
        self.task: TaskID | None = None
        self.said = 0.0

    def __enter__(self) -> Terminal:
        if self.console.is_terminal:
            self.progress.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.progress.stop()

    def stage(self, name: str, total: int) -> None:
        if not self.console.is_terminal:
            self.console.print(f"{name} ({total})", highlight=False)
            self.said = time.monotonic()
        if self.task is not None:
            self.progress.update(self.task, completed=self.progress.tasks[-1].total)
        self.task = self.progress.add_task(name, total=max(total, 1), best="")

    def advance(self, steps: int = 1, best: str = "") -> None:
        if self.task is not None:
            fields: dict[str, Any] = {"best": best} if best else {}
            self.progress.update(self.task, advance=steps, **fields)
        if not self.console.is_terminal and time.monotonic() - self.said > QUIET_SECONDS:
            self.said = time.monotonic()
            task = self.progress.tasks[-1]
            self.say(f"  {task.completed:g} of {task.total:g} after {task.elapsed or 0:.0f} s  {best}".rstrip())

    def say(self, line: str) -> None:
        self.console.print(line, highlight=False)


def display_totals(display: Display) -> Callable[[int, int], None]:
    """``progress(done, total)`` for work that reports how far it is, where a display wants how far it has come."""
    seen = 0

    def progress(done: int, total: int) -> None:
        nonlocal seen
        display.advance(done - seen)
        seen = done

    return progress
