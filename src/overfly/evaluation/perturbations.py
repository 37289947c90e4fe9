"""Fixed ways to look at a picture otherwise: mild views that a good network does not mind, and shifts that it does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from kornia.filters import gaussian_blur2d
from torch import Generator, Tensor
from torch.nn import functional as F

from overfly.ops.color import ColorJitter, Gamma, Gray, match_colors, swap_low_frequencies
from overfly.ops.mixing import block_mask, cover

MASKED = 0.5
"""Share of a picture that `masked` covers."""
BLOCKS = 8
"""Squares along the longer side of a masked picture, as 64 of 512 pixels in MIC (Hoyer et al., 2023)."""


class Perturbation(NamedTuple):
    """A way to look at a picture.

    Attributes:
        name: what figures call it.
        alter: (C, H, W) in the sensor's range, its peak and a generator, to the picture as it is seen.
        back: scores (K, h, w) of that, and the picture's own (H, W), to scores (K, H, W) in the picture's frame.
    """

    name: str
    alter: Callable[[Tensor, float, Generator], Tensor]
    back: Callable[[Tensor, tuple[int, int]], Tensor]


def _stay(scores: Tensor, size: tuple[int, int]) -> Tensor:
    del size
    return scores


def _sized(scores: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(scores[None], size, mode="bilinear", align_corners=False)[0]


def turned(quarters: int, mirrored: bool) -> Perturbation:
    """A quarter turn or more, anticlockwise, after exchanging left and right if ``mirrored``; exact both ways."""

    def alter(image: Tensor, max_value: float, generator: Generator) -> Tensor:
        del max_value, generator
        return (image.flip(-1) if mirrored else image).rot90(quarters, (-2, -1)).contiguous()

    def back(scores: Tensor, size: tuple[int, int]) -> Tensor:
        del size
        turned = scores.rot90(-quarters, (-2, -1))
        return turned.flip(-1) if mirrored else turned

    return Perturbation(f"{'mirrored ' if mirrored else ''}{90 * quarters}°", alter, back)


def scaled(factor: float) -> Perturbation:
    """Another ground resolution: things appear ``factor`` times as large."""

    def alter(image: Tensor, max_value: float, generator: Generator) -> Tensor:
        del max_value, generator
        size = [max(8, round(side * factor)) for side in image.shape[-2:]]
        return F.interpolate(image[None], size, mode="bilinear", align_corners=False, antialias=True)[0]

    return Perturbation(f"scale {factor:g}", alter, _sized)


def colored(name: str, brightness: float, contrast: float, saturation: float, hue: float) -> Perturbation:
    """Brightness, contrast, saturation and hue changed by random amounts, at most those given."""
    jitter = ColorJitter(p=1.0, brightness=brightness, contrast=contrast, saturation=saturation, hue=hue)
    return _over_peak(name, jitter.recolor)


def blurred(sigma: float) -> Perturbation:
    """A Gaussian blur of so many pixels' standard deviation."""

    def alter(image: Tensor, max_value: float, generator: Generator) -> Tensor:
        del max_value, generator
        radius = min(int(3 * sigma) + 1, min(image.shape[-2:]) - 1)
        if radius < 1:
            return image
        return torch.as_tensor(gaussian_blur2d(image[None], 2 * radius + 1, (sigma, sigma)))[0]

    return Perturbation(f"blur {sigma:g}", alter, _stay)


def noisy(share: float) -> Perturbation:
    """Independent noise of ``share`` of each band's own standard deviation in the picture, whatever the sensor."""

    def alter(image: Tensor, max_value: float, generator: Generator) -> Tensor:
        spread = image.flatten(1).std(1)[:, None, None]
        noise = torch.randn(image.shape, generator=generator).to(image.device)
        return (image + share * spread * noise).clamp(0, max_value)

    return Perturbation(f"noise {share:g}", alter, _stay)


def hazy(share: float) -> Perturbation:
    """A veil as bright as the picture's lightest tenth: ``share`` of what is seen is haze."""

    def alter(image: Tensor, max_value: float, generator: Generator) -> Tensor:
        del max_value, generator
        flat = image.flatten(1)
        veil = flat.kthvalue(max(1, round(0.9 * flat.shape[1])), 1).values[:, None, None]
        return (1 - share) * image + share * veil

    return Perturbation(f"haze {share:g}", alter, _stay)


def powered(power: float) -> Perturbation:
    """Values raised to a power: below 1 brightens."""
    return _over_peak(f"gamma {power:g}", Gamma(p=1.0, low=power, high=power).recolor)


def like(style: Tensor, beta: float | None = None) -> Perturbation:
    """The look of another picture: its colors' mean and spread, or with ``beta`` its low frequencies (FDA).

    Args:
        style: (C, H, W), in the sensor's range.
        beta: as `overfly.ops.color.swap_low_frequencies`.
    """

    def alter(image: Tensor, max_value: float, generator: Generator) -> Tensor:
        del generator
        other = style[None].to(image.device)
        if beta is None:
            return match_colors(image[None], other)[0].clamp(0, max_value)
        sized = F.interpolate(other, image.shape[-2:], mode="bilinear", align_corners=False, antialias=True)
        return swap_low_frequencies(image[None], sized, beta)[0].clamp(0, max_value)

    return Perturbation("colors of the target" if beta is None else f"spectrum of the target {beta:g}", alter, _stay)


def masked() -> Perturbation:
    """Half of the picture covered by squares of its mean color: what lies there must be told from around."""

    def alter(image: Tensor, max_value: float, generator: Generator) -> Tensor:
        del max_value
        block = max(4, max(image.shape[-2:]) // BLOCKS)
        return cover(image[None], block_mask(image[None], block, MASKED, generator))[0]

    return Perturbation("masked", alter, _stay)


def geometric() -> tuple[Perturbation, ...]:
    """The views that show the same ground from another side and at another size, pixel values as they were."""
    return (turned(1, mirrored=False), turned(2, mirrored=True), scaled(0.75), scaled(1.5))


def views() -> tuple[Perturbation, ...]:
    """The mild views of a label-free look: turns, ground resolution, color, sharpness, noise."""
    return (
        *geometric(),
        colored("color", 0.2, 0.2, 0.2, 0.03),
        blurred(0.7),
        noisy(0.1),
    )


def shifts(styles: Sequence[Tensor]) -> tuple[Perturbation, ...]:
    """The family of shifts that an estimate is calibrated on, from none at all to strong ones.

    Args:
        styles: a few pictures (C, H, W) whose look the source is given too, as a rule the target's.
    """
    plain = Perturbation("none", lambda image, max_value, generator: image, _stay)  # noqa: ARG005
    gray = _over_peak("gray", Gray(p=1.0).recolor)
    made = [plain, colored("color", 0.2, 0.2, 0.2, 0.05), colored("strong color", 0.4, 0.4, 0.5, 0.15), gray]
    made += [powered(0.6), powered(1.6), blurred(1.0), blurred(2.0), noisy(0.2), noisy(0.5), hazy(0.3), hazy(0.55)]
    made += [scaled(0.5), scaled(0.7), scaled(1.5), scaled(2.0)]
    for number, style in enumerate(styles):
        for view in (like(style), like(style, 0.03)):
            made.append(view._replace(name=f"{view.name}, picture {number}"))
    return tuple(made)


def _over_peak(name: str, recolor: Callable[[Tensor, Generator], Tensor]) -> Perturbation:
    """A view that changes images (B, C, H, W) in 0 to 1."""

    def alter(image: Tensor, max_value: float, generator: Generator) -> Tensor:
        return recolor(image[None] / max_value, generator)[0].clamp(0, 1) * max_value

    return Perturbation(name, alter, _stay)


__all__ = ["Perturbation", "geometric", "masked", "shifts", "views"]
