"""Choose the images and crops of each training step."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import lru_cache
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from overfly.core.errors import DataError
from overfly.core.records import Array, Counts, UInt8
from overfly.core.spec import Choice, NonNegativeInt, PositiveFloat, Share


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
    """Sampling of images and crops, a function of (seed, step, slot) alone."""

    needs_counts: ClassVar[bool] = False
    """True if `choose_image` needs the labeled pixels of each class in each image."""

    @abstractmethod
    def choose_image(self, slot: SampleSlot, counts: Counts | None) -> tuple[int, int]:
        """Return the index of an image and the class it was chosen for (-1: none).

        ``counts`` are the labeled pixels of each class in each image, if `needs_counts`.
        """

    def fits(self, label: UInt8, class_id: int) -> bool:  # noqa: ARG002
        """Return True if a crop of the label has enough pixels of class ``class_id``."""
        return True

    def neglected(self, counts: Counts) -> list[int]:  # noqa: ARG002
        """Classes with pixels that fewer than one of 1,000 images are chosen for."""
        return []


class Uniform(Sampling, name="uniform"):
    """Every image once, in a new order each epoch; crops anywhere."""

    def choose_image(self, slot: SampleSlot, counts: Counts | None) -> tuple[int, int]:  # noqa: ARG002
        """The next image of a permutation drawn from (seed, epoch)."""
        epoch, index = divmod(slot.step * slot.batch + slot.slot, slot.images)
        return int(_permutation(slot.seed, epoch, slot.images)[index]), -1


class Rare(Sampling, name="rare"):
    """Rare-class sampling (Hoyer et al., 2022, DAFormer, section 3.2): rare classes are chosen more often.

    A class c with share f_c of the labeled pixels is drawn with probability softmax((1 - f) / temperature), then an
    image with that class, then up to ten crops until one has it. Every mask is read once at the start.
    """

    temperature: PositiveFloat = 0.1
    """Low values choose the rarest classes almost always; high values choose all classes equally often. With the
    paper's 0.01 and LoveDA's seven classes, the one or two rarest are drawn alone."""
    pixels: NonNegativeInt = 1000
    """Pixels of the class that an image must have (at most as many as the image with the most)."""
    crop_share: Share = 0.005
    """Share of a crop that the class must fill; after ten crops any share is accepted."""

    needs_counts: ClassVar[bool] = True

    def choose_image(self, slot: SampleSlot, counts: Counts | None) -> tuple[int, int]:
        """Choose a class by its rarity, then an image with it."""
        if counts is None:
            raise ValueError("rare-class sampling needs the class counts of every image")
        random = np.random.default_rng([slot.seed, slot.step, slot.slot, 1])
        probability = self.probabilities(counts)
        class_id = int(random.choice(len(probability), p=probability))
        enough = np.flatnonzero(counts[:, class_id] >= min(self.pixels, counts[:, class_id].max()))
        return int(random.choice(enough)), class_id

    def probabilities(self, counts: Counts) -> NDArray[np.float64]:
        """Probability of each class (K,), 0 without pixels; raise `DataError` if no image has a labeled pixel."""
        pixels = counts.sum(0).astype(float)
        if not pixels.any():
            raise DataError("sampling rare found no labeled pixel in any mask; check the domain's ignore setting")
        share = pixels / max(1.0, pixels.sum())
        score = np.where(pixels > 0, (1 - share) / self.temperature, -np.inf)
        weight = np.exp(score - score.max())
        result: NDArray[np.float64] = weight / weight.sum()
        return result

    def neglected(self, counts: Counts) -> list[int]:
        """Classes with pixels that fewer than one of 1,000 images are chosen for."""
        return np.flatnonzero((self.probabilities(counts) < 1e-3) & counts.any(0)).tolist()

    def fits(self, label: UInt8, class_id: int) -> bool:
        """Return True if the class fills ``crop_share`` of the crop."""
        return class_id < 0 or bool((label == class_id).mean() >= self.crop_share)


def crop(
    image: Array, label: UInt8, size: int, random: np.random.Generator, fits: Callable[[UInt8], bool]
) -> tuple[Array, UInt8]:
    """Crop a random square of an image (H, W, C) and its label (H, W), of ``size`` pixels a side.

    A smaller image is padded by reflection, its label by 255. ``fits`` returns True if the label of a crop is accepted;
    the tenth crop is always accepted.
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
    return np.random.default_rng([seed, epoch, 0]).permutation(count)
