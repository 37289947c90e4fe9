"""Augmentations that move pixels: image and label go through one and the same sampling grid.

Images are sampled bilinearly and mirrored beyond their edges, so that no black wedges reach the statistics; labels are
sampled by nearest neighbor and are `IGNORE` beyond their edges. Lengths count in pixels from the upper left corner, so
that the center of the first pixel lies at 0.5.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Generator, Tensor

from overfly.core.errors import RecipeError
from overfly.core.records import IGNORE, Labeled
from overfly.core.spec import Count, Pixels, Positive, Share
from overfly.ops.augmentation import Augment, chance, log_uniform, ordered, uniform

PartOfOne = Annotated[float, Field(ge=0, lt=1)]
"""A part of a whole that is not all of it: 0 or more, below 1."""


def warp(batch: Labeled, grid: Tensor) -> Labeled:
    """Sample images and labels at the same places.

    Args:
        batch: images (B, C, H, W) and labels (B, H, W).
        grid: where each pixel of the result is taken from, (B, h, w, 2), x then y, in pixels.

    Returns:
        Images (B, C, h, w), bilinear, and labels (B, h, w), nearest, `IGNORE` where taken from outside.
    """
    height, width = batch.label.shape[-2:]
    size = torch.tensor([width, height], dtype=grid.dtype, device=grid.device)
    place = grid * (2 / size) - 1
    image = F.grid_sample(batch.image.to(grid.dtype), place, "bilinear", "reflection", align_corners=False)
    shifted = batch.label.unsqueeze(1).to(grid.dtype) - IGNORE  # so that the zeros from outside become IGNORE
    label = F.grid_sample(shifted, place, "nearest", "zeros", align_corners=False).squeeze(1)
    return Labeled(image.to(batch.image.dtype), (label + IGNORE).to(batch.label.dtype))


def affine(batch: Labeled, linear: Tensor, pivot: Tensor, moved: Tensor) -> Labeled:
    """Turn, stretch and shift: the point ``pivot`` lands on ``moved``, its surroundings follow.

    Args:
        batch: images (B, C, H, W) and labels (B, H, W).
        linear: (B, 2, 2), from distances in the result to distances in the image, (x, y) both.
        pivot: a point (x, y) of each image, (B, 2), in pixels.
        moved: where that point is in the result, (B, 2), in pixels.
    """
    height, width = batch.label.shape[-2:]
    linear, pivot, moved = (each.to(batch.image.device, torch.float32) for each in (linear, pivot, moved))
    x, y = _centers(width, linear) - moved[:, :1], _centers(height, linear) - moved[:, 1:]
    across = linear[:, :, 0, None, None] * x[:, None, None, :]
    down = linear[:, :, 1, None, None] * y[:, None, :, None]
    return warp(batch, (pivot[:, :, None, None] + across + down).permute(0, 2, 3, 1))


def zoom(batch: Labeled, factor: Tensor, center: Tensor) -> Labeled:
    """Enlarge by ``factor`` (B,) about the point ``center`` (B, 2), (x, y) in pixels, which stays where it is."""
    return affine(batch, torch.eye(2) / factor[:, None, None], center, center)


def turn(batch: Labeled, quarters: int, mirrored: bool) -> Labeled:
    """Turn by quarters of a full turn, anticlockwise, after exchanging left and right if ``mirrored``. Exact."""
    image, label = (each.flip(-1) if mirrored else each for each in batch)
    return Labeled(image.rot90(quarters, (-2, -1)), label.rot90(quarters, (-2, -1)))


def _centers(count: int, like: Tensor) -> Tensor:
    return torch.arange(count, dtype=torch.float32, device=like.device) + 0.5


def _size(batch: Labeled) -> Tensor:
    """Width and height, (2,), in pixels."""
    return torch.tensor([batch.label.shape[-1], batch.label.shape[-2]], dtype=torch.float32)


class HorizontalFlip(Augment, name="horizontal_flip"):
    """Exchange left and right."""

    def apply(self, batch: Labeled, generator: Generator) -> Labeled:  # noqa: ARG002 - nothing is left to chance
        """Flip every image."""
        return turn(batch, 0, mirrored=True)


class Dihedral(Augment, name="dihedral"):
    """One of the eight flips and quarter turns, each as likely: seen from above there is no up.

    Images that are not square get one of the four that keep their shape.
    """

    p: Share = 1.0
    """Probability that an image is drawn for; one of the eight leaves it as it is."""

    def apply(self, batch: Labeled, generator: Generator) -> Labeled:
        """Turn every image by its own element of the group."""
        count, height, width = batch.label.shape
        quarters = torch.randint(0, 4, (count,), generator=generator)
        if height != width:
            quarters = quarters // 2 * 2
        element = quarters + 4 * chance(count, 0.5, generator)
        image, label = torch.empty_like(batch.image), torch.empty_like(batch.label)
        for each in sorted(set(element.tolist())):
            index = (element == each).nonzero().squeeze(1).to(batch.image.device)
            turned = turn(Labeled(batch.image[index], batch.label[index]), each % 4, mirrored=each >= 4)
            image[index], label[index] = turned
        return Labeled(image, label)


class ShiftScaleRotate(Augment, name="shift_scale_rotate"):
    """Shift, scale and rotate about the center, each by a random amount."""

    shift: Share = 0.0625
    """Largest shift either way, as a share of width and height."""
    scale: PartOfOne = 0.1
    """Largest change of scale: 0.1 makes things 0.9 to 1.1 times their size."""
    rotate: Annotated[float, Field(ge=0, le=180)] = 45.0
    """Largest rotation either way, in degrees."""

    def apply(self, batch: Labeled, generator: Generator) -> Labeled:
        """Move every image by its own shift, scale and angle."""
        count = len(batch.image)
        size = _size(batch)
        moved = size / 2 + size * uniform((count, 2), -self.shift, self.shift, generator)
        scale = uniform((count,), 1 - self.scale, 1 + self.scale, generator)
        angle = torch.deg2rad(uniform((count,), -self.rotate, self.rotate, generator))
        cos, sin = angle.cos() / scale, angle.sin() / scale
        linear = torch.stack((torch.stack((cos, -sin), 1), torch.stack((sin, cos), 1)), 1)
        return affine(batch, linear, (size / 2).expand(count, 2), moved)


class GridDistortion(Augment, name="grid_distortion"):
    """Stretch and squeeze the columns and rows of a coarse grid by random amounts; the four edges stay in place."""

    cells: Count = 5
    """Cells of the grid on each side."""
    limit: PartOfOne = 0.3
    """Largest change of a cell's width or height before all are fitted to the image: 0.3 means 0.7 to 1.3 times."""

    def apply(self, batch: Labeled, generator: Generator) -> Labeled:
        """Distort every image by its own grid."""
        count, height, width = batch.label.shape
        steps = uniform((2, count, self.cells), 1 - self.limit, 1 + self.limit, generator).to(batch.image.device)
        x, y = self._places(steps[0], width), self._places(steps[1], height)
        grid = torch.stack((x[:, None, :].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)), -1)
        return warp(batch, grid)

    def _places(self, steps: Tensor, length: int) -> Tensor:
        """Where each of ``length`` pixels is taken from along one axis, (B, length), in pixels."""
        lines = F.pad(steps.cumsum(1), (1, 0)) / steps.sum(1, keepdim=True)
        place = _centers(length, steps) * (self.cells / length)
        cell = place.long().clamp(max=self.cells - 1)
        start, end = lines[:, cell], lines[:, cell + 1]
        return (start + (end - start) * (place - cell)) * length


class RandomCrop(Augment, name="random_crop"):
    """Cut a square out of every image, at a random place with probability ``p``, else from the middle."""

    size: Pixels = 256
    """Side of the square."""
    p: Share = 1.0
    """Probability that the place is random."""

    def __call__(self, batch: Labeled, generator: Generator) -> Labeled:
        """Cut every image: they must keep one size.

        Raises:
            RecipeError: the images are smaller than the crop.
        """
        count, height, width = batch.label.shape
        if min(height, width) < self.size:
            raise RecipeError(
                f"the augmentation random_crop of {self.size} pixels does not fit into images of {width}×{height}; "
                f"set its size to {min(height, width)} or less"
            )
        room = torch.tensor([height - self.size, width - self.size], dtype=torch.float32)
        random = chance(count, self.p, generator)
        share = torch.where(random[:, None], uniform((count, 2), 0, 1, generator), torch.tensor(0.5))
        corners = torch.minimum((share * (room + 1)).floor(), room).long().tolist()
        if not corners:
            return Labeled(batch.image[..., : self.size, : self.size], batch.label[..., : self.size, : self.size])
        parts = [(slice(top, top + self.size), slice(left, left + self.size)) for top, left in corners]
        image = torch.stack([batch.image[i, :, rows, columns] for i, (rows, columns) in enumerate(parts)])
        label = torch.stack([batch.label[i, rows, columns] for i, (rows, columns) in enumerate(parts)])
        return Labeled(image, label)

    def apply(self, batch: Labeled, generator: Generator) -> Labeled:
        """Cut every image."""
        return self(batch, generator)


class ScaleJitter(Augment, name="scale_jitter"):
    """Enlarge or reduce about a random point at constant size of the picture: another ground resolution."""

    low: Positive = 0.5
    """Smallest factor: 0.5 shows things at half their size."""
    high: Positive = 2.0
    """Largest factor: 2 shows things at twice their size. Factors are uniform in their logarithm."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        return ordered(self)

    def apply(self, batch: Labeled, generator: Generator) -> Labeled:
        """Zoom every image by its own factor."""
        count = len(batch.image)
        factor = log_uniform((count,), self.low, self.high, generator)
        return zoom(batch, factor, uniform((count, 2), 0, 1, generator) * _size(batch))


class CoarseDropout(Augment, name="coarse_dropout"):
    """Cover a few random rectangles with the image's mean color."""

    least_holes: Count = 1
    """Fewest rectangles in an image."""
    most_holes: Count = 2
    """Most rectangles in an image."""
    smallest: Share = 0.1
    """Smallest side of a rectangle, as a share of the image's side."""
    largest: Share = 0.2
    """Largest side of a rectangle, as a share of the image's side."""
    fill: Literal["ignore", "keep"] = "ignore"
    """The label under a rectangle: ignored, or kept, so that the class must be told from what surrounds it."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        return ordered(ordered(self, "least_holes", "most_holes"), "smallest", "largest")

    def apply(self, batch: Labeled, generator: Generator) -> Labeled:
        """Cover rectangles of every image."""
        count, height, width = batch.label.shape
        holes = torch.randint(self.least_holes, self.most_holes + 1, (count, 1), generator=generator)
        real = torch.arange(self.most_holes) < holes
        down = self._spans(count, height, generator)
        across = self._spans(count, width, generator)
        cover = (down[:, :, :, None] & across[:, :, None, :] & real[:, :, None, None]).any(1).to(batch.image.device)
        mean = batch.image.mean((2, 3), keepdim=True)
        image = torch.where(cover[:, None], mean, batch.image)
        label = batch.label.masked_fill(cover, IGNORE) if self.fill == "ignore" else batch.label
        return Labeled(image, label)

    def _spans(self, count: int, length: int, generator: Generator) -> Tensor:
        """Random spans of an axis, (count, most_holes, length), true inside; at least one pixel each."""
        shape = (count, self.most_holes, 1)
        span = (uniform(shape, self.smallest, self.largest, generator) * length).round().clamp(min=1)
        start = (uniform(shape, 0, 1, generator) * (length - span + 1)).floor()
        place = torch.arange(length)
        return (place >= start) & (place < start + span)
