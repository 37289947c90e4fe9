"""What happened in a run, one JSON line an event."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol


class Sink(Protocol):
    """Where figures go beside the journal."""

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Take the figures of a step."""


class Journal:
    """The lines of ``journal.jsonl``. Every line is whole or absent, whenever the process dies."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sinks: list[Sink] = []

    def write(self, step: int, **figures: Any) -> None:
        """Append a line: the step, and what was measured or done there."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **figures}) + "\n")
        numbers = {key: float(value) for key, value in figures.items() if isinstance(value, int | float)}
        for sink in self.sinks:
            sink.write(step, numbers)

    def rows(self) -> Iterator[dict[str, Any]]:
        """All lines, oldest first; a last line that was cut off is left out."""
        if not self.path.exists():
            return
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                yield row

    def rewind(self, step: int) -> None:
        """Drop the lines after a step: a resumed run writes them again."""
        kept = [json.dumps(row) for row in self.rows() if row["step"] <= step]
        partial = self.path.with_suffix(".partial")
        partial.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        partial.replace(self.path)


class TensorBoard:
    """The journal's figures as TensorBoard curves (extra ``track``)."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            from overfly.core.errors import MissingExtraError

            raise MissingExtraError("tensorboard", "track", "following a run in TensorBoard") from None
        self.writer = SummaryWriter(str(folder))

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """One point on each curve."""
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()
