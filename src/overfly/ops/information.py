"""What predictions say of themselves: how sure they are, how varied, how far from uniform."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from overfly.ops.losses import entropy


def diversity(logits: Tensor, where: Tensor | None = None) -> Tensor:
    """Entropy of the mean prediction over pixels, divided by log K: 0 is one class alone, 1 is all equally often.

    Together with the mean entropy it makes information maximization (Liang et al., 2020, SHOT, arXiv:2002.08546).

    Args:
        logits: class scores (B, K, H, W) with K of 2 or more.
        where: True at pixels that count (B, H, W); None: all do.

    Returns:
        A scalar, 0 to 1.
    """
    probability = logits.float().softmax(1)
    if where is None:
        mean = probability.mean((0, 2, 3))
    else:
        mean = (probability * where[:, None]).sum((0, 2, 3)) / where.sum().clamp_min(1)
    return -(mean * mean.clamp_min(1e-12).log()).sum() / math.log(len(mean))


def charbonnier_entropy(logits: Tensor, power: float = 2.0) -> Tensor:
    """Mean of ``(entropy ** 2 + 1e-6) ** power``: high entropies weigh more (Yang and Soatto, 2020, FDA).

    Args:
        logits: class scores (B, K, H, W).
        power: above 0.5 pixels that are sure already hardly count.
    """
    return ((entropy(logits) ** 2 + 1e-6) ** power).mean()


def distance_to_uniform(logits: Tensor, where: Tensor) -> Tensor:
    """Kullback-Leibler divergence of the predictions from uniform ones, mean over some pixels; 0 if there are none.

    Minimized on pixels whose pseudo-labels are sure, it keeps them from growing surer than the labels deserve (Zou et
    al., 2019, CRST, arXiv:1908.09822).

    Args:
        logits: class scores (B, K, H, W).
        where: True at pixels that count (B, H, W).
    """
    per_pixel = -logits.float().log_softmax(1).mean(1) - math.log(logits.shape[1])
    counted = where.to(per_pixel.dtype)
    return (per_pixel * counted).sum() / torch.clamp(counted.sum(), min=1)
