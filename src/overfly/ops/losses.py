"""Losses on class scores, as pure functions.

All of them leave ignored pixels out of the sum and out of the count, are zero with zero gradients (never NaN) where no
pixel counts, compute in float32 under autocast, and never synchronize. NaN scores of valid pixels give a NaN
loss. Scores and labels of different size raise a ValueError.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from overfly.core.records import IGNORE


def cross_entropy(
    logits: Tensor, label: Tensor, *, weight: Tensor | None = None, class_weight: Tensor | None = None
) -> Tensor:
    """Cross-entropy, mean over the valid pixels, of class scores (B, K, H, W) and class ids (B, H, W) or `IGNORE`.

    With pixel weights w and class weights c (K,) the value is ``sum(c w loss) / sum(c)`` over the valid pixels: w = 0.5
    everywhere halves the loss, and only the ratios of c matter, as in `torch.nn.functional.cross_entropy`. Pixel
    weights have any shape that broadcasts to (B, H, W), such as (B, 1, 1) for whole images. 0 where no pixel is valid.
    """
    loss = _per_pixel(logits, label)
    count = (label != IGNORE).to(loss.dtype)
    if class_weight is not None:
        count = count * _per_pixel_weight(class_weight, label).to(loss.dtype)
        loss = loss * count
    if weight is not None:
        loss = loss * weight
    return _ratio(loss.sum(), count.sum())


def ohem_cross_entropy(
    logits: Tensor, label: Tensor, threshold: float = 0.9, min_kept: int = 131072, *,
    class_weight: Tensor | None = None, weight: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Cross-entropy of the hard pixels only (online hard example mining), as PIDNet is trained.

    Let p be the probability of the true class at each of the n valid pixels of the batch, sorted in ascending order and
    counted from 0. Pixels with p strictly below ``max(threshold, p[min(min_kept, n - 1)])`` are kept, and the loss is
    their mean. Of pixels that tie at the limit none is kept; if none is kept at all, the loss is 0. The weights of
    `cross_entropy` multiply each pixel's loss; unlike there the count stays that of the kept pixels, as published.

    Source: the published code of PIDNet (Xu et al., 2023) and HRNet; OHEM is due to Shrivastava et al., 2016.
    """
    loss = _per_pixel(logits, label)
    valid = label != IGNORE
    probability = torch.exp(-loss.detach())
    limit = _ohem_limit(probability, valid, threshold, max(1, min_kept))
    kept = (valid & (probability < limit)).to(loss.dtype)
    if class_weight is not None:
        loss = loss * _per_pixel_weight(class_weight, label).to(loss.dtype)
    if weight is not None:
        loss = loss * weight
    return _ratio((loss * kept).sum(), kept.sum())


def boundary_loss(
    logits: Tensor, boundary: Tensor, weight: float = 20.0, *, valid: Tensor | None = None,
    pixel_weight: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Binary cross-entropy of boundary scores (B, 1, H, W) before the sigmoid, balanced by the share of boundaries.

    Over the whole batch, boundary pixels are weighted by the share of the others, and the others by the share of
    boundary pixels; then the mean over the counted pixels, times ``weight``. Where the batch has only one kind, or no
    pixel counts, the loss is 0. Source: PIDNet (Xu et al., 2023), l1 of equation 7. ``boundary`` and ``valid`` (None:
    all) are (B, H, W) or (B, 1, H, W); ``pixel_weight`` multiplies each pixel's loss and broadcasts to (B, H, W).
    Raises `ValueError`: scores and boundaries differ in size, or boundaries are not bool.
    """
    scores, target = _full_precision(logits), _with_channel(boundary)
    if scores.ndim != 4 or scores.shape[1] != 1 or target.shape != scores.shape or target.dtype != torch.bool:
        raise ValueError(
            f"boundary scores (B, 1, H, W) need bool boundaries of their size, got {tuple(logits.shape)} and "
            f"{boundary.dtype} {tuple(boundary.shape)}"
        )
    target = target.to(scores.dtype)
    counted = torch.ones_like(target) if valid is None else _with_channel(valid).to(scores.dtype)
    total = counted.sum()
    positive = _ratio((target * counted).sum(), total)
    balance = torch.where(target == 1, 1 - positive, positive) * counted
    loss = F.binary_cross_entropy_with_logits(scores, target, reduction="none") * balance
    if pixel_weight is not None:
        loss = loss * pixel_weight.unsqueeze(-3)
    return weight * _ratio(loss.sum(), total)


def dice_loss(logits: Tensor, label: Tensor, *, weight: Tensor | None = None) -> Tensor:
    """One minus the soft Dice coefficient, mean over the classes that occur in the batch's valid pixels.

    Sums run over the whole batch. Pixel weights scale the sums, and the result is multiplied by their mean over the
    valid pixels, so that a weight of 0.5 everywhere halves the loss. Source: Milletari et al., 2016, without squares
    in the denominator. Arguments are those of `cross_entropy`; 0 where no pixel is valid.
    """
    _check_size(logits, label)
    probability = probabilities(logits)
    valid = (label != IGNORE).to(probability.dtype)
    counts = valid if weight is None else valid * weight
    classes = torch.arange(logits.shape[1], device=label.device).view(1, -1, 1, 1)
    truth = (label.unsqueeze(1) == classes).to(probability.dtype) * counts.unsqueeze(1)
    both = (probability * truth).sum((0, 2, 3))
    true = truth.sum((0, 2, 3))
    predicted = (probability * counts.unsqueeze(1)).sum((0, 2, 3))
    present = (true > 0).to(probability.dtype)
    loss = (1 - _ratio(2 * both, predicted + true)) * present
    return _ratio(loss.sum(), present.sum()) * _ratio(counts.sum(), valid.sum()).detach()


def soft_label_loss(logits: Tensor, teacher: Tensor, temperature: float = 1.0, where: Tensor | None = None) -> Tensor:
    """Kullback-Leibler divergence of the student from the teacher, mean over pixels (Hinton et al., 2015).

    Both are class scores (B, K, H, W), divided by the temperature; the teacher's get no gradient. The loss is
    multiplied by the temperature's square, so that gradients keep their size. Pixels count where ``where`` (B, H, W) is
    true; None: all. 0 where both agree, or no pixel counts.
    """
    student = (logits.float() / temperature).log_softmax(1)
    target = (teacher.detach().float() / temperature).log_softmax(1)
    return temperature**2 * masked_mean((target.exp() * (target - student)).sum(1), where)


def probabilities(logits: Tensor) -> Tensor:
    """Class probabilities (B, K, H, W) of class scores (B, K, H, W), in float32 under autocast."""
    return _full_precision(logits).softmax(1)


def self_information(logits: Tensor) -> Tensor:
    """Weighted self-information ``-p log p`` of each class, divided by log K (Vu et al., 2019, ADVENT, section 3.2).

    (B, K, H, W), 0 or above, of class scores (B, K, H, W); its sum over K is the `entropy`. Raises `ValueError` if K is
    1.
    """
    if logits.shape[1] < 2:
        raise ValueError("entropy needs at least 2 classes, got 1")
    log_probability = _full_precision(logits).log_softmax(1)
    return -(log_probability.exp() * log_probability) / math.log(logits.shape[1])


def entropy(logits: Tensor) -> Tensor:
    """Entropy of the class probabilities at each pixel, divided by log K (Vu et al., 2019, ADVENT, equation 1).

    (B, H, W), 0 (one class) to 1 (uniform), of class scores (B, K, H, W) with K of 2 or more.
    """
    return self_information(logits).sum(1)


def mean_entropy(logits: Tensor, where: Tensor | None = None) -> Tensor:
    """Mean of `entropy` over all pixels, or over those where ``where`` (B, H, W) is true; 0 if there are none."""
    return masked_mean(entropy(logits), where)


def masked_mean(values: Tensor, where: Tensor | None) -> Tensor:
    """Mean of values of any shape over those where ``where`` (it broadcasts) is true; 0 if none is, all for None."""
    counted = torch.ones_like(values) if where is None else where.to(values.dtype).expand_as(values)
    return _ratio((values * counted).sum(), counted.sum())


def distribution_entropy(probability: Tensor) -> Tensor:
    """Entropy of distributions (..., K), in nats; ``0 log 0`` is 0."""
    terms: Tensor = torch.special.entr(probability)
    return terms.sum(-1)


def diversity(logits: Tensor, where: Tensor | None = None) -> Tensor:
    """Entropy of the mean prediction over pixels, divided by log K: 0 (one class) to 1 (all equally frequent).

    Together with `mean_entropy` it gives information maximization (Liang et al., 2020, SHOT, arXiv:2002.08546). Class
    scores are (B, K, H, W), K of 2 or more; pixels count where ``where`` (B, H, W) is true; None: all.
    """
    probability = logits.float().softmax(1)
    if where is None:
        mean = probability.mean((0, 2, 3))
    else:
        mean = (probability * where[:, None]).sum((0, 2, 3)) / where.sum().clamp_min(1)
    return -(mean * mean.clamp_min(1e-12).log()).sum() / math.log(len(mean))


def charbonnier_entropy(logits: Tensor, power: float = 2.0) -> Tensor:
    """Mean of ``(entropy ** 2 + 1e-6) ** power`` of class scores (B, K, H, W) (Yang and Soatto, 2020, FDA).

    A power above 0.5 reduces the influence of confident pixels.
    """
    return ((entropy(logits) ** 2 + 1e-6) ** power).mean()


def distance_to_uniform(logits: Tensor, where: Tensor) -> Tensor:
    """Kullback-Leibler divergence of the predictions from uniform ones, mean where ``where`` (B, H, W) is true, or 0.

    Minimized at pixels with pseudo-labels, it prevents overconfident predictions (Zou et al., 2019, CRST,
    arXiv:1908.09822).
    """
    return masked_mean(-logits.float().log_softmax(1).mean(1) - math.log(logits.shape[1]), where)


def _per_pixel(logits: Tensor, label: Tensor) -> Tensor:
    """Cross-entropy of each pixel (B, H, W), 0 at ignored ones."""
    _check_size(logits, label)
    return F.cross_entropy(_full_precision(logits), label.long(), ignore_index=IGNORE, reduction="none")


def _check_size(logits: Tensor, label: Tensor) -> None:
    if label.ndim != 3 or logits.ndim != 4 or logits.shape[::2] + logits.shape[3:] != label.shape:
        raise ValueError(
            f"class scores (B, K, H, W) and label (B, H, W) must agree in batch, height and width, "
            f"got {tuple(logits.shape)} and {tuple(label.shape)}"
        )


def _full_precision(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _per_pixel_weight(class_weight: Tensor, label: Tensor) -> Tensor:
    """The weight of each pixel's class (B, H, W), 0 at ignored pixels."""
    valid = label != IGNORE
    return class_weight[label.long().masked_fill(~valid, 0)] * valid


def _ohem_limit(probability: Tensor, valid: Tensor, threshold: float, min_kept: int) -> Tensor:
    """``max(threshold, p[min(min_kept, n - 1)])`` of the n valid probabilities p in ascending order (a scalar)."""
    largest = probability.masked_fill(~valid, 0).max()
    if min_kept < probability.numel():
        ranked = probability.masked_fill(~valid, torch.inf).flatten().kthvalue(min_kept + 1).values
        largest = torch.minimum(largest, ranked)  # infinite where n <= min_kept
    return largest.clamp_min(threshold)


def _with_channel(mask: Tensor) -> Tensor:
    return mask.unsqueeze(1) if mask.ndim == 3 else mask


def _ratio(total: Tensor, count: Tensor) -> Tensor:
    """``total / count``; where the count is 0 the total, which is then 0 and keeps its graph."""
    return total / torch.where(count > 0, count, torch.ones_like(count))
