"""Augmentations of images and labels as recipe settings, applied in batches on their device.

Random numbers are drawn per image from a generator on the CPU, so that a seed gives the same images on every device and
in a resumed run. The augmentations are in `geometry` and `color`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Self

import torch
from pydantic import model_validator
from torch import Generator, Tensor

from overfly.core.records import Labeled
from overfly.core.spec import Choice, Share


class Augment(Choice, ABC):
    """A random transform of images (B, C, H, W) in 0 to 1 and their labels (B, H, W)."""

    p: Share = 0.5
    """Probability that an image is transformed."""

    @model_validator(mode="after")
    def _check_ranges(self) -> Self:
        for low, high in (("low", "high"), ("min_holes", "max_holes"), ("min_size", "max_size")):
            smallest, largest = getattr(self, low, 0), getattr(self, high, 0)
            if smallest > largest:
                raise ValueError(f"{low} must not be above {high}, got {smallest:g} and {largest:g}")
        return self

    @abstractmethod
    def apply(self, batch: Labeled, generator: Generator) -> Labeled:
        """Transform every image of the batch; the result has the same shape."""

    def __call__(self, batch: Labeled, generator: Generator) -> Labeled:
        """Transform each image of a batch, in 0 to 1, with probability ``p``; the given batch does not change.

        The result has the same shape and types, images in 0 to 1, labels of the same ids or `IGNORE`. The generator is
        on the CPU.
        """
        chosen = chance(len(batch.image), self.p, generator).nonzero().squeeze(1)
        if len(chosen) == 0:
            return batch
        if len(chosen) == len(batch.image):
            return self.apply(batch, generator)
        index = chosen.to(batch.image.device, non_blocking=True)
        image, label = self.apply(Labeled(batch.image[index], batch.label[index]), generator)
        return Labeled(batch.image.index_copy(0, index, image), batch.label.index_copy(0, index, label))


@torch.no_grad()
def augment(batch: Labeled, augments: Sequence[Augment], *, max_value: float, generator: Generator) -> Labeled:
    """Apply augmentations in order, before normalization, to images (B, C, H, W) and labels (B, H, W).

    Images are float, 0 to ``max_value``, the largest value of the sensor's range, before and after. The generator is on
    the CPU. Raises `ValueError`: ``max_value`` is not above 0.
    """
    if not max_value > 0:
        raise ValueError(f"max_value must be above 0, got {max_value}")
    if not augments:
        return batch
    scaled = Labeled(batch.image / max_value, batch.label)
    for augmentation in augments:
        scaled = augmentation(scaled, generator)
    return Labeled(scaled.image * max_value, scaled.label)


def chance(count: int, p: float, generator: Generator) -> Tensor:
    """``count`` independent booleans (count,), each true with probability ``p``."""
    return torch.rand(count, generator=generator) < p


def uniform(shape: Sequence[int], low: float, high: float, generator: Generator) -> Tensor:
    """Random numbers of a shape, uniform from ``low`` to ``high``."""
    return low + (high - low) * torch.rand(list(shape), generator=generator)


def log_uniform(shape: Sequence[int], low: float, high: float, generator: Generator) -> Tensor:
    """Random factors of a shape from ``low`` to ``high``, both above 0, uniform in their logarithm."""
    return uniform(shape, math.log(low), math.log(high), generator).exp()
