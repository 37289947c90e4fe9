"""Masks and mixing: paste classes of one image onto another (ClassMix), cover random squares (MIC)."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from overfly.core.records import IGNORE, Labeled


def class_mask(label: Tensor, share: float = 0.5) -> Tensor:
    """Mask of a random part of each image's classes, bool (B, H, W) (Olsson et al., 2021, ClassMix).

    The classes are chosen on the CPU by torch's generator; one transfer from the device reads which are present.

    Args:
        label: class ids (B, H, W) or `IGNORE`, which the mask never covers.
        share: share of the classes of an image that is chosen, rounded up. An image of one class is covered whole with
            this probability.
    """
    present = torch.zeros(len(label), IGNORE + 1, dtype=torch.bool, device=label.device)
    present.scatter_(1, label.flatten(1).long(), True)
    present[:, IGNORE] = False
    table = torch.zeros(len(label), IGNORE + 1, dtype=torch.bool)
    for row, classes in zip(table, present.cpu(), strict=True):
        ids = classes.nonzero().squeeze(1)
        if len(ids) == 1:
            row[ids] = float(torch.rand(())) < share
        elif len(ids):
            row[ids[torch.randperm(len(ids))[: -int(-len(ids) * share // 1)]]] = True
    table = table.to(label.device, non_blocking=True)
    return table.gather(1, label.flatten(1).long()).view_as(label)


def paste(mask: Tensor, over: Labeled, under: Labeled) -> Labeled:
    """Images and labels of ``over`` where the mask (B, H, W) is true, of ``under`` elsewhere."""
    return Labeled(torch.where(mask[:, None], over.image, under.image), torch.where(mask, over.label, under.label))


def block_mask(image: Tensor, block: int, ratio: float, generator: Generator | None = None) -> Tensor:
    """Mask of random squares, bool (B, 1, H, W) (Hoyer et al., 2023, MIC, section 3.1).

    Args:
        image: (B, C, H, W), of which only shape and device are read.
        block: side of a square in pixels; the last row and column may be cut.
        ratio: probability that a square is masked.
        generator: on the CPU; None: torch's own.
    """
    count, _, height, width = image.shape
    coarse = torch.rand(count, 1, -(-height // block), -(-width // block), generator=generator) < ratio
    fine = coarse.repeat_interleave(block, 2).repeat_interleave(block, 3)[..., :height, :width]
    return fine.to(image.device, non_blocking=True)


def fill_mean_color(image: Tensor, mask: Tensor) -> Tensor:
    """Images (B, C, H, W) with their mean color where the mask (B, 1, H, W) is true."""
    return torch.where(mask, image.mean((2, 3), keepdim=True), image)
