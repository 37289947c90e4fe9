"""Reverse validation: whether what a network says of the target would, taught to another, serve the source.

Where the target shows the same classes, somebody who has seen nothing but its pictures and the network's labels of them
knows the classes in the source too. Where it shows other things, what the network takes for water there is not what
water looks like. The labels of the target are never asked, and those of the source, which can be, give the answer.

Source: E. Zhong et al., "Cross validation framework to choose amongst models and datasets for transfer learning", 2010,
with a forest (P. Geurts et al., "Extremely randomized trees", 2006) on plain color and texture as the one who learns:
a network would bring along what it knew of the source.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from overfly.core.records import IGNORE
from overfly.data.domain import Domain, Split, sample_evenly
from overfly.evaluation.confusion import Confusion
from overfly.evaluation.images import labeled_images, predict_scores, random_pixels, unlabeled_images
from overfly.evaluation.score import evaluation_mode

PIXELS = 512
"""Random pixels of each picture that are learned from or asked about."""
SIDES = (3, 7, 15, 31)
"""Sides in pixels of the squares around a pixel whose mean and deviation describe it."""
TREES = 100
"""Trees of the forest."""
LEAF = 3
"""Least pixels in a leaf."""
FEW = 8
"""Target pictures below which they show too little of a place to ask."""
TELLS = 0.25
"""mIoU of the forest that learns from true labels, below which color and texture tell the classes too badly to ask."""


def reverse_validation(
    network: nn.Module,
    source: Domain,
    target: Domain,
    held: Split = "val",
    *,
    limit: int | None = 16,
    crop: int | None = None,
    window: int | None = None,
    resize: int | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> float | None:
    """How well the network's labels of the target teach the source's classes, as a share of what true labels teach.

    Two forests learn classes from color and texture: one from pixels of the target and what the network says of them,
    one from pixels of the source's ``train`` split and its labels. Both are asked for the source's held-out labels.

    Args:
        network: images (B, C, H, W) in the sensor's range to `Logits` at their size; moved to ``device``.
        source: with labels, which are read.
        target: whose ``train`` pictures are looked at; labels are taken away from its items before anything is read.
        held: split of the source that both are asked about.
        limit: pictures of each at most, evenly spread; None: all.
        crop: longest side that is cut from the middle of each picture; None: whole pictures.
        window: side of overlapping windows for pictures that are larger; None: the whole picture at once.
        resize: side of the square that pictures are first resized to.
        device: where the network runs.
        seed: of the fixed random draws: same seed, same answer. No global random state is read or changed.

    Returns:
        mIoU of the first over mIoU of the second, 0 to 1, over the classes that the held-out labels have, so that a
        target which lacks some of them teaches less; None where the question means nothing: of few pictures (`FEW`),
        or where color and texture hardly tell the classes (`TELLS`).

    Raises:
        DataError: a split has no pictures or, of the source, no labels.
        NotFiniteError: the network gives scores that are not finite.
    """
    if len(sample_evenly(target.items("train"), limit)) < FEW:
        return None
    looks = {"limit": limit, "crop": crop, "resize": resize}

    home = pixels(labeled_images(source, "train", **looks), source.max_value, seed)
    asked = pixels(labeled_images(source, held, **looks), source.max_value, seed + 1)
    classes = len(source.classes)
    known = taught(home, asked, classes, seed)
    if known < TELLS:
        return None

    def said() -> Iterator[tuple[Tensor, Tensor]]:
        for image in unlabeled_images(target, "train", **looks):
            yield image, predict_scores(network, image.to(device), window).argmax(0).cpu()

    network.to(device)
    with evaluation_mode(network), torch.inference_mode():
        away = pixels(said(), target.max_value, seed)
    return min(1.0, taught(away, asked, classes, seed) / known)


def described(image: Tensor, max_value: float) -> Tensor:
    """What surrounds each pixel: its bands, their means in squares around it, and the deviation of the bands' mean.

    Args:
        image: (C, H, W), in the sensor's range; what is not a number counts as 0.
        max_value: value of the brightest pixel that the sensor can give.

    Returns:
        (C + 4 (C + 1), H, W), 0 to 1.
    """
    bands = (image.nan_to_num() / max_value)[None]
    gray = bands.mean(1, keepdim=True)

    def around(values: Tensor, side: int) -> Tensor:
        for height, width in ((side, 1), (1, side)):  # rows, then columns: the same means, side / 2 times faster
            size, pad = (height, width), (height // 2, width // 2)
            values = F.avg_pool2d(values, size, 1, pad, count_include_pad=False)
        return values

    found = [bands]
    for side in SIDES:
        deviation = (around(gray.square(), side) - around(gray, side).square()).clamp_min(0).sqrt()
        found += [around(bands, side), deviation]
    return torch.cat(found, 1)[0]


def pixels(pairs: Iterable[tuple[Tensor, Tensor]], max_value: float, seed: int) -> tuple[Tensor, Tensor]:
    """Descriptions (N, D) and classes (N,) of random pixels of (C, H, W) and labels (H, W), none of `IGNORE`."""
    looks, labels = [], []
    for place, (image, label) in enumerate(pairs):
        chosen = random_pixels(*label.shape, PIXELS, seed, place)
        looks.append(described(image, max_value).flatten(1)[:, chosen].T)
        labels.append(label.flatten()[chosen])
    known = (label := torch.cat(labels)) != IGNORE
    return torch.cat(looks)[known], label[known]


def taught(examples: tuple[Tensor, Tensor], asked: tuple[Tensor, Tensor], classes: int, seed: int) -> float:
    """MIoU on the pixels asked about of a forest that learns from examples, all classes weighing alike.

    Args:
        examples: descriptions (N, D) and classes (N,).
        asked: the same, of other pixels.
        classes: how many there are.
        seed: of the trees.

    Returns:
        0 to 1, over the classes among those asked about; 0 where there is nothing to learn from or to ask.
    """
    from sklearn.ensemble import ExtraTreesClassifier

    (looks, labels), (others, truth) = examples, asked
    if not len(labels) or not len(truth):
        return 0.0
    forest = ExtraTreesClassifier(TREES, min_samples_leaf=LEAF, class_weight="balanced", random_state=seed, n_jobs=1)
    answers = torch.from_numpy(forest.fit(looks.numpy(), labels.numpy()).predict(others.numpy()))
    found = Confusion.of(answers, truth, classes)
    return float(found.iou[torch.bincount(truth, minlength=classes) > 0].mean())


__all__ = ["described", "pixels", "reverse_validation", "taught"]
