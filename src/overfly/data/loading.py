"""Load batches from domains. A batch is a function of (seed, step), so resuming skips ahead at no cost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from overfly.core.errors import DataError, MissingExtraError, OverflyError, RecipeError
from overfly.core.records import IGNORE, Array, Batch, Item, Labeled, UInt8
from overfly.data.cache import nodata_label, open_image
from overfly.data.check import class_counts, item_source, max_value_error
from overfly.data.domain import Domain
from overfly.data.sampling import Counts, SampleSlot, Sampling, crop

MEMORY_BYTES = 2 * 2**30
"""Largest size of the decoded images of a domain that a process caches in memory."""

LONGEST = 16_384
"""Longest side of a crop, or of an image as it is resized, in pixels."""

BEYOND = 8
"""How many times the longer side of its image a crop may be: the rest is mirrored."""


@dataclass
class Stream:
    """Loads the samples of one domain for every batch.

    Attributes:
        domain: where images come from.
        items: those of one split; labels taken away where training must not see them.
        sampling: how images are chosen.
        batch: images in a step, over all ranks.
        crop: side of the square that is cut out, in pixels.
        resize: side that images are first resized to, or None.
        seed: of the run; the streams of one run differ by ``key``.
        key: number of the stream.
        cache: folder of decoded images, "memory" (up to `MEMORY_BYTES`), or None.
        counts: labeled pixels of each class in each image, where the sampling needs them; None reads every mask.
        labeled: whether every image must have a mask, and one mask at least a pixel to learn from. Masks are read
            until one has: as a rule the first alone.

    Raises:
        RecipeError: crop or resize is out of range.
        DataError: there are no images, or no labels where there must be some.
    """

    domain: Domain
    items: Sequence[Item]
    sampling: Sampling
    batch: int
    crop: int
    resize: int | None
    seed: int
    key: int
    cache: Path | str | None = None
    counts: Counts | None = None
    labeled: bool = False
    _kept: dict[str, tuple[Array, UInt8]] = field(default_factory=dict, repr=False)
    _bytes: int = 0
    _seen: set[str] = field(default_factory=set, repr=False)

    def __post_init__(self) -> None:
        if not self.items:
            raise DataError(f"the {self.domain.name} domain has no images in this split; check its folders")
        for setting, side in (("crop", self.crop), ("resize", self.resize)):
            if side is not None and not 1 <= side <= LONGEST:
                raise RecipeError(f"{setting} is {side} pixels, and 1 to {LONGEST} will do; correct {setting}")
        if self.labeled or self.sampling.needs_counts:
            self._check_labels()

    def _check_labels(self) -> None:
        without = [item for item in self.items if item.label is None]
        if without and self.labeled:
            raise DataError(
                f"the source {self.domain.title} has no masks for {len(without)} of {len(self.items)} images, the "
                f"first {item_source(without[0])}; set source.masks"
            )
        if without and self.counts is None:
            raise DataError(
                f"sampling {self.sampling.name!r} needs labels, and {item_source(without[0])} has none; make it uniform"
            )
        if self.sampling.needs_counts and self.counts is None:
            self.counts = np.stack([class_counts(self.domain, item) for item in self.items])
        if self.counts is None:
            something = any(class_counts(self.domain, item).any() for item in self.items)
        else:
            something = bool(self.counts.any())
        if not something:
            raise DataError(
                f"the masks of {self.domain.title} are ignored in every pixel of all {len(self.items)} images, the "
                f"first {item_source(self.items[0])}; correct the masks or the domain's settings"
            )

    def chosen(self, step: int, slots: Sequence[int]) -> list[tuple[Item, int]]:
        """The items of a step, each with the class it was chosen for."""
        seed, count = self.seed * 16 + self.key, len(self.items)
        places = [SampleSlot(seed, step, slot, self.batch, count) for slot in slots]
        picks = [self.sampling.choose_image(place, self.counts) for place in places]
        return [(self.items[index], wanted) for index, wanted in picks]

    def read(self, step: int, slots: Sequence[int]) -> Labeled:
        """Images (B, C, crop, crop) in the sensor's range, and labels (B, crop, crop), of some slots of a step.

        An item without a label is `IGNORE` everywhere.
        """
        found = self._fitting(step, slots)
        without = [place for place, (item, _) in enumerate(self.chosen(step, slots)) if item.label is None]
        found.label[without] = IGNORE
        return found

    def read_unlabeled(self, step: int, slots: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Images (B, C, crop, crop), and their pixels without data (B, crop, crop), bool.

        Raises:
            ValueError: an item has a label.
        """
        if any(item.label is not None for item, _ in self.chosen(step, slots)):
            raise ValueError("the target's items still have labels; take them away by without_labels")
        found = self._fitting(step, slots)
        return found.image, found.label == IGNORE

    def _fitting(self, step: int, slots: Sequence[int]) -> Labeled:
        try:
            return self._read(step, slots)
        except MemoryError:
            raise RecipeError(
                f"images of batch {self.batch} and crop {self.crop} do not fit into memory; make one of them smaller"
            ) from None

    def _read(self, step: int, slots: Sequence[int]) -> Labeled:
        images, labels = [], []
        for slot, (item, wanted) in zip(slots, self.chosen(step, slots), strict=True):
            image, label = self._open(item)
            longer = max(image.shape[:2])
            if self.crop > BEYOND * longer:
                raise RecipeError(
                    f"crop is {self.crop}, more than {BEYOND} times the longer side {longer} of {item_source(item)}; "
                    f"set crop to {longer} or less"
                )
            random = np.random.default_rng([self.seed, self.key, step, slot])
            image, label = crop(image, label, self.crop, random, partial(self.sampling.fits, wanted=wanted))
            images.append(torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1), np.float32)))
            labels.append(torch.from_numpy(np.ascontiguousarray(label, np.int64)))
        return Labeled(torch.stack(images), torch.stack(labels))

    def _open(self, item: Item) -> tuple[Array, UInt8]:
        """Image and label; without a mask, `IGNORE` where the image has no data and 0 elsewhere."""
        if item.name in self._kept:
            return self._kept[item.name]
        folder = Path(self.cache) if self.cache not in (None, "memory") else None
        image, label = open_image(self.domain, item, self.resize, folder)
        if item.name not in self._seen:
            above = max_value_error(self.domain, item, image)
            if above is not None:
                raise DataError(above)
            self._seen.add(item.name)
        if label is None:
            label = nodata_label(self.domain, item, self.resize, folder)
        if label is None:
            label = np.zeros(image.shape[:2], np.uint8)
        if self.cache == "memory" and self._bytes < MEMORY_BYTES:
            self._kept[item.name] = image, label
            self._bytes += image.nbytes + label.nbytes
        return image, label


class BatchDataset(Dataset[Batch | OverflyError]):
    """The batch of each step, by its number."""

    def __init__(self, source: Stream | None, target: Stream | None, rank: int = 0, world: int = 1) -> None:
        self.source, self.target, self.rank, self.world = source, target, rank, world

    def __getitem__(self, step: int) -> Batch | OverflyError:
        """What this rank sees of a step; or what is wrong, as a value, which worker processes hand on whole."""
        try:
            return self.batch(step)
        except MissingExtraError as error:
            return DataError(str(error))
        except OverflyError as error:
            return error

    def batch(self, step: int) -> Batch:
        """What this rank sees of a step.

        Raises:
            OverflyError: an image cannot be read.
        """
        empty = Labeled(torch.zeros(0, 0, 0, 0), torch.zeros(0, 0, 0, dtype=torch.int64))
        source = self.source.read(step, self._slots(self.source)) if self.source else empty
        if self.target is None:
            return Batch(source, empty.image)
        images, nodata_mask = self.target.read_unlabeled(step, self._slots(self.target))
        return Batch(source, images, nodata_mask if bool(nodata_mask.any()) else None)

    def names(self, step: int) -> list[str]:
        """Names of the images that this rank sees in a step."""
        streams = [stream for stream in (self.source, self.target) if stream]
        return [item.name for stream in streams for item, _ in stream.chosen(step, self._slots(stream))]

    def _slots(self, stream: Stream) -> list[int]:
        return list(range(self.rank, stream.batch, self.world))


class _Range(torch.utils.data.Sampler[int]):
    """The numbers from ``start`` to ``stop``."""

    def __init__(self, start: int, stop: int) -> None:
        self.numbers = range(start, stop)

    def __iter__(self) -> Iterator[int]:
        return iter(self.numbers)

    def __len__(self) -> int:
        return len(self.numbers)


def batch_loader(
    steps: BatchDataset, start: int, stop: int, *, workers: int, pin: bool
) -> DataLoader[Batch | OverflyError]:
    """Batches of the steps from ``start`` up to ``stop``, made by ``workers`` processes (0: by this one)."""
    return DataLoader(
        steps,
        batch_size=None,
        sampler=_Range(start, stop),
        num_workers=workers,
        pin_memory=pin,
        prefetch_factor=2 if workers else None,
    )
