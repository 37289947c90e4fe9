"""Sliding windows: positions that cover an image, blending weights, and prediction window by window."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Window(NamedTuple):
    """A rectangle inside an image, in pixels."""

    top: int
    left: int
    height: int
    width: int

    @property
    def rows(self) -> slice:
        """Rows of the image that the window covers."""
        return slice(self.top, self.top + self.height)

    @property
    def columns(self) -> slice:
        """Columns of the image that the window covers."""
        return slice(self.left, self.left + self.width)

    @property
    def ranges(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Rows and columns, first and one past the last, as rasterio takes them."""
        return (self.top, self.top + self.height), (self.left, self.left + self.width)


def window_starts(length: int, size: int, overlap: float) -> list[int]:
    """Start positions, ascending from 0, of the windows of ``size`` along an axis of ``length`` pixels.

    ``overlap`` is the share of a window that the next one covers again, 0 to below 1. The last window is shifted
    inside, so its overlap may be larger. Where the axis is shorter than a window there is one window, at 0. Raises
    `ValueError`: a length is below 1, or the overlap outside 0 to below 1.
    """
    if length < 1 or size < 1:
        raise ValueError(f"image and window must be at least 1 pixel wide, got {length} and {size}")
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap must be 0 to below 1, got {overlap}")
    if length <= size:
        return [0]
    stride = max(1, round(size * (1 - overlap)))
    number = math.ceil((length - size) / stride) + 1
    return [min(index * stride, length - size) for index in range(number)]


def window_grid(height: int, width: int, size: int, overlap: float) -> list[Window]:
    """Windows of ``size`` by ``size`` pixels that cover every pixel of an image, row by row from the top left.

    Along an axis on which the image is smaller than a window, the window is as long as the image; `cut_window` pads it.
    ``overlap`` is the share of a window's side that the next one covers again, 0 to below 1.
    """
    return [
        Window(top, left, min(size, height), min(size, width))
        for top in window_starts(height, size, overlap)
        for left in window_starts(width, size, overlap)
    ]


def cut_window(image: Tensor, window: Window, size: int) -> Tensor:
    """Pixels (…, C, size, size) of a window of an image (…, C, H, W), float, padded on the right and below.

    The last pixels are repeated.
    """
    patch = image[..., window.rows, window.columns]
    below, right = size - window.height, size - window.width
    if not (below or right):
        return patch
    return F.pad(patch, (0, right, 0, below), mode="replicate")


def blend_weights(size: int) -> Tensor:
    """Weight of each pixel of a window (size, size), float32: a pyramid, 1 in the middle, above 0 at the edge.

    Pixels at the edge, where the network sees the least context, weigh less than the neighboring window's; windows
    that overlap by one half have a constant sum of weights.
    """
    position = torch.arange(size, dtype=torch.float32) + 0.5
    ramp = torch.minimum(position, size - position)
    ramp = ramp / ramp.max()
    return ramp[:, None] * ramp[None, :]


def slide_inference(
    predict: Callable[[Tensor], Tensor], image: Tensor, size: int, overlap: float = 0.25, batch: int = 4
) -> Tensor:
    """Class scores (…, K, H, W), float32, of images (…, C, H, W): weighted means of those of overlapping windows.

    Logits are averaged as logits, probabilities as probabilities, as ``predict`` returns them: images (N, C, size,
    size), N at most ``batch``, to class scores (N, K, size, size). It moves its input to the network's device. A
    smaller image is padded by repeating its border. ``overlap`` is the share of a window's side that the next one
    covers again, 0 to below 1. Raises `ValueError`: the size is below 1, the overlap outside 0 to below 1, the batch of
    images empty, or the scores are not of the window's size.
    """
    images = image if image.dim() == 4 else image[None]
    height, width = images.shape[-2:]
    grid = window_grid(height, width, size, overlap)
    items = [(index, window) for index in range(len(images)) for window in grid]
    weights = blend_weights(size).to(images.device)
    covered = torch.zeros(height, width, device=images.device)
    for window in grid:
        covered[window.rows, window.columns] += weights[: window.height, : window.width]
    total: Tensor | None = None
    for first in range(0, len(items), batch):
        chunk = items[first : first + batch]
        scores = predict(torch.stack([cut_window(images[index], window, size) for index, window in chunk]))
        if scores.shape[-2:] != (size, size):
            raise ValueError(f"scores of a window must be {(size, size)}, got {tuple(scores.shape[-2:])}")
        scores = scores.to(images.device, torch.float32)
        if total is None:
            total = torch.zeros(len(images), scores.shape[1], height, width, device=images.device)
        for (index, window), score in zip(chunk, scores, strict=True):
            total[index, :, window.rows, window.columns] += (score * weights)[:, : window.height, : window.width]
    if total is None:
        raise ValueError("the batch of images is empty")
    total /= covered
    return total if image.dim() == 4 else total[0]
