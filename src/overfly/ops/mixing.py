"""Cutting classes out of one image and pasting them into another (ClassMix; Olsson et al., 2021)."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from overfly.core.records import IGNORE, Labeled

T = TypeVar("T", Tensor, Labeled)


def class_mask(label: Tensor, share: float = 0.5) -> Tensor:
    """Where a random part of the classes of each image lies (B, H, W), bool.

    Args:
        label: class ids (B, H, W), or `IGNORE`, which is never part of the mask.
        share: part of the classes that each image shows, rounded up; of a single class at most this share of images.

    Returns:
        True on the chosen classes. Random numbers come from torch's generator on the CPU.
    """
    mask = torch.zeros_like(label, dtype=torch.bool)
    for index, each in enumerate(label):
        present = each.unique()
        present = present[present != IGNORE]
        if not len(present):
            continue
        if len(present) == 1:
            if float(torch.rand(())) < share:
                mask[index] = each == present[0]
            continue
        chosen = present[torch.randperm(len(present))[: -int(-len(present) * share // 1)].to(label.device)]
        mask[index] = torch.isin(each, chosen)
    return mask


def paste(mask: Tensor, over: T, under: T) -> T:
    """``over`` where the mask is true, ``under`` elsewhere.

    Args:
        mask: (B, H, W), bool.
        over: images (B, C, H, W), labels (B, H, W), or both.
        under: of the same kind and shape.
    """
    if isinstance(over, Labeled) and isinstance(under, Labeled):
        return Labeled(paste(mask, over.image, under.image), paste(mask, over.label, under.label))
    if not isinstance(over, Tensor) or not isinstance(under, Tensor):
        raise TypeError("what is pasted and what lies under it are both images, both labels, or both pairs of them")
    return torch.where(mask[:, None] if over.ndim == 4 else mask, over, under)
