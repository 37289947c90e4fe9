"""The one tiler: windows that cover a picture, weights that blend them, and prediction window by window.

Windows and weights stand apart from the accumulation, so that a raster that fits no memory can be done with the same
windows: they come row by row, and once a window starts below a row of pixels, that row is complete.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Window(NamedTuple):
    """A rectangle of a picture, in pixels, that never reaches over the picture's border."""

    top: int
    left: int
    height: int
    width: int

    @property
    def rows(self) -> slice:
        """The rows of the picture that it covers."""
        return slice(self.top, self.top + self.height)

    @property
    def columns(self) -> slice:
        """The columns of the picture that it covers."""
        return slice(self.left, self.left + self.width)


def starts(length: int, size: int, overlap: float) -> list[int]:
    """Where the windows of one axis begin.

    Args:
        length: pixels of the axis.
        size: pixels of a window.
        overlap: share of a window that the next one covers again, 0 to below 1.

    Returns:
        Rising positions, the first 0. The last window is shifted inside, so it may overlap more than asked. Where the
        axis is shorter than a window there is one window, at 0.

    Raises:
        ValueError: a length below 1, or an overlap outside 0 to below 1.
    """
    if length < 1 or size < 1:
        raise ValueError(f"a picture and a window have at least one pixel a side, not {length} and {size}")
    if not 0 <= overlap < 1:
        raise ValueError(f"windows overlap by a share from 0 to below 1, not {overlap}")
    if length <= size:
        return [0]
    stride = max(1, round(size * (1 - overlap)))
    number = math.ceil((length - size) / stride) + 1
    return [min(index * stride, length - size) for index in range(number)]


def windows(height: int, width: int, size: int, overlap: float) -> list[Window]:
    """Windows of ``size`` by ``size`` that cover every pixel of a picture, row by row from the top left.

    All have the full size, except along an axis on which the picture is smaller than a window: there the window is
    as long as the picture, and `cut` pads what it reads.

    Args:
        height: rows of the picture.
        width: columns of the picture.
        size: side of a window in pixels.
        overlap: share of a window's side that the next one covers again, 0 to below 1.

    Raises:
        ValueError: a side below 1, or an overlap outside 0 to below 1.
    """
    return [
        Window(top, left, min(size, height), min(size, width))
        for top in starts(height, size, overlap)
        for left in starts(width, size, overlap)
    ]


def cut(image: Tensor, window: Window, size: int) -> Tensor:
    """What a window shows, padded to the right and below to ``size`` by repeating the border's pixels.

    Args:
        image: (C, H, W) or (B, C, H, W), float.
        window: a window of this image.
        size: side that the network is given, in pixels; at least the window's.

    Returns:
        (C, size, size) or (B, C, size, size).
    """
    patch = image[..., window.rows, window.columns]
    below, right = size - window.height, size - window.width
    if not (below or right):
        return patch
    batched = patch if patch.dim() == 4 else patch[None]
    padded = F.pad(batched, (0, right, 0, below), mode="replicate")
    return padded if patch.dim() == 4 else padded[0]


def blend_weights(size: int) -> Tensor:
    """Weight of each pixel of a window (size, size), float32: a pyramid, 1 in the middle, above 0 at the edge.

    A window's edge, where the network sees least of the surroundings, gives way to its neighbor's middle; neighbors
    that overlap by one half add up to a constant.
    """
    position = torch.arange(size, dtype=torch.float32) + 0.5
    ramp = torch.minimum(position, size - position)
    ramp = ramp / ramp.max()
    return ramp[:, None] * ramp[None, :]


def sliding(
    predict: Callable[[Tensor], Tensor], image: Tensor, size: int, overlap: float = 0.25, batch: int = 4
) -> Tensor:
    """Class scores of a whole picture from overlapping windows.

    What ``predict`` gives is blended as it is, a weighted mean of all windows that see a pixel: logits stay logits
    (their mean is the geometric mean of the probabilities, and a softmax may follow as for a whole image), and a
    ``predict`` that ends in a softmax has its probabilities blended. Where every pixel is judged by itself, the result
    is that of the whole image.

    Args:
        predict: images (N, C, size, size) to class scores (N, K, size, size), N at most ``batch``; it moves its input
            to where the network is.
        image: (C, H, W) or (B, C, H, W), float, in the sensor's range.
        size: side of a window in pixels; a picture smaller than it is padded by repeating its border.
        overlap: share of a window's side that the next one covers again, 0 to below 1.
        batch: patches given to ``predict`` at once.

    Returns:
        Class scores (K, H, W) or (B, K, H, W), float32, on the image's device.

    Raises:
        ValueError: a size below 1, an overlap outside 0 to below 1, or scores that are not of the window's size.
    """
    images = image if image.dim() == 4 else image[None]
    height, width = images.shape[-2:]
    places = [(index, window) for index in range(len(images)) for window in windows(height, width, size, overlap)]
    weights = blend_weights(size).to(images.device)
    covered = torch.zeros(height, width, device=images.device)
    for window in windows(height, width, size, overlap):
        covered[window.rows, window.columns] += weights[: window.height, : window.width]
    total: Tensor | None = None
    for first in range(0, len(places), batch):
        chunk = places[first : first + batch]
        scores = predict(torch.stack([cut(images[index], window, size) for index, window in chunk]))
        if scores.shape[-2:] != (size, size):
            raise ValueError(f"scores of a window are {tuple(scores.shape[-2:])}, not {(size, size)}")
        scores = scores.to(images.device, torch.float32)
        if total is None:
            total = torch.zeros(len(images), scores.shape[1], height, width, device=images.device)
        for (index, window), score in zip(chunk, scores, strict=True):
            part = (score * weights)[:, : window.height, : window.width]
            total[index, :, window.rows, window.columns] += part
    if total is None:
        raise ValueError("there is no image to predict: the batch is empty")
    total /= covered
    return total if image.dim() == 4 else total[0]


__all__ = ["Window", "blend_weights", "cut", "sliding", "starts", "windows"]
