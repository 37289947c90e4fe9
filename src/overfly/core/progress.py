"""Progress on stderr: bars in a terminal, a line every 20 s elsewhere; shares as percentages."""

import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from overfly.core.errors import printable

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

PLAIN_SECONDS = 20.0
"""Seconds between two plain lines."""


def percent(value: float | None, digits: int = 2) -> str:
    """Format a share in percent, without the sign; a dash for None."""
    return "–" if value is None else f"{100 * value:.{digits}f}"


def print_status(text: str, *, quiet: bool = False) -> None:
    """Print a line on stderr, above any progress bars."""
    if not quiet:
        print("\n".join(map(printable, text.split("\n"))), file=sys.stderr, flush=True)


@dataclass
class _Task:
    first: int
    started: float
    printed: float
    bar: "TaskID | None"


class Progress:
    """Context manager that shows the progress of one or several tasks.

    Each name passed to `update` is a task with its own bar. ``partial(progress.update, name)`` is a
    callback ``(done, total)``. Updates may come from several threads. The unit of the counts is such as ``steps``;
    ``bytes`` are shown as MB.
    """

    def __init__(self, unit: str = "", *, quiet: bool = False) -> None:
        self.unit, self.quiet = unit, quiet
        self.tasks: dict[str, _Task] = {}
        self.bars = _bars(unit) if not quiet and sys.stderr.isatty() else None

    def __enter__(self) -> Self:
        if self.bars is not None:
            self.bars.start()
        return self

    def update(self, name: str, done: int, total: int | None = None, detail: str = "") -> None:
        """Update a task to ``done`` of ``total`` units, None if unknown, with a text after the counts, such as losses.

        The count of the first call is where the task resumes.
        """
        if self.quiet:
            return
        now = time.monotonic()
        if name not in self.tasks:
            bar = None if self.bars is None else self.bars.add_task(name, total=total, completed=done, detail=detail)
            self.tasks[name] = _Task(done, now, now, bar)
        task = self.tasks[name]
        if self.bars is not None and task.bar is not None:
            self.bars.update(task.bar, completed=done, total=total, detail=detail)
        elif now - task.printed >= PLAIN_SECONDS or (done == total and done > task.first):
            task.printed = now
            print_status(self._line(name, task, done, total, detail))

    def _line(self, name: str, task: _Task, done: int, total: int | None, detail: str) -> str:
        scale = 1e6 if self.unit == "bytes" else 1
        count = f"{done / scale:.0f}" + (f"/{total / scale:.0f}" if total is not None else "")
        parts = [f"{name}: {count} {'MB' if self.unit == 'bytes' else self.unit}".rstrip(), detail]
        if total is not None and total > done > task.first:
            seconds = (total - done) * (time.monotonic() - task.started) / (done - task.first)
            parts.append(f"{seconds:.0f} s left")
        return "  ".join(filter(None, parts))

    def __exit__(self, *_: object) -> None:
        if self.bars is not None:
            self.bars.stop()


def _bars(unit: str) -> "Bars":
    from rich import progress
    from rich.console import Console

    size = (progress.DownloadColumn(), progress.TransferSpeedColumn())
    counts = size if unit == "bytes" else (progress.MofNCompleteColumn(),)
    return progress.Progress(
        progress.TextColumn("{task.description}"), progress.BarColumn(20), *counts,
        progress.TextColumn("{task.fields[detail]}"), progress.TimeElapsedColumn(), progress.TextColumn("left"),
        progress.TimeRemainingColumn(), console=Console(stderr=True),
    )  # fmt: skip
