"""Expected calibration error (Guo et al., ICML 2017, equation 3).

Of the pixels that a calibrated network predicts with probability 0.8, 80 % are correct. Counts per confidence bin add
up over images, windows and ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from overfly.core.records import IGNORE
from overfly.evaluation.confusion import over_ranks


@dataclass(frozen=True, eq=False)
class Calibration:
    """Sums (3, bins), float64: pixels, correct pixels, and confidence, in bins of equal width from 0 to 1."""

    sums: Tensor

    @classmethod
    def empty(cls, bins: int = 15) -> Self:
        """No pixels yet."""
        return cls(torch.zeros(3, bins, dtype=torch.float64))

    @classmethod
    def of(cls, scores: Tensor, label: Tensor, bins: int = 15, ignore: int = IGNORE) -> Self:
        """Count pixels by the probability of the predicted class.

        Args:
            scores: class scores before any softmax, (K, H, W) or (B, K, H, W).
            label: class ids or ``ignore``, (H, W) or (B, H, W).
            bins: number of bins of equal width.
            ignore: pixels with this label are left out.
        """
        confidence, prediction = scores.float().softmax(-3).max(-3)
        valid = label != ignore
        confidence = confidence[valid].double().cpu()
        correct = (prediction == label)[valid].double().cpu()
        index = (confidence * bins).long().clamp(0, bins - 1)
        pixels = torch.bincount(index, minlength=bins).double()
        return cls(torch.stack([pixels, torch.bincount(index, correct, bins), torch.bincount(index, confidence, bins)]))

    def __add__(self, other: Calibration) -> Calibration:
        return Calibration(self.sums + other.sums)

    def reduce(self, add: Callable[[Tensor], Tensor] | None = None) -> Calibration:
        """Sum over all ranks; see `Confusion.reduce`."""
        return Calibration((add or over_ranks)(self.sums).to(self.sums.device))

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


__all__ = ["Calibration"]
