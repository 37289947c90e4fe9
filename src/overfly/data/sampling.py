"""Choose the images and crops of each training step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import lru_cache
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from overfly.core.errors import DataError
from overfly.core.records import Array, UInt8
from overfly.core.spec import Choice, Positive, Share, Whole

Counts = NDArray[np.int64]
"""Labeled pixels of each class in each image, (images, K)."""


class SampleSlot(NamedTuple):
    """Position of a sample in the stream of batches.

    Attributes:
        seed: of the run and the stream.
        step: from 0.
        slot: index in the batch, 0 to ``batch`` - 1.
        batch: images in a step.
        images: in the split.
    """

    seed: int
    step: int
    slot: int
    batch: int
    images: int


class Sampling(Choice, ABC):
    """How images and crops are chosen. The choice is a function of (seed, step, slot) alone."""

    needs_counts: ClassVar[bool] = False
    """Whether it must know the labeled pixels of each class in each image."""

    @abstractmethod
    def choose_image(self, place: SampleSlot, counts: Counts | None) -> tuple[int, int]:
        """Index of an image and the class it was chosen for (-1: none in particular).

        Args:
            place: which place in the stream.
            counts: labeled pixels of each class, where `needs_counts`.
        """

    def fits(self, label: UInt8, wanted: int) -> bool:  # noqa: ARG002
        """Whether a crop of the label shows enough of the wanted class."""
        return True


class Uniform(Sampling, name="uniform"):
    """Every image once, in a new order each epoch; crops anywhere."""

    def choose_image(self, place: SampleSlot, counts: Counts | None) -> tuple[int, int]:  # noqa: ARG002
        """The next image of a permutation drawn from (seed, epoch)."""
        epoch, turn = divmod(place.step * place.batch + place.slot, place.images)
        return int(_permutation(place.seed, epoch, place.images)[turn]), -1


class Rare(Sampling, name="rare"):
    """Rare-class sampling (Hoyer et al., 2022, DAFormer, section 3.2): first a class, the rarer the more often.

    A class c with share f_c of the labeled pixels is drawn with probability softmax((1 - f) / temperature); then a
    image that shows it; then crops until one shows it. Every mask is read once at the start, to count its pixels.
    """

    temperature: Positive = 0.01
    """Low: the rarest classes almost alone; high: all classes alike."""
    pixels: Whole = 1000
    """Pixels of the class that an image must have in all to count as showing it (or the most that any has)."""
    crop_share: Share = 0.005
    """Share of a crop that the class must fill, if it can be had in ten tries."""

    needs_counts: ClassVar[bool] = True

    def choose_image(self, place: SampleSlot, counts: Counts | None) -> tuple[int, int]:
        """A class by its rarity, then an image that shows it."""
        if counts is None:
            raise ValueError("rare-class sampling needs the class counts of every image")
        random = np.random.default_rng([place.seed, place.step, place.slot, 1])
        probability = self.probabilities(counts)
        wanted = int(random.choice(len(probability), p=probability))
        enough = np.flatnonzero(counts[:, wanted] >= min(self.pixels, counts[:, wanted].max()))
        return int(random.choice(enough)), wanted

    def probabilities(self, counts: Counts) -> NDArray[np.float64]:
        """Probability of each class (K,); 0 for classes that no image shows.

        Raises:
            DataError: no image shows any class.
        """
        pixels = counts.sum(0).astype(float)
        if not pixels.any():
            raise DataError("rare-class sampling finds no labeled pixel in any mask; check what the masks ignore")
        share = pixels / max(1.0, pixels.sum())
        score = np.where(pixels > 0, (1 - share) / self.temperature, -np.inf)
        weight = np.exp(score - score.max())
        result: NDArray[np.float64] = weight / weight.sum()
        return result

    def fits(self, label: UInt8, wanted: int) -> bool:
        """Whether the wanted class fills its share of the crop."""
        return wanted < 0 or bool((label == wanted).mean() >= self.crop_share)


def crop(
    image: Array, label: UInt8, size: int, random: np.random.Generator, fits: Callable[[UInt8], bool]
) -> tuple[Array, UInt8]:
    """A square part of an image.

    Args:
        image: (H, W, C).
        label: (H, W).
        size: side of the crop; a smaller image is mirrored outwards, with its label ignored there.
        random: chooses the place.
        fits: whether the label of a place will do; the tenth place is taken in any case.

    Returns:
        Image (size, size, C) and label (size, size).
    """
    height, width = label.shape
    if height < size or width < size:
        below, right = max(0, size - height), max(0, size - width)
        image = np.pad(image, ((0, below), (0, right), (0, 0)), mode="symmetric")
        label = np.pad(label, ((0, below), (0, right)), constant_values=255)
        height, width = label.shape
    for _ in range(10):
        top = int(random.integers(height - size + 1))
        left = int(random.integers(width - size + 1))
        part = label[top : top + size, left : left + size]
        if fits(part):
            break
    return image[top : top + size, left : left + size], part


@lru_cache(maxsize=8)
def _permutation(seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    """The order of ``count`` images in one epoch."""
    order: NDArray[np.int64] = np.random.default_rng([seed, epoch, 0]).permutation(count)
    return order
