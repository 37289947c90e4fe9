"""Augmentations as values of a recipe: images and labels changed together, in batches, on their device.

What is random is drawn for each image from a generator on the CPU, so that a seed means the same on every device and a
resumed run sees what an uninterrupted one would have seen. The kinds stand in `geometry` and `color`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Generator, Tensor

from overfly.core.records import Labeled
from overfly.core.spec import Choice, Share, Spec

AnySpec = TypeVar("AnySpec", bound=Spec)


class Augment(Choice, ABC):
    """A random change of images (B, C, H, W) in 0 to 1 and their labels (B, H, W)."""

    p: Share = 0.5
    """Probability that an image is changed."""

    @abstractmethod
    def apply(self, batch: Labeled, generator: Generator) -> Labeled:
        """Change every image of the batch; the new batch has the same shape."""

    def __call__(self, batch: Labeled, generator: Generator) -> Labeled:
        """Change each image with probability ``p``; the others, and the batch given, stay as they are.

        Args:
            batch: images in 0 to 1, and labels.
            generator: on the CPU.

        Returns:
            A batch of the same shape and types, images in 0 to 1, labels of the ids that were there or `IGNORE`.
        """
        chosen = chance(len(batch.image), self.p, generator).nonzero().squeeze(1)
        if len(chosen) == 0:
            return batch
        if len(chosen) == len(batch.image):
            return self.apply(batch, generator)
        index = chosen.to(batch.image.device)
        changed = self.apply(Labeled(batch.image[index], batch.label[index]), generator)
        return Labeled(batch.image.index_copy(0, index, changed.image), batch.label.index_copy(0, index, changed.label))


@torch.no_grad()
def augment(batch: Labeled, augments: Sequence[Augment], *, max_value: float, generator: Generator) -> Labeled:
    """Apply augmentations one after the other, before any normalization.

    Args:
        batch: images (B, C, H, W), float, 0 to ``max_value``, and labels (B, H, W).
        augments: in the order in which they are applied.
        max_value: the largest value of the sensor's range, such as 255 for 8 bit.
        generator: on the CPU; all that is random comes from it.

    Returns:
        Images in the same range, 0 to ``max_value``, and labels.

    Raises:
        ValueError: ``max_value`` is not above 0.
    """
    if not max_value > 0:
        raise ValueError(f"the largest value of the sensor's range must be above 0, not {max_value}")
    if not augments:
        return batch
    changed = Labeled(batch.image / max_value, batch.label)
    for each in augments:
        changed = each(changed, generator)
    return Labeled(changed.image * max_value, changed.label)


def chance(count: int, p: float, generator: Generator) -> Tensor:
    """``count`` independent booleans (count,), each true with probability ``p``."""
    return torch.rand(count, generator=generator) < p


def uniform(shape: Sequence[int], low: float, high: float, generator: Generator) -> Tensor:
    """Random numbers, uniform from ``low`` to ``high``."""
    return low + (high - low) * torch.rand(list(shape), generator=generator)


def log_uniform(shape: Sequence[int], low: float, high: float, generator: Generator) -> Tensor:
    """Random factors from ``low`` to ``high``, both above 0, uniform in their logarithm: 1/2 is as likely as 2."""
    return uniform(shape, math.log(low), math.log(high), generator).exp()


def ordered(spec: AnySpec, low: str = "low", high: str = "high") -> AnySpec:
    """The spec itself, if its setting ``low`` is not above its setting ``high``.

    Raises:
        ValueError: it is.
    """
    least, most = getattr(spec, low), getattr(spec, high)
    if least > most:
        raise ValueError(f"{low} ({least:g}) is above {high} ({most:g}); exchange them")
    return spec
