"""Confusion matrix and Boundary IoU of a split, added over batches, windows and ranks, and the scores from them.

A class that is neither labeled nor predicted has no IoU (NaN) and is left out of means. A class that is predicted but
never labeled has IoU 0, which counts. Intersection and union are summed over the whole split before they are divided,
and pixels without a label are left out.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, distributed

from overfly.core.records import IGNORE
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
