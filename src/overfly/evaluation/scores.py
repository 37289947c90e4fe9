"""Counts of a split, added over images and ranks, and the scores computed from them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from overfly.core.records import IGNORE
from overfly.core.spec import NonNegativeInt, Pixels, PositiveInt, Share, Spec
from overfly.data.domain import Domain, Split
from overfly.evaluation.confusion import Boundary, Confusion


class Protocol(Spec):
    """Settings of a score. Predictions are compared with labels at the label's full resolution."""

    resize: Pixels | None = None
    """Side of the square that images are resized to before the network; none: not resized."""
    window: Pixels | None = None
    """Side of the overlapping windows that images are predicted in, after any resize; none: whole images."""
    overlap: float = 0.25
    """Overlap of neighboring windows, as a share of their side; unused without windows."""
    boundary_width: Pixels = 5
    """Width of the band along outlines for Boundary IoU, in pixels of the label."""
    bins: PositiveInt = 15
    """Confidence bins of the calibration error."""


class ClassScore(Spec):
    """Scores of one class, 0 to 1; none if undefined."""

    iou: Share | None
    """Intersection over union; none for a class that is neither labeled nor predicted, and left out of means."""
    f1: Share | None
    """Harmonic mean of precision and accuracy, also called Dice."""
    precision: Share | None
    """Share of the pixels predicted as this class that have its label."""
    accuracy: Share | None
    """Share of this class's labeled pixels that are predicted as this class, also called recall."""
    boundary_iou: Share | None
    """Boundary IoU (Cheng et al., 2021) at the protocol's width."""
    pixels: NonNegativeInt
    """Labeled pixels of this class."""


class Reliability(Spec):
    """Reliability diagram: pixels in bins of equal width by the probability of the predicted class."""

    ece: Share | None
    """Expected calibration error (Guo et al., 2017)."""
    overconfidence: float | None
    """Mean confidence minus accuracy: positive if overconfident."""
    pixels: tuple[NonNegativeInt, ...]
    """Pixels in each bin."""
    confidence: tuple[Share | None, ...]
    """Mean probability of the predicted class in each bin."""
    accuracy: tuple[Share | None, ...]
    """Share of each bin's pixels that are predicted correctly."""


class Scores(Spec):
    """Scores of a network on one split of a domain; shares from 0 to 1."""

    domain: dict[str, Any]
    """The domain, as in a recipe."""
    split: Split
    """The split."""
    images: NonNegativeInt
    """Labeled images that were scored."""
    labels_opened: NonNegativeInt
    """Labels that were read."""
    unlabeled: NonNegativeInt
    """Images of the split without a label, left out."""
    protocol: Protocol
    """Settings that the scores were computed with."""
    miou: Share | None
    """Mean IoU over the classes that are labeled or predicted in the split, from one confusion matrix."""
    accuracy: Share | None
    """Share of labeled pixels that are predicted correctly."""
    class_accuracy: Share | None
    """Mean recall over the labeled classes."""
    f1: Share | None
    """Mean F1 over the classes that are labeled or predicted."""
    kappa: float | None
    """Agreement beyond chance (Cohen, 1960)."""
    boundary_miou: Share | None
    """Mean Boundary IoU over the classes that have an outline."""
    classes: dict[str, ClassScore]
    """Scores by class, in the order of the ids."""
    calibration: Reliability
    """Confidence against accuracy."""
    confusion: tuple[tuple[NonNegativeInt, ...], ...]
    """Pixels: rows are the labels, columns the predictions, both in the order of the ids."""
    weights_sha256: str | None = None
    """Digest of the weights, if a run was scored."""
    files_sha256: str | None = None
    """Digest of the names, sizes and times of the split's images and masks, if a run was scored."""


@dataclass(frozen=True, eq=False)
class Calibration:
    """Expected calibration error (Guo et al., ICML 2017, equation 3), from counts per confidence bin that can be added.

    Of the pixels that a calibrated network predicts with probability 0.8, 80 % are correct.

    Attributes:
        sums: (3, bins), float64: pixels, correct pixels, and confidence, in bins of equal width from 0 to 1.
    """

    sums: Tensor

    @classmethod
    def empty(cls, bins: int = 15) -> Self:
        """Return zero counts."""
        return cls(torch.zeros(3, bins, dtype=torch.float64))

    @classmethod
    def from_scores(cls, scores: Tensor, label: Tensor, bins: int = 15) -> Self:
        """Count pixels by the probability of the predicted class.

        Args:
            scores: class scores before any softmax, (K, H, W) or (B, K, H, W).
            label: class ids, or `IGNORE` for pixels that are not counted, (H, W) or (B, H, W).
            bins: number of bins of equal width.
        """
        confidence, prediction = scores.float().softmax(-3).max(-3)
        valid = label != IGNORE
        confidence = confidence[valid].double().cpu()
        correct = (prediction == label)[valid].double().cpu()
        index = (confidence * bins).long().clamp(0, bins - 1)
        pixels = torch.bincount(index, minlength=bins).double()
        return cls(torch.stack([pixels, torch.bincount(index, correct, bins), torch.bincount(index, confidence, bins)]))

    def __add__(self, other: Calibration) -> Calibration:
        return Calibration(self.sums + other.sums)

    @property
    def pixels(self) -> Tensor:
        """Pixels in each bin (bins,), float64."""
        return self.sums[0]

    @property
    def accuracy(self) -> Tensor:
        """Share of each bin's pixels that are predicted correctly (bins,); NaN in an empty bin."""
        return self.sums[1] / self.sums[0]

    @property
    def confidence(self) -> Tensor:
        """Mean probability of the predicted class in each bin (bins,); NaN in an empty bin."""
        return self.sums[2] / self.sums[0]

    @property
    def ece(self) -> float:
        """Expected calibration error, 0 to 1: the mean gap of accuracy and confidence over pixels; NaN without any."""
        return float((self.sums[1] - self.sums[2]).abs().sum() / self.sums[0].sum())

    @property
    def overconfidence(self) -> float:
        """Mean confidence minus accuracy, -1 to 1: positive if overconfident; NaN without pixels."""
        return float((self.sums[2].sum() - self.sums[1].sum()) / self.sums[0].sum())


@dataclass(frozen=True)
class SplitCounts:
    """Confusion matrix, boundary and calibration counts, added over images and ranks."""

    confusion: Confusion
    boundary: Boundary
    calibration: Calibration
    images: int = 0

    @classmethod
    def empty(cls, classes: int, protocol: Protocol) -> SplitCounts:
        """Return zero counts."""
        return cls(
            Confusion.empty(classes), Boundary.empty(classes, protocol.boundary_width), Calibration.empty(protocol.bins)
        )

    @classmethod
    def from_predictions(cls, scores: Tensor, prediction: Tensor, label: Tensor, protocol: Protocol) -> SplitCounts:
        """Count one image: class scores (K, H, W) and the class ids (H, W) they predict, against its label (H, W)."""
        classes = len(scores)
        return cls(
            Confusion.from_predictions(prediction, label, classes),
            Boundary.from_predictions(prediction, label, classes, protocol.boundary_width),
            Calibration.from_scores(scores, label, protocol.bins),
            1,
        )

    def __add__(self, other: SplitCounts) -> SplitCounts:
        return SplitCounts(
            self.confusion + other.confusion,
            self.boundary + other.boundary,
            self.calibration + other.calibration,
            self.images + other.images,
        )

    def reduce(self, all_reduce: Callable[[Tensor], Tensor]) -> SplitCounts:
        """Sum over all ranks by a function that sums a tensor over ranks."""
        counts, bands, sums = self.confusion.counts, self.boundary.counts, self.calibration.sums
        return SplitCounts(
            Confusion(all_reduce(counts).to(counts.device)),
            Boundary(all_reduce(bands).to(bands.device), self.boundary.width),
            Calibration(all_reduce(sums).to(sums.device)),
            int(all_reduce(torch.tensor(self.images))),
        )


def summarize(split_counts: SplitCounts, domain: Domain, split: Split, protocol: Protocol, unlabeled: int) -> Scores:
    """Compute the scores of a split from its counts."""
    counts, boundary, calibration = split_counts.confusion, split_counts.boundary, split_counts.calibration
    columns = (counts.iou, counts.f1, counts.precision, counts.recall, boundary.iou, counts.labeled)
    classes = {
        name: ClassScore(
            iou=finite(iou), f1=finite(f1), precision=finite(precision), accuracy=finite(recall),
            boundary_iou=finite(edge), pixels=int(pixels),
        )
        for name, iou, f1, precision, recall, edge, pixels in zip(domain.classes.names, *columns, strict=True)
    }  # fmt: skip
    return Scores(
        domain=domain.model_dump(mode="json"),
        split=split,
        images=split_counts.images,
        labels_opened=split_counts.images,
        unlabeled=unlabeled,
        protocol=protocol,
        miou=finite(counts.miou),
        accuracy=finite(counts.accuracy),
        class_accuracy=finite(counts.mean_recall),
        f1=finite(counts.mean_f1),
        kappa=finite(counts.kappa),
        boundary_miou=finite(boundary.miou),
        classes=classes,
        calibration=Reliability(
            ece=finite(calibration.ece),
            overconfidence=finite(calibration.overconfidence),
            pixels=tuple(int(value) for value in calibration.pixels),
            confidence=tuple(finite(value) for value in calibration.confidence),
            accuracy=tuple(finite(value) for value in calibration.accuracy),
        ),
        confusion=tuple(tuple(int(value) for value in row) for row in counts.counts),
    )


def finite(value: float | Tensor) -> float | None:
    """Convert to a float, or None if it is not finite, since JSON has no NaN."""
    plain = float(value)
    return plain if math.isfinite(plain) else None
