"""Losses on class scores: what training minimizes, as pure functions.

All of them leave ignored pixels out of the sum and out of the count, are zero with zero gradients (never NaN) where no
pixel counts, and compute in float32 under autocast. NaN scores of valid pixels make a NaN loss, so that they show.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from overfly.core.records import IGNORE


def cross_entropy(
    logits: Tensor,
    label: Tensor,
    *,
    weight: Tensor | None = None,
    class_weight: Tensor | None = None,
    ignore: int = IGNORE,
) -> Tensor:
    """Cross-entropy, mean over the valid pixels.

    With pixel weights w and class weights c the value is ``sum(c w loss) / sum(c)`` over the valid pixels. Pixel
    weights stand in the sum only, so that w = 0.5 everywhere halves the loss; class weights stand in the count too, as
    in `torch.nn.functional.cross_entropy`, so that only their ratios matter.

    Args:
        logits: class scores (B, K, H, W).
        label: class ids (B, H, W), 0 to K-1 or ``ignore``.
        weight: what each pixel counts, any shape that broadcasts to (B, H, W), such as (B, 1, 1) for whole images.
        class_weight: what each class counts, (K,).
        ignore: the id of pixels that are left out.

    Returns:
        A scalar; 0 where no pixel is valid.

    Raises:
        ValueError: scores and label differ in size.
    """
    loss = _per_pixel(logits, label, ignore)
    count = (label != ignore).to(loss.dtype)
    if class_weight is not None:
        count = count * _of_pixels(class_weight, label, ignore).to(loss.dtype)
        loss = loss * count
    if weight is not None:
        loss = loss * weight
    return _ratio(loss.sum(), count.sum())


def ohem_cross_entropy(
    logits: Tensor,
    label: Tensor,
    threshold: float = 0.9,
    min_kept: int = 131072,
    ignore: int = IGNORE,
    *,
    class_weight: Tensor | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of the hard pixels only (online hard example mining), as PIDNet is trained.

    Let p be the probability of the true class at each of the n valid pixels of the batch, in ascending order and
    counted from 0. A pixel is kept when its p is strictly below ``max(threshold, p[min(min_kept, n - 1)])``; the loss
    is the mean over the kept. So, ties apart, at least ``min_kept`` pixels are kept where there are more than that.
    With fewer, all but the surest one are, and that one too if it is below the threshold. Of pixels that tie at the
    limit none is kept; if this leaves none at all, the loss is 0.

    Source: the published code of PIDNet (Xu et al., 2023) and HRNet; OHEM is due to Shrivastava et al., 2016.

    Args:
        logits: class scores (B, K, H, W).
        label: class ids (B, H, W), 0 to K-1 or ``ignore``.
        threshold: pixels with a probability of the true class below this are hard, 0 to 1.
        min_kept: how many pixels of the whole batch are kept at least.
        ignore: the id of pixels that are left out.
        class_weight: (K,), multiplies each pixel's loss; unlike in `cross_entropy` the count stays that of the kept
            pixels, as published.
        weight: multiplies each pixel's loss, broadcasts to (B, H, W); it does not change which pixels are kept.

    Returns:
        A scalar; 0 where no pixel is valid.

    Raises:
        ValueError: scores and label differ in size.
    """
    loss = _per_pixel(logits, label, ignore)
    valid = label != ignore
    probability = torch.exp(-loss.detach())
    limit = _ohem_limit(probability[valid], threshold, max(1, min_kept))
    kept = (valid & (probability < limit)).to(loss.dtype)
    if class_weight is not None:
        loss = loss * _of_pixels(class_weight, label, ignore).to(loss.dtype)
    if weight is not None:
        loss = loss * weight
    return _ratio((loss * kept).sum(), kept.sum())


def boundary_loss(
    logits: Tensor,
    boundary: Tensor,
    weight: float = 20.0,
    *,
    valid: Tensor | None = None,
    pixel_weight: Tensor | None = None,
) -> Tensor:
    """Binary cross-entropy of a boundary head, balanced by the share of boundary pixels.

    Over the whole batch, boundary pixels are weighed with the share of the others, and the others with the share of
    boundary pixels, so that both sides weigh the same; then the mean over the counted pixels, times ``weight``. Where
    the batch has only one kind, the loss is 0. Source: PIDNet (Xu et al., 2023), l1 of equation 7.

    Args:
        logits: boundary scores before the sigmoid, (B, 1, H, W).
        boundary: 1 where a boundary runs, else 0; (B, H, W) or (B, 1, H, W), of any type. There is no ignore id in it:
            pixels to leave out are named by ``valid``.
        weight: multiplies the loss.
        valid: True where a pixel counts, (B, H, W) or (B, 1, H, W); left out, all do.
        pixel_weight: multiplies each pixel's loss, broadcasts to (B, H, W).

    Returns:
        A scalar; 0 where no pixel counts.

    Raises:
        ValueError: scores and boundaries differ in size, or boundaries hold anything but 0 and 1 (such as 0 and 255).
    """
    scores = _full_precision(logits)
    if scores.ndim != 4 or scores.shape[1] != 1:
        raise ValueError(f"boundary scores are (B, 1, H, W), not {tuple(logits.shape)}")
    target = _binary(_with_channel(boundary)).to(scores.dtype)
    if target.shape != scores.shape:
        raise ValueError(f"boundary scores {tuple(logits.shape)} and boundaries {tuple(boundary.shape)} differ in size")
    counted = torch.ones_like(target) if valid is None else _with_channel(valid).to(scores.dtype)
    total = counted.sum()
    positive = _ratio((target * counted).sum(), total)
    balance = torch.where(target == 1, 1 - positive, positive) * counted
    loss = F.binary_cross_entropy_with_logits(scores, target, reduction="none") * balance
    if pixel_weight is not None:
        loss = loss * pixel_weight.unsqueeze(-3)
    return weight * _ratio(loss.sum(), total)


def dice_loss(logits: Tensor, label: Tensor, *, weight: Tensor | None = None, ignore: int = IGNORE) -> Tensor:
    """One minus the soft Dice coefficient, mean over the classes that occur in the batch's valid pixels.

    Sums run over the whole batch. Pixel weights say how much a pixel counts in the sums, and the result is multiplied
    by their mean over the valid pixels, so that a weight of 0.5 everywhere halves this loss too.
    Source: Milletari et al., 2016, without squares in the denominator.

    Args:
        logits: class scores (B, K, H, W).
        label: class ids (B, H, W), 0 to K-1 or ``ignore``.
        weight: broadcasts to (B, H, W).
        ignore: the id of pixels that are left out.

    Returns:
        A scalar, 0 to 1 times the mean weight; 0 where no pixel is valid.

    Raises:
        ValueError: scores and label differ in size.
    """
    _same_size(logits, label)
    probability = _full_precision(logits).softmax(1)
    valid = (label != ignore).to(probability.dtype)
    counts = valid if weight is None else valid * weight
    classes = torch.arange(logits.shape[1], device=label.device).view(1, -1, 1, 1)
    truth = (label.unsqueeze(1) == classes).to(probability.dtype) * counts.unsqueeze(1)
    both = (probability * truth).sum((0, 2, 3))
    true = truth.sum((0, 2, 3))
    given = (probability * counts.unsqueeze(1)).sum((0, 2, 3))
    present = (true > 0).to(probability.dtype)
    loss = (1 - _ratio(2 * both, given + true)) * present
    return _ratio(loss.sum(), present.sum()) * _ratio(counts.sum(), valid.sum()).detach()


def probabilities(logits: Tensor) -> Tensor:
    """Class probabilities (B, K, H, W) of class scores (B, K, H, W), in float32 under autocast."""
    return _full_precision(logits).softmax(1)


def self_information(logits: Tensor) -> Tensor:
    """Weighted self-information ``-p log p`` of each class at each pixel, divided by log K; its sum is the `entropy`.

    Source: ADVENT (Vu et al., 2019), section 3.2.

    Args:
        logits: class scores (B, K, H, W) with K of 2 or more.

    Returns:
        (B, K, H, W), 0 or above; 0 everywhere where the network is sure.

    Raises:
        ValueError: there is only one class.
    """
    if logits.shape[1] < 2:
        raise ValueError("the entropy of a single class is not defined; it needs 2 classes or more")
    log_probability = _full_precision(logits).log_softmax(1)
    return -(log_probability.exp() * log_probability) / math.log(logits.shape[1])


def entropy(logits: Tensor) -> Tensor:
    """Entropy of the class probabilities at each pixel, divided by log K: 0 is sure of one class, 1 is uniform.

    Source: ADVENT (Vu et al., 2019), equation 1.

    Args:
        logits: class scores (B, K, H, W) with K of 2 or more.

    Returns:
        (B, H, W), 0 to 1.

    Raises:
        ValueError: there is only one class.
    """
    return self_information(logits).sum(1)


def mean_entropy(logits: Tensor, where: Tensor | None = None) -> Tensor:
    """Mean of `entropy` over all pixels, or over those where ``where`` (B, H, W) is true; 0 if there are none."""
    per_pixel = entropy(logits)
    counted = torch.ones_like(per_pixel) if where is None else where.to(per_pixel.dtype).expand_as(per_pixel)
    return _ratio((per_pixel * counted).sum(), counted.sum())


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


def _per_pixel(logits: Tensor, label: Tensor, ignore: int) -> Tensor:
    """Cross-entropy of each pixel (B, H, W), 0 at ignored ones."""
    _same_size(logits, label)
    return F.cross_entropy(_full_precision(logits), label.long(), ignore_index=ignore, reduction="none")


def _same_size(logits: Tensor, label: Tensor) -> None:
    if label.ndim != 3 or logits.ndim != 4 or logits.shape[::2] + logits.shape[3:] != label.shape:
        raise ValueError(
            f"class scores (B, K, H, W) and label (B, H, W) must agree in batch, height and width; "
            f"these are {tuple(logits.shape)} and {tuple(label.shape)}"
        )


def _full_precision(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _of_pixels(class_weight: Tensor, label: Tensor, ignore: int) -> Tensor:
    """The weight of each pixel's class (B, H, W), 0 at ignored pixels."""
    valid = label != ignore
    return class_weight[label.long().masked_fill(~valid, 0)] * valid


def _ohem_limit(probability: Tensor, threshold: float, min_kept: int) -> float:
    """``max(threshold, p[min(min_kept, n - 1)])`` of n probabilities (n,), sorting no more than is needed."""
    count = probability.numel()
    if count == 0:
        return threshold
    position = min(min_kept, count - 1)
    if int((probability < threshold).sum()) > position:
        return threshold
    smallest = (
        probability.topk(position + 1, largest=False, sorted=False).values if position < count - 1 else probability
    )
    return max(threshold, float(smallest.max()))


def _with_channel(mask: Tensor) -> Tensor:
    return mask.unsqueeze(1) if mask.ndim == 3 else mask


def _binary(boundary: Tensor) -> Tensor:
    if boundary.dtype != torch.bool and not bool(((boundary == 0) | (boundary == 1)).all()):
        low, high = boundary.min().item(), boundary.max().item()
        raise ValueError(
            f"boundaries are 0 and 1, and these reach from {low:g} to {high:g}; make edges of 0 and 255 0 and 1 first "
            f"(edges > 0), or the boundary head learns nothing"
        )
    return boundary


def _ratio(total: Tensor, count: Tensor) -> Tensor:
    """``total / count``; where the count is 0, the total, which is then 0 as well and still has its graph."""
    return total / torch.where(count > 0, count, torch.ones_like(count))
