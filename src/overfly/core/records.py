"""Records passed between data, methods, networks and losses."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

IGNORE = 255
"""The id of pixels that have no class: never trained on, never scored, never pasted."""
Array = NDArray[Any]
Counts = NDArray[np.int64]
"""Labeled pixels of each class in each image, (images, K)."""
LazyArray = Callable[[], Array]
"""A function that returns an array, for images that are generated instead of read; it can be pickled."""


class Item(NamedTuple):
    """One image of a domain.

    Attributes:
        name: unique within the split and valid as a file name, such as ``Rural_12``.
        image: file, or function that generates the image, (H, W, C), in the sensor's range.
        label: file, or function that generates the label, (H, W), as the domain stores it; None: no label.
    """

    name: str
    image: Path | LazyArray
    label: Path | LazyArray | None = None


class Labeled(NamedTuple):
    """Images (B, C, H, W), float, in the sensor's own range, and labels (B, H, W), int64, class ids or `IGNORE`."""

    image: Tensor
    label: Tensor


class Batch(NamedTuple):
    """Data of one training step. The target has no labels.

    A part that the method does not need is empty: its first dimension is 0.

    Attributes:
        source: images and labels.
        target: images (B, C, H, W), float, in the sensor's own range.
        nodata_mask: pixels of the target without data (B, H, W), bool: no-data values, full transparency, and
            mirrored borders. It comes from the image, not from a label. None: no such pixels.
    """

    source: Labeled
    target: Tensor
    nodata_mask: Tensor | None = None

    @property
    def valid_mask(self) -> Tensor | None:
        """Pixels of the target with data (B, H, W), bool; None: all pixels."""
        return None if self.nodata_mask is None else ~self.nodata_mask


class Logits(NamedTuple):
    """Outputs of a network before softmax.

    Attributes:
        main: class scores (B, K, h, w), at the network's own stride or, from a `Segmenter`, at the image's size.
        aux: class scores of auxiliary heads, each (B, K, h, w); empty without training heads.
        boundary: scores of class boundaries (B, 1, h, w), or None.
        features: the encoder's last feature map (B, F, h', w'), or None.
    """

    main: Tensor
    aux: tuple[Tensor, ...] = ()
    boundary: Tensor | None = None
    features: Tensor | None = None

    def select(self, images: slice) -> Self:
        """Select images of the batch."""
        boundary, features = (None if part is None else part[images] for part in (self.boundary, self.features))
        return type(self)(self.main[images], tuple(scores[images] for scores in self.aux), boundary, features)


Losses = Mapping[str, Tensor]
"""Named scalar terms. The trainer minimizes their sum and logs each term; a term without a gradient is only logged."""
UInt8 = NDArray[np.uint8]
