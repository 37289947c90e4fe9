"""Reverse validation: accuracy on the source of a classifier trained on a network's target predictions.

It is high if the target shows the same classes as the source, and needs source labels only. Source: E. Zhong et al.,
"Cross validation framework to choose amongst models and datasets for transfer learning", 2010, with a forest (P. Geurts
et al., "Extremely randomized trees", 2006) on color and texture: a network would carry over what it learned.
"""

from collections.abc import Iterable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from overfly.core.records import IGNORE
from overfly.data.domain import Domain, Split, sample_evenly
from overfly.evaluation.images import MetricOptions, labeled_images, predict_scores, random_pixels, unlabeled_images
from overfly.evaluation.score import evaluation_mode
from overfly.evaluation.scores import Confusion

PIXELS = 512
"""Random pixels per image for training and evaluation."""
SIDES = (3, 7, 15, 31)
"""Sides of the windows, in pixels, whose mean and standard deviation are features of their center."""
TREES = 100
"""Trees of the forest."""
MIN_LEAF = 3
"""Fewest pixels in a leaf."""
MIN_IMAGES = 8
"""Fewest target images."""
MIN_MIOU = 0.25
"""Least mIoU of the forest trained on source labels; below it, color and texture do not separate the classes."""


def reverse_validation(
    network: nn.Module, source: Domain, target: Domain, held_out: Split = "val",
    options: MetricOptions = MetricOptions(),
) -> float | None:  # fmt: skip
    """MIoU of a forest trained on target predictions, relative to one trained on source labels.

    Both are evaluated on the labels of the source's split ``held_out``; no label of the target's items is read. Returns
    0 to 1, over the classes in the held-out labels; None for fewer target images than `MIN_IMAGES`, or if color and
    texture do not separate the classes (`MIN_MIOU`).

    Raises `DataError`: a split has no images or, of the source, no labels, and `NotFiniteError`: the network's scores
    are not finite.
    """
    if len(sample_evenly(target.items("train"), options.limit)) < MIN_IMAGES:
        return None
    seed = options.seed
    labels = sample_pixels(labeled_images(source, "train", options), source.max_value, seed)
    test = sample_pixels(labeled_images(source, held_out, options), source.max_value, seed + 1)
    classes = len(source.classes)
    reference = forest_miou(labels, test, classes, seed)
    if reference < MIN_MIOU:
        return None

    def predictions() -> Iterator[tuple[Tensor, Tensor]]:
        for image in unlabeled_images(target, "train", options):
            yield image, predict_scores(network, image.to(options.device), options.window).argmax(0).cpu()

    with evaluation_mode(network.to(options.device)), torch.inference_mode():
        predicted = sample_pixels(predictions(), target.max_value, seed)
    return min(1.0, forest_miou(predicted, test, classes, seed) / reference)


def pixel_features(image: Tensor, max_value: float) -> Tensor:
    """Features of each pixel: its bands, and mean bands and gray standard deviation of the windows around it.

    The image (C, H, W) is in the sensor's range, 0 to ``max_value``; values that are not finite count as 0. The
    features (C + 4 (C + 1), H, W) are 0 to 1.
    """
    from kornia.filters import box_blur

    bands = (image.nan_to_num() / max_value)[None]
    gray = bands.mean(1, keepdim=True)

    features = [bands]
    for side in SIDES:
        mean = partial(box_blur, kernel_size=(side, side), border_type="replicate", separable=True)
        features += [mean(bands), (mean(gray.square()) - mean(gray).square()).clamp_min(0).sqrt()]
    return torch.cat(features, 1)[0]


def sample_pixels(pairs: Iterable[tuple[Tensor, Tensor]], max_value: float, seed: int) -> tuple[Tensor, Tensor]:
    """Features (N, D) and classes (N,) of random labeled pixels of images (C, H, W) and labels (H, W)."""
    features, labels = [], []
    for index, (image, label) in enumerate(pairs):
        chosen = random_pixels(*label.shape, PIXELS, seed, index)
        features.append(pixel_features(image, max_value).flatten(1)[:, chosen].T)
        labels.append(label.flatten()[chosen])
    known = (label := torch.cat(labels)) != IGNORE
    return torch.cat(features)[known], label[known]


def forest_miou(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], classes: int, seed: int) -> float:
    """MIoU, 0 to 1, of a class-balanced forest over the classes in ``test``; 0 if either side is empty.

    Both sides are features (N, D) and classes (N,) of pixels.
    """
    from sklearn.ensemble import ExtraTreesClassifier

    (features, labels), (others, truth) = train, test
    if not len(labels) or not len(truth):
        return 0.0
    forest = ExtraTreesClassifier(
        TREES, min_samples_leaf=MIN_LEAF, class_weight="balanced", random_state=seed, n_jobs=1
    )
    predicted = torch.from_numpy(forest.fit(features.numpy(), labels.numpy()).predict(others.numpy()))
    confusion = Confusion.from_predictions(predicted, truth, classes)
    return float(confusion.iou[torch.bincount(truth, minlength=classes) > 0].mean())
