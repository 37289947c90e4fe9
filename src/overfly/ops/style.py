"""Giving one image the look of another: its low frequencies, or the mean and spread of its colors."""

from __future__ import annotations

import torch
from torch import Tensor


def swap_low_frequencies(image: Tensor, style: Tensor, beta: float) -> Tensor:
    """The image with the amplitude of the style's lowest frequencies and its own phase (Yang and Soatto, 2020, FDA).

    Args:
        image: (B, C, H, W), float.
        style: of the same shape.
        beta: half the side of the swapped square, as a share of the shorter side of the centerd spectrum; at 0 the
            mean alone is swapped.

    Returns:
        (B, C, H, W); values may leave the sensor's range. With itself as style the image stays as it is.
    """
    spectrum, other = torch.fft.fft2(image.float()), torch.fft.fft2(style.float())
    height, width = image.shape[-2:]
    reach = int(beta * min(height, width))
    low = (_frequency(height)[:, None] <= reach) & (_frequency(width)[None, :] <= reach)
    amplitude = torch.where(low.to(image.device), other.abs(), spectrum.abs())
    back: Tensor = torch.fft.ifft2(torch.polar(amplitude, spectrum.angle()))
    return back.real.to(image.dtype)


def _frequency(length: int) -> Tensor:
    """Absolute frequency of each place of a spectrum, in cycles per image (length,)."""
    cycles: Tensor = torch.fft.fftfreq(length) * length
    return cycles.round().abs()


def match_colors(image: Tensor, style: Tensor, *, each: bool = True) -> Tensor:
    """The image with each band's mean and standard deviation of the style (after Reinhard et al., 2001).

    Args:
        image: (B, C, H, W), float.
        style: (B, C, H', W'); where images are not matched one by one, any number of them.
        each: whether every image gets the mean and spread of its own style image, or the whole batch, as one, those of
            all style images: differences between images, as between water and fields, then stay.

    Returns:
        (B, C, H, W); values may leave the sensor's range.
    """
    over = (2, 3) if each else (0, 2, 3)
    spread, mean = torch.std_mean(image, over, keepdim=True)
    other_spread, other_mean = torch.std_mean(style, over, keepdim=True)
    return (image - mean) / spread.clamp_min(1e-6) * other_spread + other_mean
