"""Base class of datasets: classes, and the items of each split."""

import json
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from pydantic import ConfigDict

from overfly.core import choices
from overfly.core.classes import Classes
from overfly.core.errors import DataError, OverflyError
from overfly.core.progress import print_status
from overfly.core.records import IGNORE, Array, Counts, Item, UInt8
from overfly.core.spec import Choice
from overfly.data import reading
from overfly.data.headers import file_stamp

Split = choices.Split
SPLITS: tuple[Split, ...] = ("train", "val", "test")
SAMPLED_IMAGES = 50
"""Images whose sizes are read, and from which mean and standard deviation are estimated."""
FIXED_TOP_DIFFERENCE = 0.5
"""Difference of class shares above which images have a fixed top."""


T = TypeVar("T")
_CHECKED: dict[tuple[object, ...], frozenset[int]] = {}
"""Class ids of the masks that this process has checked, by settings and state of the files."""


class SplitError(DataError):
    """A domain does not have this split; its other splits are usable."""


class UnknownCodesError(DataError):
    """A mask holds numbers or colors of no class; ``codes`` counts the pixels of each."""

    def __init__(self, message: str, codes: Counter[reading.Code]) -> None:
        super().__init__(message)
        self.codes = codes

    @staticmethod
    def message(errors: "Sequence[UnknownCodesError]") -> str:
        """Message of several masks: the first error, the values of all, and a setting to paste."""
        codes = reduce(Counter[reading.Code].__add__, (error.codes for error in errors))
        everywhere = f"; {len(errors)} masks hold such values: {reading.list_codes(codes)}" if len(errors) > 1 else ""
        return f"{errors[0]}{everywhere}; for example, ignore: {json.dumps([code for code, _ in codes.most_common(9)])}"


if TYPE_CHECKING:
    overridable_property = property
else:

    class overridable_property:  # noqa: N801
        """A property that subclasses may override by a property or a pydantic field of the same name."""

        def __init__(self, function: Callable[[Any], Any]) -> None:
            self.function = function
            self.__doc__ = function.__doc__

        def __get__(self, instance: Any, owner: type | None = None) -> Any:
            if instance is None:
                raise AttributeError("defined on instances only")
            return self.function(instance)


class Domain(Choice, ABC):
    """Imagery of one region, with or without labels.

    A new dataset is a subclass: it defines `classes` and `items`; if its files need more than
    `overfly.data.reading`, it overrides `read_image` and `read_label`.
    """

    model_config = ConfigDict(ignored_types=(overridable_property,))

    @overridable_property
    def classes(self) -> Classes:
        """Classes of the labels; every subclass defines them."""
        raise NotImplementedError(f"the domain {self.name} does not define classes")

    @abstractmethod
    def items(self, split: Split) -> Sequence[Item]:
        """Return all images of a split, in a fixed order.

        Raises `SplitError`: this domain has no such split, and `DataError`: the split's files are missing or invalid.
        """

    @overridable_property
    def title(self) -> str:
        """Name in tables and folders."""
        return str(getattr(self, "scene", self.name)).capitalize()

    @overridable_property
    def bands(self) -> int:
        """Number of bands of each image."""
        return 3

    @overridable_property
    def max_value(self) -> float:
        """Value of the brightest pixel that the sensor can give: 255 for 8 bits, 65535 for 16, 1 for most floats."""
        return 255.0

    @overridable_property
    def gsd(self) -> float | None:
        """Length of a pixel on the ground in meters; None if unknown."""
        return None

    @overridable_property
    def nodata(self) -> float | None:
        """Value of pixels without data, where the files declare none; None: no such value."""
        return None

    @overridable_property
    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """Mean and standard deviation of each band, in the sensor's own range; None if unknown."""
        return None

    def known_counts(self, items: Sequence[Item]) -> Counts | None:  # noqa: ARG002
        """Labeled pixels of each class in each item (N, K) without reading each label; None: not known."""
        return None

    def read_crop(
        self, item: Item, size: int, random: np.random.Generator, fits: Callable[[UInt8], bool]  # noqa: ARG002
    ) -> tuple[Array, UInt8] | None:  # fmt: skip
        """Read a random crop, image (size, size, C) and label (size, size), without the rest of the image.

        Of ten crops, one whose label ``fits`` is taken if there is one. Without a label, the crop's is 255 where there
        has no data and 0 elsewhere. None, the default: the whole image is read, and cropped then.
        """
        return None

    def read_image(self, item: Item) -> Array:
        """Read the image of an item, (H, W, C), in the sensor's type and range."""
        return reading.read_image(item.image, bands=self.bands, nodata=self.nodata)

    def nodata_mask(self, item: Item) -> reading.Mask | None:  # noqa: ARG002
        """Pixels of an item's image without data (H, W), bool; None: no such pixels. Opens no label."""
        return None

    def read_label(self, item: Item) -> UInt8:
        """Read the label of an item, (H, W), class ids 0 to K-1 or 255; raise `DataError` if it has none, or others."""
        return reading.read_index_label(item, classes=len(self.classes))


def split_items(domain: Domain, split: Split) -> Sequence[Item]:
    """Return the items of a split; none if the domain does not have it."""
    try:
        return domain.items(split)
    except SplitError:
        return ()


def without_labels(items: Sequence[Item]) -> list[Item]:
    """Return the items without labels, as training reads a target."""
    return [item._replace(label=None) for item in items]


def sample_evenly(items: Sequence[T], limit: int | None) -> list[T]:
    """Return at most ``limit`` items, evenly spaced; all of them if the limit is None."""
    if limit is None or limit >= len(items):
        return list(items)
    return [items[int((index + 0.5) * len(items) / limit)] for index in range(limit)]


def check_masks(domain: Domain, splits: Sequence[Split]) -> None:
    """Check that every mask of some splits can be decoded and that they hold two classes, before training starts.

    A process decodes a mask once, unless a file or the domain's settings change. Opens the labels: call it only for
    splits whose labels the run reads; splits that the domain does not have are skipped. Raises `DataError`: a split's
    files do not fit together, or masks cannot be decoded; names the first and their number.
    """
    all_items = [item for split in splits for item in split_items(domain, split)]
    counts = domain.known_counts(all_items)
    items = [item for item in all_items if isinstance(item.label, Path)]
    settings = json.dumps([type(domain).__qualname__, domain.model_dump(mode="json")], sort_keys=True)

    def check(item: Item) -> frozenset[int] | Exception:
        try:
            paths = [path for path in (item.label, item.image) if isinstance(path, Path)]
            key = (settings, *((path, file_stamp(path)) for path in paths))
            if key not in _CHECKED:
                _CHECKED[key] = frozenset(np.bincount(domain.read_label(item).ravel()).nonzero()[0].tolist())
        except (OverflyError, OSError) as error:
            return error
        return _CHECKED[key]

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        results = list(pool.map(check, items))
    failed = [result for result in results if isinstance(result, Exception)]
    if unknown := [error for error in failed if isinstance(error, UnknownCodesError)]:
        raise DataError(UnknownCodesError.message(unknown)) from unknown[0]
    if failed:
        more = f" ({len(failed)} of {len(items)} masks have problems; list them with: overfly data check)"
        raise DataError(str(failed[0]) + (more if len(failed) > 1 else "")) from failed[0]
    known = () if counts is None else counts.sum(0).nonzero()[0].tolist()
    present = frozenset(known).union(*(result for result in results if isinstance(result, frozenset))) - {IGNORE}
    if len(present) == 1 < len(domain.classes):
        raise DataError(absent_classes(domain, items, present))
    absent = [name for number, name in enumerate(domain.classes.names) if number not in present]
    if absent and "train" in splits and (settings, *absent) not in _CHECKED:
        _CHECKED[settings, *absent] = frozenset()  # said once
        print_status(f"{domain.title}: no mask contains {', '.join(absent)}; correct ids or colors, or the classes")


def absent_classes(domain: Domain, items: Sequence[Item], present: Collection[int]) -> str:
    """Error message for classes that no label of some items contains; names the setting that gives them 255."""
    names = domain.classes.names
    absent = [name for number, name in enumerate(names) if number not in present]
    message = f"no mask contains {', '.join(absent)}"
    ids = {name: numbers[0] for name, numbers in getattr(domain, "ids", {}).items()} or {
        name: number for number, name in enumerate(names)
    }
    shares = [0.0]
    for item in items:
        with suppress(DataError):
            values = reading.read_item_label(item).values
            shares.append(float((values == IGNORE).mean()) if values.ndim == 2 else 0.0)
    share = sum(shares) / max(1, len(shares) - 1)
    if len(absent) > 1 or not share or IGNORE in ids.values():
        return f"{message}; correct the masks or the domain's ids or colors, or remove the class"
    shown = ", ".join(f"{name}: {number}" for name, number in (ids | {absent[0]: IGNORE}).items())
    return f"{message}; {share:.0%} of pixels are 255, which is ignored: if they are {absent[0]}, set ids: {{{shown}}}"


def shortest_sides(domain: Domain) -> list[int]:
    """Shorter side of up to `SAMPLED_IMAGES` training images, in pixels; empty for generated images."""
    items = sample_evenly(domain.items("train"), SAMPLED_IMAGES)
    return [min(header.height, header.width) for header in map(reading.item_header, items) if header is not None]


def has_fixed_top(domain: Domain) -> bool:
    """Whether the images are upright photographs, such as street scenes, rather than overhead imagery.

    The class shares of the upper and of the lower third of up to `SAMPLED_IMAGES` labels differ by more than half
    (total variation): by 0.93 or more in street scenes, by 0.13 or less in overhead imagery (docs/results/choice.md).
    """
    counts = np.zeros((2, len(domain.classes)))
    for item in sample_evenly([item for item in domain.items("train") if item.label is not None], SAMPLED_IMAGES):
        label = domain.read_label(item)
        third = max(1, label.shape[0] // 3)
        for index, part in enumerate((label[:third], label[-third:])):
            counts[index] += np.bincount(part[part != IGNORE], minlength=counts.shape[1])
    upper, lower = counts / np.maximum(1, counts.sum(1, keepdims=True))
    return bool(abs(upper - lower).sum() / 2 > FIXED_TOP_DIFFERENCE)
