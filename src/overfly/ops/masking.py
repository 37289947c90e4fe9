"""Covering random squares of an image, so that what lies there must be told from its surroundings."""

from __future__ import annotations

import torch
from torch import Generator, Tensor


def block_mask(image: Tensor, block: int, ratio: float, generator: Generator | None = None) -> Tensor:
    """True on random squares (B, 1, H, W) (Hoyer et al., 2023, MIC, section 3.1).

    Args:
        image: (B, C, H, W), of which only shape and device are read.
        block: side of a square in pixels; the last row and column may be cut.
        ratio: probability that a square is covered.
        generator: on the CPU; left out, torch's own.

    Returns:
        True where covered.
    """
    count, _, height, width = image.shape
    coarse = torch.rand(count, 1, -(-height // block), -(-width // block), generator=generator) < ratio
    fine = coarse.repeat_interleave(block, 2).repeat_interleave(block, 3)[..., :height, :width]
    return fine.to(image.device)


def cover(image: Tensor, mask: Tensor) -> Tensor:
    """The image with its mean color where the mask is true.

    Args:
        image: (B, C, H, W).
        mask: (B, 1, H, W), bool.
    """
    return torch.where(mask, image.mean((2, 3), keepdim=True), image)
