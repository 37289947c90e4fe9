"""Learning from another network: from its class scores, or from its features."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from overfly.core.records import IGNORE


def soft_label_loss(logits: Tensor, teacher: Tensor, temperature: float = 1.0, where: Tensor | None = None) -> Tensor:
    """Kullback-Leibler divergence of the student from the teacher, mean over pixels (Hinton et al., 2015).

    Args:
        logits: class scores of the student (B, K, H, W).
        teacher: class scores of the teacher, the same shape, without gradients.
        temperature: both are divided by it, and the loss is multiplied by its square so that gradients keep their size.
        where: True at pixels that count (B, H, W); None: all do.

    Returns:
        A scalar; 0 where both agree, or no pixel counts.
    """
    student = (logits.float() / temperature).log_softmax(1)
    given = (teacher.detach().float() / temperature).log_softmax(1)
    divergence = (given.exp() * (given - student)).sum(1)
    if where is None:
        return temperature**2 * divergence.mean()
    return temperature**2 * (divergence * where).sum() / where.sum().clamp_min(1)


def majority(label: Tensor, size: tuple[int, int], share: float, classes: int) -> Tensor:
    """A label made smaller: the class that fills a cell, `IGNORE` where none fills enough of it.

    Args:
        label: class ids (B, H, W) or `IGNORE`.
        size: (h, w) of the result.
        share: how much of a cell its class must fill, 0 to 1.
        classes: K.

    Returns:
        (B, h, w), int64.
    """
    every = F.one_hot(label.masked_fill(label == IGNORE, classes), classes + 1)[..., :classes]
    filled, best = F.adaptive_avg_pool2d(every.permute(0, 3, 1, 2).float(), size).max(1)
    return best.masked_fill(filled < max(share, 1e-6), IGNORE)


def feature_distance(features: Tensor, anchor: Tensor, where: Tensor) -> Tensor:
    """Mean Euclidean distance of feature vectors over some places; 0 if there are none (Hoyer et al., 2022, DAFormer).

    Args:
        features: (B, F, h, w).
        anchor: what they should stay near, the same shape, without gradients.
        where: True at places that count (B, h, w).
    """
    square = (features.float() - anchor.detach().float()).square().sum(1)
    distance = (square + 1e-12).sqrt()  # its gradient is finite where both agree
    counted = where.to(distance.dtype)
    return (distance * counted).sum() / torch.clamp(counted.sum(), min=1)
