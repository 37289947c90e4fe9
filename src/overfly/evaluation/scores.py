"""What scoring gives: the counts of a split, which add up, and the scores they make, as a value for JSON."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from overfly.core.spec import Count, Pixels, Share, Spec, Whole
from overfly.data.domain import Domain, Split
from overfly.evaluation.boundary import Boundary
from overfly.evaluation.calibration import Calibration
from overfly.evaluation.confusion import Confusion, over_ranks


class Protocol(Spec):
    """How a score was taken. Predictions are compared with the labels at the labels' own full resolution."""

    resize: Pixels | None = None
    """Side of the square that pictures are resized to before the network sees them; none: as they are."""
    window: Pixels | None = None
    """Side of the overlapping windows in which pictures are predicted, after any resize; none: whole pictures."""
    overlap: float = 0.25
    """Share of a window's side that the next one covers again; without windows it means nothing."""
    boundary_width: Pixels = 5
    """Width of the band along outlines that Boundary IoU compares, in pixels of the label."""
    bins: Count = 15
    """Bins of confidence behind the calibration error."""


class ClassScore(Spec):
    """What one class scores, 0 to 1; none where nothing defines it."""

    iou: Share | None
    """Intersection over union; none for a class that is neither labeled nor predicted, which means leave out."""
    f1: Share | None
    """Harmonic mean of precision and accuracy, also called Dice."""
    precision: Share | None
    """Share of the pixels predicted as this class that are it."""
    accuracy: Share | None
    """Share of this class's labeled pixels that are found, also called recall."""
    boundary_iou: Share | None
    """Boundary IoU (Cheng et al., 2021) at the protocol's width."""
    pixels: Whole
    """Labeled pixels of this class."""


class Reliability(Spec):
    """Whether confidence means anything: pixels in bins of equal width by the probability of the predicted class."""

    ece: Share | None
    """Expected calibration error (Guo et al., 2017)."""
    overconfidence: float | None
    """Mean confidence minus accuracy: above 0, the network claims more than it knows."""
    pixels: tuple[Whole, ...]
    """Pixels in each bin."""
    confidence: tuple[Share | None, ...]
    """Mean probability of the predicted class in each bin."""
    accuracy: tuple[Share | None, ...]
    """Share of each bin's pixels that are right."""


class Scores(Spec):
    """What a network scores on one split of one domain; shares from 0 to 1, JSON through ``model_dump_json()``."""

    domain: dict[str, Any]
    """The domain as a recipe names it."""
    split: Split
    """The split that was scored."""
    images: Whole
    """Labeled pictures that were scored."""
    labels_opened: Whole
    """Labels that were read for it."""
    unlabeled: Whole
    """Pictures of the split without a label, left out."""
    protocol: Protocol
    """How it was scored."""
    miou: Share | None
    """Mean IoU over the classes that are labeled or predicted somewhere in the split, from one confusion matrix."""
    accuracy: Share | None
    """Share of labeled pixels that are right."""
    class_accuracy: Share | None
    """Mean over the labeled classes of the share of their pixels that are found."""
    f1: Share | None
    """Mean F1 over the classes that are labeled or predicted."""
    kappa: float | None
    """Agreement beyond chance (Cohen, 1960)."""
    boundary_miou: Share | None
    """Mean Boundary IoU over the classes that have an outline."""
    classes: dict[str, ClassScore]
    """Each class's own scores, in the order of the ids."""
    calibration: Reliability
    """Confidence against accuracy."""
    confusion: tuple[tuple[Whole, ...], ...]
    """Pixels: rows are the labels, columns the predictions, both in the order of the ids."""


@dataclass(frozen=True)
class Tally:
    """All that is counted while scoring; adds up over pictures and ranks."""

    confusion: Confusion
    boundary: Boundary
    calibration: Calibration
    images: int = 0

    @classmethod
    def empty(cls, classes: int, protocol: Protocol) -> Tally:
        """Nothing counted."""
        return cls(
            Confusion.empty(classes),
            Boundary.empty(classes, protocol.boundary_width),
            Calibration.empty(protocol.bins),
        )

    @classmethod
    def of(cls, scores: Tensor, prediction: Tensor, label: Tensor, protocol: Protocol) -> Tally:
        """Count one picture: class scores (K, H, W) and the ids (H, W) they predict, against its label (H, W)."""
        classes = len(scores)
        return cls(
            Confusion.of(prediction, label, classes),
            Boundary.of(prediction, label, classes, protocol.boundary_width),
            Calibration.of(scores, label, protocol.bins),
            1,
        )

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.confusion + other.confusion,
            self.boundary + other.boundary,
            self.calibration + other.calibration,
            self.images + other.images,
        )

    def reduce(self, add: Callable[[Tensor], Tensor] | None) -> Tally:
        """The sum over all ranks, as `Confusion.reduce`."""
        return Tally(
            self.confusion.reduce(add),
            self.boundary.reduce(add),
            self.calibration.reduce(add),
            int((add or over_ranks)(torch.tensor(self.images))),
        )


def summarize(tally: Tally, domain: Domain, split: Split, protocol: Protocol, unlabeled: int) -> Scores:
    """The scores that a split's counts make."""
    counts, edges, trust = tally.confusion, tally.boundary, tally.calibration
    columns = (counts.iou, counts.f1, counts.precision, counts.recall, edges.iou, counts.labeled)
    classes = {
        name: ClassScore(
            iou=number(iou), f1=number(f1), precision=number(precision), accuracy=number(recall),
            boundary_iou=number(edge), pixels=int(pixels),
        )
        for name, iou, f1, precision, recall, edge, pixels in zip(domain.classes.names, *columns, strict=True)
    }  # fmt: skip
    return Scores(
        domain=domain.model_dump(mode="json"),
        split=split,
        images=tally.images,
        labels_opened=tally.images,
        unlabeled=unlabeled,
        protocol=protocol,
        miou=number(counts.miou),
        accuracy=number(counts.accuracy),
        class_accuracy=number(counts.mean_recall),
        f1=number(counts.mean_f1),
        kappa=number(counts.kappa),
        boundary_miou=number(edges.miou),
        classes=classes,
        calibration=Reliability(
            ece=number(trust.ece),
            overconfidence=number(trust.overconfidence),
            pixels=tuple(int(value) for value in trust.pixels),
            confidence=tuple(number(value) for value in trust.confidence),
            accuracy=tuple(number(value) for value in trust.accuracy),
        ),
        confusion=tuple(tuple(int(value) for value in row) for row in counts.counts),
    )


def number(value: float | Tensor) -> float | None:
    """A number that JSON can hold: None for NaN."""
    plain = float(value)
    return plain if math.isfinite(plain) else None


__all__ = ["ClassScore", "Protocol", "Reliability", "Scores", "Tally", "number", "summarize"]
