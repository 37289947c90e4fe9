"""A whole image through a network: classes, doubt, and what share of it each class has."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from overfly.core.errors import NotFiniteError
from overfly.core.records import IGNORE, UInt8
from overfly.exporting.predictor import Floats, ModelMetadata
from overfly.ops.windows import sliding
from overfly.web.uploads import Picture

SMALLEST = 32
"""Side in pixels that smaller images are padded to."""
TOGETHER = 4
"""Windows of one image in one batch; those of others may join them."""
ROWS = 256
"""Rows that are made into classes at once."""


class Found(NamedTuple):
    """What a network says of an image.

    Attributes:
        ids: class ids (H, W), 255 where the image has no data.
        doubt: entropy of each pixel's probabilities over ln K, (H, W), 0 (sure) to 255 (knows nothing).
        shares: share of the image's pixels that each class has.
    """

    ids: UInt8
    doubt: UInt8
    shares: tuple[float, ...]


def predict(picture: Picture, metadata: ModelMetadata, run: Callable[[Floats], Floats], gain: float = 1.0) -> Found:
    """Predict an image of any size: as a whole up to the network's window, else in overlapping windows.

    Args:
        picture: the image, with the bands that the network reads.
        metadata: of the network.
        run: images (N, C, h, w), float32, N at most `TOGETHER`, to class probabilities (N, K, h, w).
        gain: what the image's values are multiplied by, to be in the range that the network was trained on.

    Raises:
        NotFiniteError: the network's probabilities are no numbers.
    """
    image = np.ascontiguousarray(picture.image.transpose(2, 0, 1), dtype=np.float32)
    if gain != 1:
        image = image * np.float32(gain)
    height, width = image.shape[1:]

    def patches(cut: Tensor) -> Tensor:
        return torch.from_numpy(run(cut.contiguous().numpy()))

    if metadata.fixed or max(height, width) > metadata.window:
        probabilities = sliding(patches, torch.from_numpy(image), metadata.window, batch=TOGETHER).numpy()
    else:
        below, right = max(0, SMALLEST - height), max(0, SMALLEST - width)
        padded = np.pad(image, ((0, 0), (0, below), (0, right)), mode="edge") if below or right else image
        probabilities = run(padded[None])[0, :, :height, :width]
    return _classes(probabilities, picture)


def _classes(probabilities: Floats, picture: Picture) -> Found:
    classes, height, width = probabilities.shape
    ids, doubt = np.empty((height, width), np.uint8), np.empty((height, width), np.uint8)
    for top in range(0, height, ROWS):
        rows = slice(top, top + ROWS)
        part = probabilities[:, rows]
        if not np.isfinite(part).all():
            raise NotFiniteError("the network gives scores that are not finite; train it again or take another one")
        ids[rows] = part.argmax(0)
        entropy = -(part * np.log(np.maximum(part, 1e-12))).sum(0) / max(math.log(classes), 1e-12)
        doubt[rows] = (entropy.clip(0, 1) * 255).round()
    if picture.nodata_mask is not None:
        ids[picture.nodata_mask] = IGNORE
        doubt[picture.nodata_mask] = 0
    counts = np.bincount(ids.ravel(), minlength=256)[:classes]
    total = max(int(counts.sum()), 1)
    return Found(ids, doubt, tuple(float(count) / total for count in counts))


__all__ = ["TOGETHER", "Found", "predict"]
