"""Mean teachers, their pseudo-labels, and mixing of images: pasted classes (ClassMix), covered squares (MIC)."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn

from overfly.core.records import IGNORE, Labeled


class PseudoLabels(NamedTuple):
    """A teacher's predictions for unlabeled images.

    Attributes:
        label: most probable class (B, H, W), int64; `IGNORE` where the image has no data.
        probability: probability of that class (B, H, W), float32, 0 to 1; 0 where the image has no data.
    """

    label: Tensor
    probability: Tensor


@torch.no_grad()
def ema_update(teacher: nn.Module, student: nn.Module, decay: float, step: int | None = None) -> None:
    """Update the teacher, in place, as the moving average of a student of its structure (Tarvainen and Valpola, 2017).

    ``teacher = d * teacher + (1 - d) * student`` with ``d = min(1 - 1 / (step + 1), decay)``, for parameters and for
    floating-point buffers such as batch-normalization statistics; other buffers are copied. So the first updates, from
    step 0, are a plain average of all students; without ``step`` d is ``decay``, 0 to 1, always.
    """
    decay = decay if step is None else min(1 - 1 / (step + 1), decay)
    averages = teacher.state_dict()
    for name, value in student.state_dict().items():
        if value.is_floating_point():
            averages[name].lerp_(value.to(averages[name].dtype), 1 - decay)
        else:
            averages[name].copy_(value)


@torch.no_grad()
def pseudo_label(logits: Tensor, nodata_mask: Tensor | None = None) -> PseudoLabels:
    """Most probable class of each pixel of class scores (B, K, H, W), and its probability.

    ``nodata_mask`` is True where the image has no data, bool (B, H, W); None: nowhere.
    """
    probability, label = logits.float().softmax(1).max(1)
    return mask_nodata(PseudoLabels(label, probability), nodata_mask)


def mask_nodata(pseudo: PseudoLabels, nodata_mask: Tensor | None) -> PseudoLabels:
    """Pseudo-labels with `IGNORE` and probability 0 where ``nodata_mask`` (B, H, W) is true; None: nowhere."""
    if nodata_mask is None:
        return pseudo
    return PseudoLabels(pseudo.label.masked_fill(nodata_mask, IGNORE), pseudo.probability.masked_fill(nodata_mask, 0.0))


@torch.no_grad()
def predict_augmented(teacher: nn.Module, image: Tensor, scale: float, *, turns: bool = True) -> Tensor:
    """Class probabilities of rescaled images under one random quarter turn and flip, mapped back to the input.

    The turn and the flip are drawn once for all images, from torch's generator on the CPU. The teacher maps images (B,
    C, H, W), in the sensor's range, to `Logits` at their size; they are square, so that a quarter turn keeps their
    shape. ``scale`` is the factor of height and width; 2 doubles both. Without ``turns``, for images with a fixed top,
    they are flipped horizontally, and not turned. Returns (B, K, H, W), float32.
    """
    quarters, mirrored = int(torch.randint(4, ())) * turns, bool(torch.randint(2, ()))
    size = (image.shape[-2], image.shape[-1])
    view = image
    if scale != 1:
        scaled = [max(8, round(side * scale)) for side in size]
        view = nn.functional.interpolate(image, size=scaled, mode="bilinear", antialias=scale < 1)
    view = (view.flip(-1) if mirrored else view).rot90(quarters, (-2, -1))
    probability: Tensor = teacher(view).main.float().softmax(1).rot90(-quarters, (-2, -1))
    probability = probability.flip(-1) if mirrored else probability
    return probability if scale == 1 else nn.functional.interpolate(probability, size=size, mode="bilinear")


def class_shares(label: Tensor, classes: int) -> Tensor:
    """Share of each of K classes among the labeled pixels of each image (B, K); 1 / K each without labels.

    The label holds class ids (B, H, W) or `IGNORE`.
    """
    index = label.masked_fill(label == IGNORE, classes).flatten(1)
    counts = torch.zeros(len(label), classes + 1, device=label.device)
    counts = counts.scatter_add(1, index, torch.ones_like(index, dtype=counts.dtype))[:, :classes]
    total = counts.sum(1, keepdim=True)
    return torch.where(total > 0, counts / total, 1 / classes)


def align_distribution(probability: Tensor, class_prior: Tensor, reference: Tensor, power: float) -> Tensor:
    """Class probabilities divided by ``(class_prior / reference) ** power`` and normalized.

    Distribution alignment (Berthelot et al., 2020, ReMixMatch, arXiv:1911.09785), which has power 1 and the labels'
    class shares as the reference: classes that are predicted more often than there become less probable.

    Probabilities (B, K, H, W), before and after, sum to 1 over K. ``class_prior`` is the mean probability of each class
    (K,), such as a moving average over batches, ``reference`` the expected share of each class (K,). A power of 0
    changes nothing; 1 moves the mean to the reference.
    """
    ratio = class_prior.clamp_min(1e-6) / reference.clamp_min(1e-6)
    corrected = probability / ratio.view(1, -1, 1, 1) ** power
    return corrected / corrected.sum(1, keepdim=True)


def moving_average(average: Tensor, value: Tensor, decay: float) -> Tensor:
    """Moving average of class shares (K,) after one more value; the value itself if the average is 0 so far."""
    return torch.where(average.any(), torch.lerp(value, average, decay), value)


@torch.no_grad()
def multiscale_pseudo_labels(
    teacher: nn.Module, image: Tensor, class_prior: Tensor, reference: Tensor, *, scales: Sequence[float],
    power: float, decay: float, turns: bool = True, nodata_mask: Tensor | None = None,
) -> tuple[PseudoLabels, Tensor]:  # fmt: skip
    """Pseudo-labels from the mean prediction over several scales, its class shares aligned with a reference.

    Teacher, image, scales and turns are those of `predict_augmented`, the power is that of `align_distribution`.
    ``class_prior`` is the moving average of the mean class probabilities of earlier batches (K,), 0 before the first;
    it is not changed, and the new average keeps the share ``decay`` of it, 0 to 1. ``reference`` is the expected share
    of each class (K,); all 0: as predicted. ``nodata_mask`` is True where the image has no data, bool (B, H, W): no
    label, no part in the prior; None: nowhere. Returns pseudo-labels with corrected probabilities, and the new class
    prior (K,).
    """
    probability = torch.stack([predict_augmented(teacher, image, scale, turns=turns) for scale in scales]).mean(0)
    known = torch.ones_like(probability[:, 0], dtype=torch.bool) if nodata_mask is None else ~nodata_mask
    mean = probability.masked_fill(~known[:, None], 0).sum((0, 2, 3)) / known.sum().clamp_min(1)
    class_prior = torch.where(known.any(), moving_average(class_prior, mean, decay), class_prior)
    reference = torch.where(reference.any(), reference, class_prior)
    corrected, label = align_distribution(probability, class_prior, reference, power).max(1)
    return mask_nodata(PseudoLabels(label, corrected), nodata_mask), class_prior


def confident_share(pseudo: PseudoLabels, threshold: Tensor | float) -> Tensor:
    """Share of each image's pixels with a probability above ``threshold`` (B, 1, 1) (Tranheden et al., 2021, DACS).

    The threshold is one for each pixel (B, H, W), or for all. Pixels without data are left out; the share is 0 for an
    image without any data.
    """
    above, with_data = (
        chosen.float().mean((1, 2), keepdim=True) for chosen in (pseudo.probability > threshold, pseudo.label != IGNORE)
    )
    return above / with_data.clamp_min(1e-6)


def class_thresholds(pseudo: PseudoLabels, share: float | Tensor, classes: int) -> Tensor:
    """Probability threshold of each class that keeps its most confident pixels (Zou et al., 2018, CBST).

    Runs without waiting for the device: one sort by (class, probability), then one lookup per class. Pseudo-labels have
    any shape. ``share`` is the share of each class's pixels to keep, 0 to 1: one number, or one per class (K,). At
    least one pixel of each class is kept. Returns thresholds (K,); NaN for a class without pixels.
    """
    label, probability = pseudo.label.flatten().long(), pseudo.probability.flatten().float()
    exact = torch.float32 if label.device.type == "mps" else torch.float64  # MPS has no float64
    # floats of 0 and above sort like their bits, so label and probability make one integer key
    keys = ((label << 32) + probability.view(torch.int32)).sort().values
    first = torch.searchsorted(keys, torch.arange(classes + 1, device=keys.device) << 32)
    count = first.diff()
    dropped = (count.to(exact) * (1 - torch.as_tensor(share, dtype=exact))).round().long()
    rank = torch.minimum(count, (dropped + 1).clamp_min(1))  # ascending from 1; 0 for a class without pixels
    threshold = (keys[first[:-1] + rank - 1] & 0x7FFFFFFF).int().view(torch.float32)
    return torch.where(count > 0, threshold, torch.nan)


def linear_ramp(start: float, end: float, steps: int, step: int) -> float:
    """Value at ``step`` (from 0) of a line from ``start`` to ``end`` over ``steps`` steps; ``end`` afterwards."""
    return start + (end - start) * min(1.0, step / steps)


def filter_by_threshold(pseudo: PseudoLabels, thresholds: Tensor) -> Tensor:
    """Labels (B, H, W) with `IGNORE` where the probability is below the threshold of the pixel's class.

    Thresholds are one per class (K,), or one per image and class (B, K).
    """
    per_image = thresholds.expand(len(pseudo.label), -1)
    index = pseudo.label.masked_fill(pseudo.label == IGNORE, 0)
    limit = per_image.gather(1, index.flatten(1)).view_as(pseudo.probability)
    return pseudo.label.masked_fill(pseudo.probability < limit, IGNORE)


def ema_thresholds(thresholds: Tensor, batch_thresholds: Tensor, decay: float) -> Tensor:
    """Moving average of class thresholds (K,) over batches, which keeps the share ``decay`` of it, 0 to 1.

    The average so far is 0 for a class without pixels so far, which takes the batch's threshold; NaN among those of the
    last batch (K,) keeps the average of the class.
    """
    blended = torch.where(thresholds > 0, torch.lerp(batch_thresholds, thresholds, decay), batch_thresholds)
    return torch.where(batch_thresholds.isnan(), thresholds, blended)


def instance_thresholds(
    pseudo: PseudoLabels, thresholds: Tensor, share: float, hardness: float, decay: float
) -> Tensor:
    """Class thresholds of every image, a moving average over images (Mei et al., 2020, IAST).

    Each image keeps the most confident ``share * t ** hardness`` of a class's pixels, where t is the average before
    it: fewer pixels of hard classes, whose thresholds are low. ``share`` (alpha) is that of a class whose threshold is
    1, ``hardness`` is gamma, and ``decay`` (beta) is the share of the average so far that is kept. Pseudo-labels are
    (B, H, W), thresholds the average over the images before (K,), above 0. Returns the average after each image (B, K);
    the last row is the next batch's ``thresholds``.
    """
    rows = []
    for label, probability in zip(pseudo.label, pseudo.probability, strict=True):
        current = class_thresholds(PseudoLabels(label, probability), share * thresholds**hardness, len(thresholds))
        thresholds = ema_thresholds(thresholds, current, decay)
        rows.append(thresholds)
    return torch.stack(rows)


def class_mask(label: Tensor, share: float = 0.5) -> Tensor:
    """Mask of a random part of each image's classes, bool (B, H, W) (Olsson et al., 2021, ClassMix).

    Random numbers are drawn on the CPU by torch's generator. The label holds class ids (B, H, W) or `IGNORE`, which the
    mask never covers. ``share`` is that of the classes of an image that is chosen, rounded up; an image of one class is
    covered whole with this probability.
    """
    present = torch.zeros(len(label), IGNORE + 1, dtype=torch.bool, device=label.device)
    present.scatter_(1, label.flatten(1).long(), True)
    present[:, IGNORE] = False
    drawn = torch.rand(present.shape).to(label.device, non_blocking=True)
    rank = drawn.masked_fill(~present, 2.0).argsort(1).argsort(1)
    count = present.sum(1, keepdim=True)
    chosen = torch.where(count > 1, (count * share - 1e-4).ceil(), (drawn[:, -1:] < share).float())
    table = present & (rank < chosen)
    return table.gather(1, label.flatten(1).long()).view_as(label)


def paste(mask: Tensor, over: Labeled, under: Labeled) -> Labeled:
    """Images and labels of ``over`` where the mask (B, H, W) is true, of ``under`` elsewhere."""
    return Labeled(torch.where(mask[:, None], over.image, under.image), torch.where(mask, over.label, under.label))


def block_mask(image: Tensor, block: int, ratio: float, generator: Generator | None = None) -> Tensor:
    """Mask of random squares for images (B, C, H, W), bool (B, 1, H, W) (Hoyer et al., 2023, MIC, section 3.1).

    Squares of ``block`` pixels, cut in the last row and column, are masked with probability ``ratio``, by a generator
    on the CPU; None: torch's own.
    """
    count, _, height, width = image.shape
    coarse = torch.rand(count, 1, -(-height // block), -(-width // block), generator=generator) < ratio
    fine = coarse.repeat_interleave(block, 2).repeat_interleave(block, 3)[..., :height, :width]
    return fine.to(image.device, non_blocking=True)


def fill_mean_color(image: Tensor, mask: Tensor) -> Tensor:
    """Images (B, C, H, W) with their mean color where the mask (B, 1, H, W) is true."""
    return torch.where(mask, image.mean((2, 3), keepdim=True), image)
