"""Counts of a split, added over batches, windows, images and ranks, and the scores computed from them.

A class that is neither labeled nor predicted has no IoU (NaN) and is left out of means. A class that is predicted but
never labeled has IoU 0, which counts. Intersection and union are summed over the whole split before they are divided,
and pixels without a label are left out.
"""

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from pydantic import ValidationError
from torch import Tensor, distributed

from overfly.core.records import IGNORE
from overfly.core.spec import NonNegativeInt, Pixels, PositiveInt, Share, Spec
from overfly.data.domain import Domain, Split
from overfly.ops.criterion import boundaries


@dataclass(frozen=True, eq=False)
class Confusion:
    """Counts (K, K), int64: rows are the labels, columns the predictions.

    Scores are float64 tensors (K,) or floats, 0 to 1, NaN if undefined.
    """

    counts: Tensor

    @classmethod
    def from_predictions(cls, prediction: Tensor, label: Tensor, classes: int) -> Self:
        """Count the pixels of predicted class ids 0 to K-1, of any shape, and a label of this shape, without `IGNORE`.

        Raises `ValueError` if shapes differ, or for an id outside 0 to K-1 that is not ignored.
        """
        if prediction.shape != label.shape:
            raise ValueError(f"prediction {tuple(prediction.shape)} and label {tuple(label.shape)} differ in shape")
        valid = label != IGNORE
        row, column = label[valid].long(), prediction[valid].long()
        for name, ids in (("label", row), ("prediction", column)):
            if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= classes):
                raise ValueError(
                    f"{name} ids run from {int(ids.min())} to {int(ids.max())}, but the classes are 0 to {classes - 1}"
                )
        counts = torch.bincount(row * classes + column, minlength=classes * classes)
        return cls(counts.reshape(classes, classes))

    def __add__(self, other: Self) -> Self:
        return type(self)(self.counts + other.counts.to(self.counts.device))

    @property
    def pixels(self) -> int:
        """Number of counted pixels."""
        return int(self.counts.sum())

    @property
    def labeled(self) -> Tensor:
        """Pixels of each class in the labels (K,), int64."""
        return self.counts.sum(1)

    @property
    def predicted(self) -> Tensor:
        """Pixels of each class in the predictions (K,), int64."""
        return self.counts.sum(0)

    @property
    def hits(self) -> Tensor:
        """Correctly predicted pixels of each class (K,), int64."""
        return self.counts.diagonal()

    @property
    def iou(self) -> Tensor:
        """Intersection over union of each class (K,)."""
        return self.hits.double() / (self.labeled + self.predicted - self.hits).double()

    @property
    def f1(self) -> Tensor:
        """F1 (Dice) of each class (K,): the harmonic mean of precision and recall."""
        return 2 * self.hits.double() / (self.labeled + self.predicted).double()

    @property
    def recall(self) -> Tensor:
        """Share of each class's labeled pixels predicted as this class (K,), also class accuracy; NaN if unlabeled."""
        return self.hits.double() / self.labeled.double()

    @property
    def precision(self) -> Tensor:
        """Share of each class's predicted pixels with the same label (K,); NaN if never predicted."""
        return self.hits.double() / self.predicted.double()

    @property
    def miou(self) -> float:
        """Mean IoU over the classes that occur in labels or predictions; NaN without pixels."""
        return float(self.iou.nanmean())

    @property
    def accuracy(self) -> float:
        """Share of pixels that are predicted correctly; NaN without pixels."""
        return float(self.hits.sum().double() / self.counts.sum().double())

    @property
    def kappa(self) -> float:
        """Agreement beyond chance (Cohen, 1960), -1 to 1; NaN if expected agreement is 1."""
        return float(kappa(self.counts))


def kappa(counts: Tensor) -> Tensor:
    """Cohen's kappa (1960) of confusion matrices (…, K, K): accuracy beyond chance, over the most there can be.

    Chance is the accuracy of independent predictions with the same class shares. NaN if both sides consist of the same
    one class.
    """
    shares = counts.double() / counts.sum((-2, -1), keepdim=True)
    chance = (shares.sum(-1) * shares.sum(-2)).sum(-1)
    return (shares.diagonal(dim1=-2, dim2=-1).sum(-1) - chance) / (1 - chance)


def sum_over_ranks(counts: Tensor) -> Tensor:
    """Sum a tensor over all ranks of `torch.distributed`; the tensor itself if that is not initialized."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return counts
    total = counts.clone().cuda() if distributed.get_backend() == "nccl" else counts.clone()
    distributed.all_reduce(total)
    return total.to(counts.device)


def boundary_counts(prediction: Tensor, label: Tensor, classes: int, width: int) -> Tensor:
    """Count the pixels of Boundary IoU (Cheng et al., CVPR 2021); counts of several images add up.

    For each class, only the pixels of the mask that lie within ``width`` pixels of its outline are compared. As in the
    authors' code, distance is measured on squares (``width`` erosions by 3 × 3). Unlike in it, the border of the image
    and that of ignored areas are not outlines, since tiles cut through objects.

    Prediction and label are class ids (H, W) or (B, H, W); `IGNORE` is neither counted nor compared as a neighbor.
    Returns (3, K), int64: pixels of each class in the bands of labels, of predictions, and of both.
    """
    labels = label.reshape(-1, *label.shape[-2:]).long()
    predicted = prediction.reshape(-1, *label.shape[-2:]).long()
    label_band, prediction_band = (boundaries(ids, 2 * width, labels != IGNORE) for ids in (labels, predicted))
    both = label_band & prediction_band & (labels == predicted)
    chosen = (labels[label_band], predicted[prediction_band], labels[both])
    return torch.stack([torch.bincount(ids, minlength=classes) for ids in chosen])


def boundary_iou(counts: Tensor) -> Tensor:
    """Boundary IoU of each class (K,), float64, 0 to 1, from `boundary_counts`; NaN for a class without an outline."""
    label, prediction, both = counts.double()
    share: Tensor = both / (label + prediction - both)
    return share


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


class SplitCounts(NamedTuple):
    """Counts that are added over images and ranks.

    Attributes:
        confusion: pixels (K, K), int64: rows are the labels, columns the predictions.
        boundary: see `boundary_counts`.
        calibration: see `calibration_counts`.
        images: number of images, int64.
    """

    confusion: Tensor
    boundary: Tensor
    calibration: Tensor
    images: Tensor

    @classmethod
    def empty(cls, classes: int, protocol: Protocol) -> Self:
        """Return zero counts."""
        shapes = ((classes, classes), (3, classes), (3, protocol.bins), ())
        dtypes = (torch.int64, torch.int64, torch.float64, torch.int64)
        return cls(*(torch.zeros(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True)))

    @classmethod
    def from_predictions(cls, scores: Tensor, prediction: Tensor, label: Tensor, protocol: Protocol) -> Self:
        """Count one image: class scores (K, H, W) and the class ids (H, W) they predict, against its label (H, W)."""
        return cls(
            Confusion.from_predictions(prediction, label, len(scores)).counts,
            boundary_counts(prediction, label, len(scores), protocol.boundary_width),
            calibration_counts(scores, label, protocol.bins), torch.tensor(1),
        )  # fmt: skip

    def plus(self, other: Self) -> Self:
        """Add other counts, on this one's devices."""
        return type(self)(*(own + more.to(own.device) for own, more in zip(self, other, strict=True)))

    def reduce(self, all_reduce: Callable[[Tensor], Tensor]) -> Self:
        """Sum over all ranks by a function that sums a tensor over ranks."""
        return type(self)(*(all_reduce(part).to(part.device) for part in self))


def calibration_counts(scores: Tensor, label: Tensor, bins: int = 15) -> Tensor:
    """Count pixels by the probability of the predicted class; counts of several images add up.

    Class scores (…, K, H, W) are those before any softmax; `IGNORE` in the label (…, H, W) is not counted. The bins are
    of equal width, from 0 to 1. Returns (3, bins), float64, on the CPU: pixels, correct pixels, and confidence.
    """
    confidence, prediction = scores.float().softmax(-3).max(-3)
    valid = label != IGNORE
    confidence = confidence[valid].double().cpu()
    correct = (prediction == label)[valid].double().cpu()
    index = (confidence * bins).long().clamp(0, bins - 1)
    pixels = torch.bincount(index, minlength=bins).double()
    return torch.stack([pixels, torch.bincount(index, correct, bins), torch.bincount(index, confidence, bins)])


def reliability(counts: Tensor) -> Reliability:
    """Compute calibration from `calibration_counts` (Guo et al., ICML 2017, equation 3).

    Of the pixels that a calibrated network predicts with probability 0.8, 80 % are correct.
    """
    pixels, correct, confidence = counts
    return Reliability(
        ece=finite((correct - confidence).abs().sum() / pixels.sum()),
        overconfidence=finite((confidence.sum() - correct.sum()) / pixels.sum()), pixels=tuple(map(int, pixels)),
        confidence=tuple(map(finite, confidence / pixels)), accuracy=tuple(map(finite, correct / pixels)),
    )  # fmt: skip


def summarize(split_counts: SplitCounts, domain: Domain, split: Split, protocol: Protocol, unlabeled: int) -> Scores:
    """Compute the scores of a split from its counts."""
    counts, edges = Confusion(split_counts.confusion), boundary_iou(split_counts.boundary)
    columns = {"iou": counts.iou, "f1": counts.f1, "precision": counts.precision, "accuracy": counts.recall}
    columns["boundary_iou"] = edges
    classes = {
        name: ClassScore(**{key: finite(column[i]) for key, column in columns.items()}, pixels=int(counts.labeled[i]))
        for i, name in enumerate(domain.classes.names)
    }
    return Scores(
        domain=domain.model_dump(mode="json"), split=split, images=int(split_counts.images),
        labels_opened=int(split_counts.images), unlabeled=unlabeled, protocol=protocol,
        miou=finite(counts.miou), accuracy=finite(counts.accuracy), class_accuracy=finite(counts.recall.nanmean()),
        f1=finite(counts.f1.nanmean()), kappa=finite(counts.kappa), boundary_miou=finite(edges.nanmean()),
        classes=classes, calibration=reliability(split_counts.calibration),
        confusion=tuple(tuple(int(value) for value in row) for row in counts.counts),
    )  # fmt: skip


def valid_scores(stored: Mapping[str, Any]) -> dict[str, Scores]:
    """Return the scores of a run by role and split, without entries of its file of other kinds and formats."""
    result = {}
    for key, values in stored.items():
        with suppress(ValidationError):
            result[key] = Scores.model_validate(values)
    return result


def finite(value: float | Tensor) -> float | None:
    """Convert to a float, or None if it is not finite, since JSON has no NaN."""
    plain = float(value)
    return plain if math.isfinite(plain) else None
