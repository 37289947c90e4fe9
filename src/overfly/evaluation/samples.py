"""A few pictures of a split, kept while it is scored: evenly spread ones, and the worst and the best."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from overfly.core.records import Array, UInt8


@dataclass(frozen=True, eq=False)
class Sample:
    """One picture with what a network says about it.

    Attributes:
        name: the item's name.
        image: (H, W, C), in the sensor's own type and range.
        prediction: class ids (H, W).
        label: class ids or 255, (H, W); None where there is none.
        accuracy: share of labeled pixels predicted as labeled, 0 to 1; None where no pixel has a label.
    """

    name: str
    image: Array
    prediction: UInt8
    label: UInt8 | None = None
    accuracy: float | None = None


class SampleCollector(Protocol):
    """Who is shown every picture while a split is scored."""

    def show(self, sample: Sample, index: int, total: int) -> None:
        """Take a picture, its place in the split counted from 0, and how many there are."""


class Samples:
    """Keeps a few of the samples it is shown; iterates over the evenly spread ones, then the worst, then the best.

    Give one to `overfly.evaluation.score.score` and draw it with `overfly.evaluation.panels.panels`.
    """

    def __init__(self, spread: int = 4, extremes: bool = True) -> None:
        """Start empty.

        Args:
            spread: how many samples to keep, evenly spread over the split.
            extremes: whether to keep those of lowest and highest accuracy too.
        """
        self.spread, self.extremes = spread, extremes
        self._spread: dict[int, Sample] = {}
        self._worst: Sample | None = None
        self._best: Sample | None = None

    def show(self, sample: Sample, index: int, total: int) -> None:
        """Keep a sample if it is one of those wanted.

        Args:
            sample: the picture.
            index: its place in the split, from 0.
            total: pictures of the split.
        """
        wanted = {(2 * part + 1) * total // (2 * self.spread) for part in range(self.spread)}
        if index in wanted:
            self._spread[index] = sample
        if not self.extremes or sample.accuracy is None:
            return
        if self._worst is None or sample.accuracy < (self._worst.accuracy or 0):
            self._worst = sample
        if self._best is None or sample.accuracy > (self._best.accuracy or 0):
            self._best = sample

    def __iter__(self) -> Iterator[Sample]:
        kept = [self._spread[index] for index in sorted(self._spread)]
        seen = {sample.name for sample in kept}
        for sample in (self._worst, self._best):
            if sample is not None and sample.name not in seen:
                seen.add(sample.name)
                kept.append(sample)
        return iter(kept)

    def __len__(self) -> int:
        return sum(1 for _ in self)


__all__ = ["Sample", "SampleCollector", "Samples"]
