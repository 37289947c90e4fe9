"""Fixed image perturbations: mild ones for consistency metrics, and domain shifts for calibrating estimates."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from overfly.ops import color
from overfly.ops.pseudo_labels import block_mask, fill_mean_color

MASK_SHARE = 0.5
"""Share of the image that `random_mask` covers."""
MASK_BLOCKS = 8
"""Mask blocks along the longer side of the image, as 64 of 512 pixels in MIC (Hoyer et al., 2023)."""


class Perturbation(NamedTuple):
    """A perturbation of an image, and its inverse on class scores.

    Attributes:
        name: its key in metrics.
        apply: maps an image (C, H, W) in the sensor's range, its max_value and a generator to the perturbed image.
        invert: maps scores (K, h, w) of the perturbed image and the size (H, W) of the original to scores (K, H, W).
    """

    name: str
    apply: Callable[[Tensor, float, Generator], Tensor]
    invert: Callable[[Tensor, tuple[int, int]], Tensor] = lambda scores, _: scores


def rotated(quarters: int, mirrored: bool) -> Perturbation:
    """Rotate counterclockwise by quarter turns, after a horizontal flip if ``mirrored``; exactly invertible."""

    def apply(image: Tensor, _max_value: float, _generator: Generator) -> Tensor:
        return (image.flip(-1) if mirrored else image).rot90(quarters, (-2, -1)).contiguous()

    def invert(scores: Tensor, _size: tuple[int, int]) -> Tensor:
        rotated_back = scores.rot90(-quarters, (-2, -1))
        return rotated_back.flip(-1) if mirrored else rotated_back

    return Perturbation(f"{'mirrored ' if mirrored else ''}{90 * quarters}°", apply, invert)


def scaled(factor: float) -> Perturbation:
    """Resize by ``factor``, as another ground sampling distance."""

    def apply(image: Tensor, _max_value: float, _generator: Generator) -> Tensor:
        size = [max(8, round(side * factor)) for side in image.shape[-2:]]
        return F.interpolate(image[None], size, mode="bilinear", align_corners=False, antialias=True)[0]

    def invert(scores: Tensor, size: tuple[int, int]) -> Tensor:
        return F.interpolate(scores[None], size, mode="bilinear", align_corners=False)[0]

    return Perturbation(f"scale {factor:g}", apply, invert)


def colored(name: str, brightness: float, contrast: float, saturation: float, hue: float) -> Perturbation:
    """Change brightness, contrast, saturation and hue by random amounts up to those given."""
    jitter = color.ColorJitter(p=1.0, brightness=brightness, contrast=contrast, saturation=saturation, hue=hue)
    return _recolored(name, jitter.recolor)


def blurred(sigma: float) -> Perturbation:
    """Gaussian blur with a standard deviation of ``sigma`` pixels."""
    return _recolored(f"blur {sigma:g}", color.GaussianBlur(p=1.0, low=sigma, high=sigma).recolor)


def noisy(share: float) -> Perturbation:
    """Add Gaussian noise of ``share`` times each band's standard deviation in the image."""

    def apply(image: Tensor, max_value: float, generator: Generator) -> Tensor:
        deviation = image.flatten(1).std(1)[:, None, None]
        noise = torch.randn(image.shape, generator=generator).to(image.device)
        return (image + share * deviation * noise).clamp(0, max_value)

    return Perturbation(f"noise {share:g}", apply)


def hazy(share: float) -> Perturbation:
    """Blend with a constant haze of each band's 90th percentile, with weight ``share``."""

    def apply(image: Tensor, _max_value: float, _generator: Generator) -> Tensor:
        flat = image.flatten(1)
        haze = flat.kthvalue(max(1, round(0.9 * flat.shape[1])), 1).values[:, None, None]
        return (1 - share) * image + share * haze

    return Perturbation(f"haze {share:g}", apply)


def gamma_corrected(power: float) -> Perturbation:
    """Raise values in 0 to 1 to a power; below 1 brightens."""
    return _recolored(f"gamma {power:g}", color.Gamma(p=1.0, low=power, high=power).recolor)


def styled(style: Tensor, beta: float | None = None) -> Perturbation:
    """Match the color mean and standard deviation of another image (C, H, W) in the sensor's range.

    With ``beta``, match its frequencies up to this share of the shorter side instead.
    """

    def apply(image: Tensor, max_value: float, _generator: Generator) -> Tensor:
        other = style[None].to(image.device)
        if beta is None:
            own, moments = map(color.color_moments, (image[None], other))
            return color.match_colors(image[None], own, moments)[0].clamp(0, max_value)
        sized = F.interpolate(other, image.shape[-2:], mode="bilinear", align_corners=False, antialias=True)
        cycles = int(beta * min(image.shape[-2:]))
        own, amplitudes = (color.low_amplitudes(each, cycles) for each in (image[None], sized))
        return color.scale_low_frequencies(image[None], amplitudes / own.clamp_min(1e-6))[0].clamp(0, max_value)

    return Perturbation("colors of the target" if beta is None else f"spectrum of the target {beta:g}", apply)


def random_mask() -> Perturbation:
    """Cover half of the image with blocks of its mean color."""

    def apply(image: Tensor, _max_value: float, generator: Generator) -> Tensor:
        block = max(4, max(image.shape[-2:]) // MASK_BLOCKS)
        return fill_mean_color(image[None], block_mask(image[None], block, MASK_SHARE, generator))[0]

    return Perturbation("masked", apply)


def geometric_perturbations(*, turns: bool = True) -> tuple[Perturbation, ...]:
    """A quarter turn and a smaller scale: pixel values stay as they are.

    Without ``turns``, for images with a fixed top, a horizontal flip in place of the turn.
    """
    return (rotated(1, mirrored=False) if turns else rotated(0, mirrored=True), scaled(0.75))


GEOMETRIC = frozenset(entry.name for turns in (True, False) for entry in geometric_perturbations(turns=turns))
"""Names of all geometric perturbations."""


def mild_perturbations() -> tuple[Perturbation, ...]:
    """The perturbations of consistency metrics: geometric ones, color, blur and noise."""
    return (*geometric_perturbations(), colored("color", 0.2, 0.2, 0.2, 0.03), blurred(0.7), noisy(0.1))


def domain_shifts(styles: Sequence[Tensor]) -> tuple[Perturbation, ...]:
    """The domain shifts that mIoU estimates are calibrated on, from none to strong.

    The style of the images (C, H, W) in ``styles``, usually of the target, is transferred too.
    """
    none = Perturbation("none", lambda image, max_value, generator: image)  # noqa: ARG005
    gray = _recolored("gray", color.Gray(p=1.0).recolor)
    shifts = [none, colored("color", 0.2, 0.2, 0.2, 0.05), colored("strong color", 0.4, 0.4, 0.5, 0.15), gray]
    shifts += [gamma_corrected(0.6), gamma_corrected(1.6), blurred(1.0), blurred(2.0), noisy(0.2), noisy(0.5)]
    shifts += [hazy(0.3), hazy(0.55), scaled(0.5), scaled(0.7), scaled(1.5), scaled(2.0)]
    for number, style in enumerate(styles):
        for perturbation in (styled(style), styled(style, 0.03)):
            shifts.append(perturbation._replace(name=f"{perturbation.name}, image {number}"))
    return tuple(shifts)


def _recolored(name: str, recolor: Callable[[Tensor, Generator], Tensor]) -> Perturbation:
    """A perturbation by a function of images (B, C, H, W) in 0 to 1."""

    def apply(image: Tensor, max_value: float, generator: Generator) -> Tensor:
        return recolor(image[None] / max_value, generator)[0].clamp(0, 1) * max_value

    return Perturbation(name, apply)
