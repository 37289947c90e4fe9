"""Boundary IoU (Cheng et al., CVPR 2021) at a given width, from counts that can be added.

For each class, only the pixels of the mask that lie within ``width`` pixels of its outline are compared. As in the
authors' code, distance is measured on squares (``width`` erosions by 3 × 3). Unlike in it, the border of the image and
that of ignored areas are not outlines, since tiles cut through objects.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from overfly.core.records import IGNORE


@dataclass(frozen=True, eq=False)
class Boundary:
    """Pixels in the bands along the outlines: counts (3, K), int64, of labels, predictions and both."""

    counts: Tensor
    width: int

    @classmethod
    def empty(cls, classes: int, width: int) -> Self:
        """Return zero counts for ``classes`` classes and bands of ``width`` pixels."""
        return cls(torch.zeros(3, classes, dtype=torch.int64), width)

    @classmethod
    def from_predictions(cls, prediction: Tensor, label: Tensor, classes: int, width: int) -> Self:
        """Count the bands of whole images.

        Args:
            prediction: class ids (H, W) or (B, H, W).
            label: class ids, of the same shape; `IGNORE` is neither counted nor compared as a neighbor.
            classes: number of classes K.
            width: width of the band inside each outline, in pixels of the label.
        """
        labels = label.reshape(-1, *label.shape[-2:]).long()
        predicted = prediction.reshape(-1, *label.shape[-2:]).long()
        valid = labels != IGNORE
        label_band, prediction_band = band(labels, valid, width), band(predicted, valid, width)
        both = label_band & prediction_band & (labels == predicted)
        counts = torch.stack(
            [
                torch.bincount(labels[label_band], minlength=classes),
                torch.bincount(predicted[prediction_band], minlength=classes),
                torch.bincount(labels[both], minlength=classes),
            ]
        )
        return cls(counts, width)

    def __add__(self, other: Boundary) -> Boundary:
        if self.width != other.width:
            raise ValueError(f"bands of {self.width} and {other.width} pixels do not add up")
        return Boundary(self.counts + other.counts.to(self.counts.device), self.width)

    @property
    def iou(self) -> Tensor:
        """Boundary IoU of each class (K,), float64, 0 to 1; NaN for a class without an outline."""
        label, prediction, both = self.counts.double()
        share: Tensor = both / (label + prediction - both)
        return share

    @property
    def miou(self) -> float:
        """Mean over the classes that have an outline in labels or predictions; NaN if none has."""
        return float(self.iou.nanmean())


def band(ids: Tensor, valid: Tensor, width: int) -> Tensor:
    """Return the valid pixels with a valid pixel of another class within ``width`` rows and columns.

    Args:
        ids: class ids (B, H, W), int64.
        valid: pixels that count (B, H, W), bool.
        width: in pixels, 1 or more.

    Returns:
        (B, H, W), bool.
    """
    value = ids.to(torch.int16)
    highest = torch.where(valid, value, -1)
    lowest = torch.where(valid, value, IGNORE)
    for dim in (1, 2):
        highest = -_local_minimum(-highest, dim, width, 1)
        lowest = _local_minimum(lowest, dim, width, IGNORE)
    return valid & ((highest > value) | (lowest < value))


def _local_minimum(value: Tensor, dim: int, width: int, outside: int) -> Tensor:
    """Minimum over ``2 · width + 1`` neighbors along a dimension; the span doubles at each step."""
    length, span, full = value.shape[dim], 1, 2 * width + 1
    shape = list(value.shape)
    shape[dim] = width
    border = value.new_full(shape, outside)
    value = torch.cat([border, value, border], dim)
    while span < full:
        step = min(span, full - span)
        rest = value.shape[dim] - step
        value = torch.minimum(value.narrow(dim, 0, rest), value.narrow(dim, step, rest))
        span += step
    return value.narrow(dim, 0, length)
