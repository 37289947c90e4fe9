"""Geometric augmentations: images and labels are sampled by the same grid.

Images are sampled bilinearly and mirrored beyond their edges; labels are sampled by nearest neighbor and are `IGNORE`
beyond their edges. Coordinates are in pixels from the upper left corner; the center of the first pixel is at 0.5.
"""

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Generator, Tensor

from overfly.core.errors import RecipeError
from overfly.core.records import IGNORE, Labeled
from overfly.core.spec import Pixels, PositiveFloat, PositiveInt, Share
from overfly.ops.augmentation import Augment, chance, log_uniform, uniform

ShareBelowOne = Annotated[float, Field(ge=0, lt=1)]
"""A share from 0 to below 1."""


def warp(batch: Labeled, grid: Tensor) -> Labeled:
    """Sample images (B, C, H, W), bilinear, and labels (B, H, W), nearest, `IGNORE` outside, at the same coordinates.

    ``grid`` holds the source coordinates of each pixel of the result, (B, h, w, 2), x then y, in pixels.
    """
    height, width = batch.label.shape[-2:]
    size = torch.tensor([width, height], dtype=grid.dtype).to(grid.device, non_blocking=True)
    normalized = grid * (2 / size) - 1
    image = F.grid_sample(batch.image.to(grid.dtype), normalized, "bilinear", "reflection", align_corners=False)
    shifted = batch.label.unsqueeze(1).to(grid.dtype) - IGNORE  # so that the zeros from outside become IGNORE
    label = F.grid_sample(shifted, normalized, "nearest", "zeros", align_corners=False).squeeze(1)
    return Labeled(image.to(batch.image.dtype), (label + IGNORE).to(batch.label.dtype))


def affine(batch: Labeled, linear: Tensor, pivot: Tensor, image_of_pivot: Tensor) -> Labeled:
    """Affine transform that maps the point ``pivot`` of each image to ``image_of_pivot``, (B, 2), (x, y) in pixels.

    ``linear`` (B, 2, 2) maps distances in the result to distances in the image, (x, y) both.
    """
    height, width = batch.label.shape[-2:]
    values = (each.to(batch.image.device, torch.float32, non_blocking=True) for each in (linear, pivot, image_of_pivot))
    linear, pivot, origin = values
    x, y = _centers(width, linear) - origin[:, :1], _centers(height, linear) - origin[:, 1:]
    across = linear[:, :, 0, None, None] * x[:, None, None, :]
    down = linear[:, :, 1, None, None] * y[:, None, :, None]
    return warp(batch, (pivot[:, :, None, None] + across + down).permute(0, 2, 3, 1))


def zoom(batch: Labeled, factor: Tensor, center: Tensor) -> Labeled:
    """Scale by ``factor`` (B,) about the fixed point ``center`` (B, 2), (x, y) in pixels."""
    return affine(batch, torch.eye(2) / factor[:, None, None], center, center)


def turn(batch: Labeled, quarters: int, mirrored: bool) -> Labeled:
    """Rotate by quarter turns, counterclockwise, after a horizontal flip if ``mirrored``; exact."""
    image, label = (tensor.flip(-1) if mirrored else tensor for tensor in batch)
    return Labeled(image.rot90(quarters, (-2, -1)), label.rot90(quarters, (-2, -1)))


def _centers(count: int, like: Tensor) -> Tensor:
    return torch.arange(count, dtype=torch.float32, device=like.device) + 0.5


def _size(batch: Labeled) -> Tensor:
    """Width and height, (2,), in pixels."""
    return torch.tensor([batch.label.shape[-1], batch.label.shape[-2]], dtype=torch.float32)


class HorizontalFlip(Augment, name="horizontal_flip"):
    """Flip horizontally."""

    def apply(self, batch: Labeled, generator: Generator) -> Labeled:  # noqa: ARG002 - not random
        return turn(batch, 0, mirrored=True)


class Dihedral(Augment, name="dihedral"):
    """One of the eight flips and quarter turns, with equal probability.

    Images that are not square get one of the four that keep their shape.
    """

    p: Share = 1.0
    """Probability that an image is transformed; one of the eight is the identity."""

    def apply(self, batch: Labeled, generator: Generator) -> Labeled:
        count, height, width = batch.label.shape
        quarters = torch.randint(0, 4, (count,), generator=generator)
        if height != width:
            quarters = quarters // 2 * 2
        element = quarters + 4 * chance(count, 0.5, generator)
        image, label = torch.empty_like(batch.image), torch.empty_like(batch.label)
        for number in sorted(set(element.tolist())):
            index = (element == number).nonzero().squeeze(1).to(batch.image.device, non_blocking=True)
            turned = turn(Labeled(batch.image[index], batch.label[index]), number % 4, mirrored=number >= 4)
            image[index], label[index] = turned
        return Labeled(image, label)


class ShiftScaleRotate(Augment, name="shift_scale_rotate"):
    """Shift, scale and rotate about the center by random amounts."""

    shift: Share = 0.0625
    """Largest shift either way, as a share of width and height."""
    scale: ShareBelowOne = 0.1
    """Largest change of scale: 0.1 means factors of 0.9 to 1.1."""
    rotate: Annotated[float, Field(ge=0, le=180)] = 45.0
    """Largest rotation either way, in degrees."""

    def apply(self, batch: Labeled, generator: Generator) -> Labeled:
        count = len(batch.image)
        size = _size(batch)
        center = size / 2 + size * uniform((count, 2), -self.shift, self.shift, generator)
        scale = uniform((count,), 1 - self.scale, 1 + self.scale, generator)
        angle = torch.deg2rad(uniform((count,), -self.rotate, self.rotate, generator))
        cos, sin = angle.cos() / scale, angle.sin() / scale
        linear = torch.stack((torch.stack((cos, -sin), 1), torch.stack((sin, cos), 1)), 1)
        return affine(batch, linear, (size / 2).expand(count, 2), center)


class GridDistortion(Augment, name="grid_distortion"):
    """Scale the columns and rows of a coarse grid by random factors; the image's edges are fixed."""

    cells: PositiveInt = 5
    """Cells of the grid on each side."""
    limit: ShareBelowOne = 0.3
    """Largest change of a cell's width or height before rescaling to the image; 0.3 means 0.7 to 1.3."""

    def apply(self, batch: Labeled, generator: Generator) -> Labeled:
        count, height, width = batch.label.shape
        steps = uniform((2, count, self.cells), 1 - self.limit, 1 + self.limit, generator).to(batch.image.device)
        x, y = self._coordinates(steps[0], width), self._coordinates(steps[1], height)
        grid = torch.stack((x[:, None, :].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)), -1)
        return warp(batch, grid)

    def _coordinates(self, steps: Tensor, length: int) -> Tensor:
        """Source coordinate of each of ``length`` pixels along one axis, (B, length), in pixels."""
        lines = F.pad(steps.cumsum(1), (1, 0)) / steps.sum(1, keepdim=True)
        position = _centers(length, steps) * (self.cells / length)
        cell = position.long().clamp(max=self.cells - 1)
        start, end = lines[:, cell], lines[:, cell + 1]
        return (start + (end - start) * (position - cell)) * length


class RandomCrop(Augment, name="random_crop"):
    """Crop a square of every image, at a random position with probability ``p``, else the center."""

    size: Pixels = 256
    """Side of the square."""
    p: Share = 1.0
    """Probability that the position is random."""

    def __call__(self, batch: Labeled, generator: Generator) -> Labeled:
        """Crop every image to one size; raise `RecipeError` if the images are smaller than the crop."""
        count, height, width = batch.label.shape
        if min(height, width) < self.size:
            raise RecipeError(
                f"random_crop.size must be at most {min(height, width)} for images of {width}×{height}, got {self.size}"
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
        return self(batch, generator)


class ScaleJitter(Augment, name="scale_jitter"):
    """Scale about a random point at constant image size, which simulates another ground resolution."""

    low: PositiveFloat = 0.5
    """Smallest factor; 0.5 halves the size of objects."""
    high: PositiveFloat = 2.0
    """Largest factor; 2 doubles the size of objects. Factors are uniform in their logarithm."""

    def apply(self, batch: Labeled, generator: Generator) -> Labeled:
        count = len(batch.image)
        factor = log_uniform((count,), self.low, self.high, generator)
        return zoom(batch, factor, uniform((count, 2), 0, 1, generator) * _size(batch))


class CoarseDropout(Augment, name="coarse_dropout"):
    """Fill a few random rectangles with the image's mean color."""

    min_holes: PositiveInt = 1
    """Fewest rectangles in an image."""
    max_holes: PositiveInt = 2
    """Most rectangles in an image."""
    min_size: Share = 0.1
    """Smallest side of a rectangle, as a share of the image's side."""
    max_size: Share = 0.2
    """Largest side of a rectangle, as a share of the image's side."""
    fill: Literal["ignore", "keep"] = "ignore"
    """The label under a rectangle: ignored, or kept, so that the class is predicted from its surroundings."""

    def apply(self, batch: Labeled, generator: Generator) -> Labeled:
        count, height, width = batch.label.shape
        holes = torch.randint(self.min_holes, self.max_holes + 1, (count, 1), generator=generator)
        real = torch.arange(self.max_holes) < holes
        down = self._spans(count, height, generator)
        across = self._spans(count, width, generator)
        cover = (down[:, :, :, None] & across[:, :, None, :] & real[:, :, None, None]).any(1)
        cover = cover.to(batch.image.device, non_blocking=True)
        mean = batch.image.mean((2, 3), keepdim=True)
        image = torch.where(cover[:, None], mean, batch.image)
        label = batch.label.masked_fill(cover, IGNORE) if self.fill == "ignore" else batch.label
        return Labeled(image, label)

    def _spans(self, count: int, length: int, generator: Generator) -> Tensor:
        """Random spans of an axis, (count, max_holes, length), True inside; at least one pixel each."""
        shape = (count, self.max_holes, 1)
        span = (uniform(shape, self.min_size, self.max_size, generator) * length).round().clamp(min=1)
        start = (uniform(shape, 0, 1, generator) * (length - span + 1)).floor()
        position = torch.arange(length)
        return (position >= start) & (position < start + span)
