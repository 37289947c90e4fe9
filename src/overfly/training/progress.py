"""What a person sees while training runs: a bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

PLAIN_SECONDS = 20.0
"""How often a plain line is printed."""


class Progress:
    """Losses, learning rate, images a second and time left of one run."""

    def __init__(self, title: str, first: int, length: int, *, quiet: bool = False) -> None:
        self.title, self.first, self.length, self.quiet = title, first, length, quiet
        self.began = self.said = time.monotonic()
        self.bar: Bar | None = None
        self.task = TaskID(0)

    def __enter__(self) -> Self:
        if not self.quiet:
            going_on = f", going on after step {self.first}" if self.first else ""
            print(f"{self.title}: {self.length} steps{going_on}", file=sys.stderr, flush=True)
        if not self.quiet and sys.stderr.isatty():
            from rich.console import Console

            self.bar = Bar(
                BarColumn(20), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"), TimeElapsedColumn(),
                TextColumn("left"), TimeRemainingColumn(), console=Console(stderr=True),
            )  # fmt: skip
            self.bar.start()
            self.task = self.bar.add_task("", total=self.length, completed=self.first, figures="")
        return self

    def update(self, step: int, figures: Mapping[str, float], pictures: int) -> None:
        """Show the figures of a step.

        Args:
            step: steps that are done.
            figures: losses and learning rate.
            pictures: in one step.
        """
        if self.quiet:
            return
        now = time.monotonic()
        rate = (step - self.first) / max(1e-9, now - self.began)
        shown = "  ".join(f"{key} {value:.3g}" for key, value in figures.items())
        shown += f"  {rate * pictures:.1f} images/s"
        if self.bar is not None:
            self.bar.update(self.task, completed=step, figures=shown)
        elif now - self.said >= PLAIN_SECONDS or step >= self.length:
            self.said = now
            left = (self.length - step) / max(1e-9, rate)
            print(f"step {step}/{self.length}  {shown}  {left:.0f} s left", file=sys.stderr, flush=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()


class Transfers:
    """How far downloads are: a bar for each in a terminal, a line now and then elsewhere."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import DownloadColumn, TransferSpeedColumn

        console = Console(stderr=True)
        self.bar = Bar(
            TextColumn("{task.description}"), BarColumn(20), DownloadColumn(), TransferSpeedColumn(),
            TimeRemainingColumn(), console=console, disable=not console.is_terminal,
        )  # fmt: skip
        self.tasks: dict[str, TaskID] = {}
        self.said = time.monotonic()

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def update(self, what: str, done: int, total: int | None) -> None:
        """Show that ``done`` of ``total`` bytes of something are there."""
        if what not in self.tasks:
            self.tasks[what] = self.bar.add_task(what, total=total)
        self.bar.update(self.tasks[what], completed=done, total=total)
        now = time.monotonic()
        if self.bar.disable and (now - self.said >= PLAIN_SECONDS or done == total):
            self.said = now
            of = f" of {total / 1e6:.0f}" if total else ""
            print(f"{what}: {done / 1e6:.0f}{of} MB", file=sys.stderr, flush=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()
