"""GCW: class weights that follow what the labels of late show (Li et al., 2022, Remote Sensing 14:4942)."""

from __future__ import annotations

import torch
from torch import Tensor

from overfly.core.records import IGNORE


def class_shares(label: Tensor, classes: int) -> Tensor:
    """Share of each class (K,) among the pixels of labels (B, H, W) that have one; all equal where none has."""
    valid = label[label != IGNORE]
    counts = torch.bincount(valid.flatten(), minlength=classes).float()
    return counts / len(valid) if len(valid) else torch.full_like(counts, 1 / classes)


def rare_class_weights(shares: Tensor, temperature: float) -> Tensor:
    """Weights (..., K) of classes, the rarer the larger: ``K softmax((1 - share) / temperature)``, with a mean of 1.

    Args:
        shares: of each class (..., K), 0 to 1.
        temperature: low: the rarest classes almost alone; high: all alike.
    """
    return shares.shape[-1] * ((1 - shares) / temperature).softmax(-1)
