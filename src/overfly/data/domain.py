"""Base class of datasets: classes, and the items of each split."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import ConfigDict

from overfly.core.choices import Split
from overfly.core.classes import Classes
from overfly.core.errors import DataError
from overfly.core.records import Array, Item, UInt8
from overfly.core.spec import Choice
from overfly.data import reading

SPLITS: tuple[Split, ...] = ("train", "val", "test")


class SplitError(DataError):
    """A domain has no such split: not a fault of the files, and no reason to refuse the splits that it does have."""


if TYPE_CHECKING:
    fact = property
else:

    class fact:  # noqa: N801
        """A property that a kind may state as a property of its own or take from the recipe as a setting.

        A plain property of the base class would hide a pydantic field of the same name; this one gives way to it.
        """

        def __init__(self, function: Callable[[Any], Any]) -> None:
            self.function = function
            self.__doc__ = function.__doc__

        def __get__(self, instance: Any, owner: type | None = None) -> Any:
            if instance is None:
                raise AttributeError("known of a domain, not of its kind")
            return self.function(instance)


class Domain(Choice, ABC):
    """Imagery of one place, with or without labels.

    A new dataset is a new kind: it defines `classes` and `items`; if its files need more than
    `overfly.data.reading`, it overrides `read_image` and `read_label`.
    """

    model_config = ConfigDict(ignored_types=(fact,))

    @fact
    def classes(self) -> Classes:
        """The label set of `read_label`. Every kind defines its own."""
        raise NotImplementedError(f"the domain {self.name} does not say its classes")

    @abstractmethod
    def items(self, split: Split) -> Sequence[Item]:
        """All images of a split, in an order that never changes.

        Raises:
            SplitError: this domain has no such split.
            DataError: the split's files are not what they should be.
        """

    @fact
    def title(self) -> str:
        """Name in tables and folders."""
        return str(getattr(self, "scene", self.name)).capitalize()

    @fact
    def bands(self) -> int:
        """Number of bands of each image."""
        return 3

    @fact
    def max_value(self) -> float:
        """Value of the brightest pixel that the sensor can give: 255 for 8 bits, 65535 for 16, 1 for most floats."""
        return 255.0

    @fact
    def gsd(self) -> float | None:
        """Length of a pixel on the ground in meters; None if unknown."""
        return None

    @fact
    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """Mean and standard deviation of each band, in the sensor's own range; None if unknown."""
        return None

    def read_image(self, item: Item) -> Array:
        """The image of an item, (H, W, C), in the sensor's own type and range."""
        return reading.read_image(item.image, bands=self.bands)

    def nodata_mask(self, item: Item) -> reading.Mask | None:  # noqa: ARG002
        """Pixels of an item's image without data (H, W), bool; None: no such pixels. Opens no label."""
        return None

    def read_label(self, item: Item) -> UInt8:
        """The label of an item, (H, W), class ids 0 to K-1 or 255.

        Raises:
            DataError: the item has no label, or the file holds values that are not classes.
        """
        return reading.read_index_label(item, classes=len(self.classes))


def without_labels(items: Sequence[Item]) -> list[Item]:
    """The same items with their labels taken away: all that training is given of a target."""
    return [item._replace(label=None) for item in items]


def sample_evenly(items: Sequence[Item], limit: int | None) -> list[Item]:
    """At most ``limit`` of the items, evenly spaced; all of them where the limit is None."""
    if limit is None or limit >= len(items):
        return list(items)
    return [items[int((at + 0.5) * len(items) / limit)] for at in range(limit)]


__all__ = ["SPLITS", "Domain", "Split", "SplitError", "sample_evenly", "without_labels"]
