"""Color augmentations, which leave labels unchanged, and transfer of color statistics and low frequencies.

Augmentations apply before normalization, to images in 0 to 1 of any number of bands. Hue and saturation apply to three
bands only; with any other number each band gets its own brightness and contrast.
"""

import math
from abc import ABC, abstractmethod
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, Field
from torch import Generator, Tensor

from overfly.core.records import Labeled
from overfly.core.spec import NonNegativeFloat, PositiveFloat, Share
from overfly.ops.augmentation import Augment, augment, log_uniform, uniform

LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in luma (ITU-R BT.601)."""


class ColorAugment(Augment, ABC):
    """A random transform of image values; labels do not change."""

    @abstractmethod
    def recolor(self, image: Tensor, generator: Generator) -> Tensor:
        """Transform every image of (B, C, H, W) in 0 to 1; values outside are clamped afterwards."""

    def apply(self, batch: Labeled, generator: Generator) -> Labeled:
        """Transform every image and clamp it to 0 to 1."""
        return Labeled(self.recolor(batch.image, generator).clamp(0, 1), batch.label)


def gray(image: Tensor) -> Tensor:
    """Brightness (B, 1, H, W) of images (B, C, H, W): luma of three bands, the mean of any other number."""
    if image.shape[1] != 3:
        return image.mean(1, keepdim=True)
    luma = torch.tensor(LUMA, dtype=image.dtype).to(image.device, non_blocking=True)
    return (image * luma.view(1, 3, 1, 1)).sum(1, keepdim=True)


def _per_image(values: Tensor, image: Tensor) -> Tensor:
    """Values (B,) or (B, C) as (B, 1 or C, 1, 1) on the image's device."""
    return values.to(image.device, image.dtype, non_blocking=True).reshape(len(image), -1, 1, 1)


def _about(image: Tensor, middle: Tensor, factor: Tensor) -> Tensor:
    """Differences from ``middle`` multiplied by ``factor``."""
    return middle + (image - middle) * factor


class BrightnessContrast(ColorAugment, name="brightness_contrast"):
    """Add a constant, and scale the differences from the image's mean."""

    brightness: Share = 0.2
    """Largest constant added or subtracted, as a share of the range."""
    contrast: NonNegativeFloat = 0.2
    """Largest change of contrast: 0.2 means 0.8 to 1.2 times."""

    def recolor(self, image: Tensor, generator: Generator) -> Tensor:
        count = len(image)
        factor = uniform((count,), max(0.0, 1 - self.contrast), 1 + self.contrast, generator)
        constant = uniform((count,), -self.brightness, self.brightness, generator)
        stretched = _about(image, image.mean((1, 2, 3), keepdim=True), _per_image(factor, image))
        return stretched + _per_image(constant, image)


class ColorJitter(ColorAugment, name="color_jitter"):
    """Change brightness, contrast, saturation and hue, in this order; per band unless there are three bands."""

    brightness: NonNegativeFloat = 0.2
    """Largest change of brightness: 0.2 means 0.8 to 1.2 times."""
    contrast: NonNegativeFloat = 0.2
    """Largest change of contrast: 0.2 means 0.8 to 1.2 times."""
    saturation: NonNegativeFloat = 0.2
    """Largest change of saturation: 0.2 means 0.8 to 1.2 times. For three bands only."""
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.2
    """Largest shift of hue either way, as a share of the full circle. For three bands only."""

    def recolor(self, image: Tensor, generator: Generator) -> Tensor:
        count, bands = image.shape[:2]
        shared = bands == 3
        shape = (count, 1 if shared else bands)
        image = (image * _per_image(self._factor(shape, self.brightness, generator), image)).clamp(0, 1)
        middle = (gray(image) if shared else image).mean((2, 3), keepdim=True)
        image = _about(image, middle, _per_image(self._factor(shape, self.contrast, generator), image)).clamp(0, 1)
        if shared and self.saturation:
            factor = self._factor(shape, self.saturation, generator)
            image = _about(image, gray(image), _per_image(factor, image)).clamp(0, 1)
        if shared and self.hue:
            angle = uniform((count,), -self.hue, self.hue, generator) * (2 * math.pi)
            from kornia.enhance import adjust_hue

            image = torch.as_tensor(adjust_hue(image, angle.to(image.device, image.dtype)))
        return image

    @staticmethod
    def _factor(shape: tuple[int, int], limit: float, generator: Generator) -> Tensor:
        return uniform(shape, max(0.0, 1 - limit), 1 + limit, generator)


class GaussianBlur(ColorAugment, name="gaussian_blur"):
    """Blur by a Gaussian of random width."""

    low: PositiveFloat = 0.5
    """Smallest standard deviation of the Gaussian, in pixels."""
    high: PositiveFloat = 3.0
    """Largest standard deviation of the Gaussian, in pixels."""

    def recolor(self, image: Tensor, generator: Generator) -> Tensor:
        from kornia.filters import gaussian_blur2d

        sigma = uniform((len(image), 1), self.low, self.high, generator).expand(-1, 2)
        radius = min(math.ceil(3 * self.high), min(image.shape[-2:]) - 1)
        if radius < 1:
            return image
        return torch.as_tensor(gaussian_blur2d(image, 2 * radius + 1, sigma.to(image.device, image.dtype)))


class Gray(ColorAugment, name="gray"):
    """Set every band to the luma."""

    p: Share = 0.1
    """Probability that an image is transformed."""

    def recolor(self, image: Tensor, generator: Generator) -> Tensor:  # noqa: ARG002 - not random
        return gray(image).expand_as(image)


class Gamma(ColorAugment, name="gamma"):
    """Raise values to a random power."""

    low: PositiveFloat = 0.8
    """Smallest power; below 1 brightens."""
    high: PositiveFloat = 1.25
    """Largest power; above 1 darkens. Powers are uniform in their logarithm."""

    def recolor(self, image: Tensor, generator: Generator) -> Tensor:
        return image.clamp(0, 1) ** _per_image(log_uniform((len(image),), self.low, self.high, generator), image)


class Illumination(ColorAugment, name="illumination"):
    """Multiply values by a random gain of all bands and one of each band (the diagonal model of von Kries, 1902).

    It simulates differences of sun, sky and sensor between flights. Unlike a shift of hue it keeps the order of colors.
    """

    brightness: NonNegativeFloat = 0.2
    """Standard deviation of the logarithm of the gain of all bands."""
    color: NonNegativeFloat = 0.08
    """Standard deviation of the logarithm of each band's own gain."""

    def recolor(self, image: Tensor, generator: Generator) -> Tensor:
        count, bands = image.shape[:2]
        shared = self.brightness * torch.randn(count, 1, generator=generator)
        own = self.color * torch.randn(count, bands, generator=generator)
        return image * _per_image((shared + own).exp(), image)


class GaussianNoise(ColorAugment, name="gaussian_noise"):
    """Add independent noise to every pixel and band."""

    low: NonNegativeFloat = 0.01
    """Smallest standard deviation of the noise, as a share of the range."""
    high: NonNegativeFloat = 0.05
    """Largest standard deviation of the noise, as a share of the range."""

    def recolor(self, image: Tensor, generator: Generator) -> Tensor:
        strength = _per_image(uniform((len(image),), self.low, self.high, generator), image)
        noise = torch.randn(image.shape, generator=generator)
        return image + strength * noise.to(image.device, image.dtype)


def _check_colors_only(augments: tuple[Augment, ...]) -> tuple[Augment, ...]:
    for augmentation in augments:
        if not isinstance(augmentation, ColorAugment):
            known = ", ".join(sorted(name for name, kind in Augment.kinds.items() if issubclass(kind, ColorAugment)))
            raise ValueError(f"{augmentation.name} moves pixels relative to their labels; choose among: {known}")
    return augments


ColorAugments = Annotated[tuple[Augment, ...], AfterValidator(_check_colors_only)]
"""Augmentations of color and sharpness, which leave labels valid."""


def augment_colors(image: Tensor, augments: tuple[Augment, ...], max_value: float) -> Tensor:
    """Color-augmented images (B, C, H, W), 0 to ``max_value``; draws from torch's CPU generator."""
    label = torch.zeros(len(image), 1, 1, dtype=torch.int64, device=image.device)
    return augment(Labeled(image, label), augments, max_value=max_value, generator=torch.default_generator).image


def low_amplitudes(image: Tensor, cycles: int) -> Tensor:
    """Amplitudes of frequencies up to ``cycles`` per image either way, (B, C, 2 cycles + 1, 2 cycles + 1), float32."""
    return torch.abs(torch.fft.fft2(image.float())[_low(image, cycles)])


def scale_low_frequencies(image: Tensor, factor: Tensor) -> Tensor:
    """Images (B, C, H, W) with the amplitudes of low frequencies multiplied; values may leave the sensor's range.

    ``factor`` has the form of `low_amplitudes`, for each image or for all; a ratio of two of them gives images the
    amplitudes of a style, with their own phases (Yang and Soatto, 2020, FDA).
    """
    spectrum, low = torch.fft.fft2(image.float()), _low(image, factor.shape[-1] // 2)
    spectrum[low] *= factor
    return torch.real(torch.fft.ifft2(spectrum)).to(image.dtype)


def _low(image: Tensor, cycles: int) -> tuple[Any, ...]:
    """Index of the lowest frequencies in the spectrum of images (B, C, H, W)."""
    low = torch.arange(-cycles, cycles + 1, device=image.device)
    return ..., (low % image.shape[-2])[:, None], low % image.shape[-1]


def color_moments(image: Tensor) -> Tensor:
    """Mean and mean square of each band of images (B, C, H, W), as (B, C, 2)."""
    return torch.stack((image.mean((2, 3)), image.square().mean((2, 3))), -1)


def match_colors(image: Tensor, own: Tensor, style: Tensor) -> Tensor:
    """Images (B, C, H, W) with each band's mean and standard deviation moved as from ``own`` to ``style``.

    Both are `color_moments` of each image (B, C, 2), or of all images of a domain (C, 2), which keeps differences
    between images. Values may leave the sensor's range. Source: Reinhard et al., 2001.
    """
    (mean, std), (style_mean, style_std) = (
        (mean, ((square - mean.square()).clamp_min(1e-6 * square) + 1e-12).sqrt())
        for mean, square in (moments[..., None, None, :].unbind(-1) for moments in (own, style))
    )
    return (image - mean) / std * style_std + style_mean
