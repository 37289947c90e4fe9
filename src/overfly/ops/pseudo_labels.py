"""A teacher that follows the student, and the labels it gives to images that have none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from overfly.core.records import IGNORE


class Pseudo(NamedTuple):
    """What a teacher says of images without labels.

    Attributes:
        label: most probable class (B, H, W), int64; `IGNORE` where the image was not measured.
        probability: its probability (B, H, W), 0 to 1; 0 there.
    """

    label: Tensor
    probability: Tensor


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module, keep: float, step: int | None = None) -> None:
    """Move the teacher a little towards the student: parameters and buffers, batch-normalization statistics included.

    ``teacher = k teacher + (1 - k) student`` with ``k = min(1 - 1 / (step + 1), keep)``, so that the first steps are a
    plain average (Tarvainen and Valpola, 2017). Buffers that are no floats, such as counters, are copied.

    Args:
        teacher: changed in place; of the student's structure.
        student: left alone.
        keep: share of the teacher that is kept once training is under way, 0 to 1.
        step: from 0; None: the teacher is trained already, and keeps its share from the first step on.
    """
    share = keep if step is None else min(1 - 1 / (step + 1), keep)
    own = teacher.state_dict()
    for name, value in student.state_dict().items():
        if value.is_floating_point():
            own[name].lerp_(value.to(own[name].dtype), 1 - share)
        else:
            own[name].copy_(value)


@torch.no_grad()
def pseudo_label(logits: Tensor, nodata_mask: Tensor | None = None) -> Pseudo:
    """The most probable class of each pixel, and its probability.

    Args:
        logits: class scores (B, K, H, W).
        nodata_mask: where the image was not measured (B, H, W); None: nowhere.
    """
    probability, label = logits.float().softmax(1).max(1)
    return without(Pseudo(label, probability), nodata_mask)


def without(pseudo: Pseudo, nodata_mask: Tensor | None) -> Pseudo:
    """Pseudo-labels with `IGNORE`, and probability 0, where the image was not measured (B, H, W); None: nowhere."""
    if nodata_mask is None:
        return pseudo
    return Pseudo(pseudo.label.masked_fill(nodata_mask, IGNORE), pseudo.probability.masked_fill(nodata_mask, 0.0))


@torch.no_grad()
def seen_at(teacher: nn.Module, image: Tensor, scale: float) -> Tensor:
    """Class probabilities (B, K, H, W) of images seen larger or smaller, and turned by a random quarter or mirrored.

    The turn is drawn once for all images from torch's generator on the CPU; the probabilities are turned and scaled
    back.

    Args:
        teacher: images (B, C, H, W) to `Logits` at their size.
        image: (B, C, H, W), square unless quarter turns do not matter, in the sensor's range.
        scale: 2 shows things at twice their size.
    """
    quarters, mirrored = int(torch.randint(4, ())), bool(torch.randint(2, ()))
    size = (image.shape[-2], image.shape[-1])
    seen = image
    if scale != 1:
        larger = [max(8, round(side * scale)) for side in size]
        seen = nn.functional.interpolate(image, size=larger, mode="bilinear", antialias=scale < 1)
    seen = (seen.flip(-1) if mirrored else seen).rot90(quarters, (-2, -1))
    found: Tensor = teacher(seen).main.float().softmax(1).rot90(-quarters, (-2, -1))
    found = found.flip(-1) if mirrored else found
    return found if scale == 1 else nn.functional.interpolate(found, size=size, mode="bilinear")


def debiased(probability: Tensor, shares: Tensor, power: float) -> Tensor:
    """Probabilities with classes that are said often made dearer (after Wang et al., 2022, DebiasPL).

    Args:
        probability: (B, K, H, W), summing to 1.
        shares: how often each class is said (K,), such as a moving average of the mean probabilities.
        power: 0 changes nothing; 1 evens all classes out.

    Returns:
        (B, K, H, W), summing to 1.
    """
    dearer = probability / shares.clamp_min(1e-6).view(1, -1, 1, 1) ** power
    return dearer / dearer.sum(1, keepdim=True)


@torch.no_grad()
def said_of(
    teacher: nn.Module,
    image: Tensor,
    *,
    scales: Sequence[float],
    shares: Tensor,
    power: float,
    keep: float,
    nodata_mask: Tensor | None = None,
) -> Pseudo:
    """What a teacher says of images seen at several sizes, with classes that it says often made dearer.

    Args:
        teacher: images (B, C, H, W) to `Logits` at their size.
        image: (B, C, H, W), in the sensor's range.
        scales: sizes at which it sees each; its probabilities are averaged.
        shares: how often each class is said (K,); followed in place.
        power: how much dearer; 0: not at all (`debiased`).
        keep: share of the old shares that is kept.
        nodata_mask: where nothing was measured, bool (B, H, W): no label, and no part in the shares; None: nowhere.

    Returns:
        Labels and probabilities (B, H, W), the latter 0 to 1 after frequent classes were made dearer.
    """
    probability = torch.stack([seen_at(teacher, image, scale) for scale in scales]).mean(0)
    if nodata_mask is None:
        shares.lerp_(probability.mean((0, 2, 3)), 1 - keep)
    elif not bool(nodata_mask.all()):
        shares.lerp_(probability.movedim(1, -1)[~nodata_mask].mean(0), 1 - keep)
    sureness, label = debiased(probability, shares, power).max(1)
    return without(Pseudo(label, sureness), nodata_mask)


def share_above(pseudo: Pseudo, threshold: float) -> Tensor:
    """Share of each image's measured pixels above a probability (B, 1, 1): the weight of DACS (Tranheden et al., 2021).

    It is 0 for an image of which nothing was measured.
    """
    above, measured = (
        chosen.float().mean((1, 2), keepdim=True) for chosen in (pseudo.probability > threshold, pseudo.label != IGNORE)
    )
    return above / measured.clamp_min(1e-6)


def local_quality(probability: Tensor, threshold: float = 0.7, size: int = 7) -> Tensor:
    """LDQ: share of sure pixels in the surroundings of each pixel (B, H, W) (Li et al., 2022, Remote Sensing 14:4942).

    Args:
        probability: of the most probable class (B, H, W).
        threshold: probability from which a pixel is sure.
        size: side of the square surroundings in pixels, odd; beyond the border nothing counts.
    """
    sure = (probability >= threshold).float()[:, None]
    return nn.functional.avg_pool2d(sure, size, stride=1, padding=size // 2, count_include_pad=False)[:, 0]


def surest(pseudo: Pseudo, share: float | Tensor, classes: int, ceiling: float = 1.0) -> Tensor:
    """Threshold of each class (K,) that keeps the surest share of its pixels (Zou et al., 2018, CBST).

    Args:
        pseudo: labels and probabilities.
        share: share of each class's pixels to keep, 0 to 1; for all, or of each class (K,). One pixel is kept at least.
        classes: K.
        ceiling: a threshold above this is lowered to it: what is so sure is always kept.

    Returns:
        Thresholds (K,); that of a class without any pixel is not a number.
    """
    shares = torch.as_tensor(share, dtype=torch.float64).cpu().expand(classes).tolist()
    found = torch.full((classes,), float("nan"), device=pseudo.label.device)
    for index in range(classes):
        values = pseudo.probability[pseudo.label == index]
        if len(values):
            rank = min(len(values), max(1, round(len(values) * (1 - shares[index])) + 1))
            found[index] = values.kthvalue(rank).values.clamp(max=ceiling)
    return found


def rising(first: float, last: float, rise: int, step: int) -> float:
    """A share that goes from the first to the last in a line over the first ``rise`` steps, at a step from 0."""
    return first + (last - first) * min(1.0, step / rise)


def keep_above(pseudo: Pseudo, thresholds: Tensor) -> Tensor:
    """Pseudo-labels (B, H, W) with `IGNORE` where the probability is below the threshold of its class.

    Args:
        pseudo: labels and probabilities.
        thresholds: of each class (K,), or of each image and class (B, K).
    """
    each = thresholds.expand(len(pseudo.label), -1)
    named = pseudo.label.masked_fill(pseudo.label == IGNORE, 0)
    limit = each.gather(1, named.flatten(1)).view_as(pseudo.probability)
    return pseudo.label.masked_fill(pseudo.probability < limit, IGNORE)


def moved(before: Tensor, found: Tensor, keep: float) -> Tensor:
    """Thresholds (K,) that follow those of the last images as a moving average.

    Args:
        before: until now (K,); 0 where a class was not met yet, which then takes what is found as it is.
        found: of the last images (K,); not a number where they do not show the class, which then stays as it was.
        keep: share of the old, 0 to 1.
    """
    blended = torch.where(before > 0, torch.lerp(found, before, keep), found)
    return torch.where(found.isnan(), before, blended)


def instance_thresholds(pseudo: Pseudo, before: Tensor, share: float, hardness: float, keep: float) -> Tensor:
    """Thresholds of every image (B, K) and class, which follow what the images show (Mei et al., 2020, IAST).

    Image by image the surest ``share * t ** hardness`` of each class's pixels sets a threshold, where t is the one
    before: classes that are hard, whose thresholds are low, keep fewer. The threshold moves towards it.

    Args:
        pseudo: labels and probabilities of B images.
        before: thresholds that the images before left (K,), each above 0.
        share: share of the pixels to keep of a class whose threshold is 1 (alpha of the paper).
        hardness: how much fewer are kept of a hard class (gamma).
        keep: share of the old threshold (beta).

    Returns:
        The thresholds after each image; the last row is the next ``before``.
    """
    rows = []
    for label, probability in zip(pseudo.label, pseudo.probability, strict=True):
        found = surest(Pseudo(label, probability), share * before**hardness, len(before))
        before = moved(before, found, keep)
        rows.append(before)
    return torch.stack(rows)
