"""Label-free metrics of a network on unlabeled images, for model selection without target labels.

Higher is better; none is sufficient. A collapsed network, which predicts one class everywhere with full confidence, has
the highest entropy metric (0), pixel agreement under perturbations (1) and soft neighborhood density, but information
0, nuclear norm 1/√K, diversity 0 and class-balanced consistency 1/K. Exchanged classes change none of these: only the
source mIoU and the agreement with a reference network detect them.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Literal, get_args

import torch
from torch import Generator, Tensor, nn

from overfly.core.spec import NonNegativeInt, Share, Spec
from overfly.data.domain import Domain, Split
from overfly.evaluation.images import MetricOptions, predict_scores, random_pixels, unlabeled_images
from overfly.evaluation.perturbations import GEOMETRIC, Perturbation, mild_perturbations, random_mask
from overfly.evaluation.score import evaluation_mode
from overfly.evaluation.scores import Confusion, finite
from overfly.ops.losses import distribution_entropy

Validator = Literal[
    "entropy", "information", "nuclear_norm", "snd", "agreement",
    "masked", "masked_miou", "views", "views_miou", "source_miou", "consensus", "consistency", "score",
]  # fmt: skip
VALIDATORS: tuple[Validator, ...] = get_args(Validator)
MIN_CONSENSUS = 3
"""Fewest networks with a consensus: two agree with their mean equally."""
PIXELS = 512
"""Random pixels per image whose probabilities are kept for the nuclear norm."""
NEIGHBORS = 3072
"""Random pixels over all images that soft neighborhood density compares with each other."""


class LabelFreeMetrics(Spec):
    """Metrics of a network on images without labels; each validator is higher for better networks."""

    entropy: float
    """Minus the mean entropy of the pixel probabilities, as a share of ln K: -1 (uniform) to 0 (certain)."""
    information: float
    """Mutual information: entropy of the mean prediction minus mean entropy, as a share of ln K, 0 to 1
    (Krause et al., 2010; Shi and Sha, 2012)."""
    nuclear_norm: Share
    """Nuclear norm of the probabilities of random pixels (N, K) over its bound √(N·min(N, K)) (Cui et al., 2020)."""
    snd: float | None
    """Soft neighborhood density of random pixels' probabilities, as a share of ln(N - 1) (Saito et al., 2021)."""
    agreement: Share | None
    """Mean IoU with the predictions of a reference network, over the classes that either predicts; none without one."""
    masked: Share | None
    """Share of pixels whose prediction is unchanged when half of the image is masked; none if not computed."""
    masked_miou: Share | None
    """Class-balanced mIoU between the predictions with and without mask; none if not computed."""
    views: Share | None
    """Share of pixels whose prediction is unchanged under mild perturbations (rotation, scale, color, blur, noise);
    mean over the perturbations."""
    views_miou: Share | None
    """Class-balanced mIoU between the predictions with and without perturbation; mean over the perturbations."""
    source_miou: Share | None = None
    """mIoU on the source's held-out labels; none if it was not computed."""
    source_statistics_miou: Share | None = None
    """The same with batch-normalization statistics of the source; none if it was not computed."""
    consensus: Share | None = None
    """Class-balanced mIoU with the mean prediction of all candidates; none if it was not computed."""
    diversity: float
    """Entropy of the shares of predicted classes, as a share of ln K: 0 for one class. Not a validator: the labels have
    a diversity of their own."""
    shares: tuple[Share, ...]
    """Share of pixels predicted as each class."""
    by_view: dict[str, Share]
    """Class-balanced mIoU between the predictions with and without each perturbation."""
    consistency: Share = 0.0
    """Cohen's kappa between the predictions with and without perturbation; mean over the geometric ones, 0 without any.
    A mean over classes rewards a network whose rare classes grow into large areas, and the share of equal pixels one
    that predicts a single class; kappa neither."""
    images: NonNegativeInt
    """Number of images."""

    @property
    def score(self) -> float:
        """Mean of consistency on the target and mIoU on the source; without source labels, of kappa and mIoU.

        Networks are compared by these perturbations alone: every recipe augments with turns or flips and with scales,
        while color changes, masking and pasting are augmentations of some methods only, whose networks are more
        consistent under them. The rule of `overfly adapt` (docs/adr/0013-selection.md).
        """
        values = [value for name, value in self.by_view.items() if name in GEOMETRIC]
        balanced = math.fsum(values) / max(1, len(values))
        return (self.consistency + (balanced if self.source_miou is None else self.source_miou)) / 2

    def by_validator(self) -> dict[str, float | None]:
        """The metrics that candidates are ranked by."""
        return {name: getattr(self, name) for name in VALIDATORS}


def label_free_metrics(
    network: nn.Module, domain: Domain, split: Split = "train", options: MetricOptions = MetricOptions(), *,
    reference: nn.Module | None = None, perturbations: Sequence[Perturbation] | None = None,
) -> LabelFreeMetrics:  # fmt: skip
    """Compute label-free metrics on images of a domain; about ten forward passes per image.

    The network maps images (B, C, H, W) in the sensor's range to `Logits` at their size; its training or evaluation
    mode is restored. Labels are removed from the domain's items before anything is read. `LabelFreeMetrics.agreement`
    compares with the predictions of ``reference``, such as a teacher. Without ``perturbations``, these are
    `random_mask` and `mild_perturbations`; metrics of others are left out. Raises `DataError`: there are no images, or
    one cannot be read, and `NotFiniteError`: the network's scores are not finite.
    """
    images = unlabeled_images(domain, split, options)
    statistics = prediction_statistics(
        network, images, domain.max_value, options, reference=reference, perturbations=perturbations
    )
    return statistics.metrics(options.seed)


def prediction_statistics(
    network: nn.Module, images: Iterable[Tensor], max_value: float, options: MetricOptions = MetricOptions(), *,
    reference: nn.Module | Sequence[Tensor] | None = None, perturbations: Sequence[Perturbation] | None = None,
    predicted: Sequence[Tensor] | None = None,
) -> "PredictionStatistics":  # fmt: skip
    """Predict images (C, H, W) in memory, and again under perturbations; see `label_free_metrics`.

    ``reference`` may also be the probabilities that the reference network predicts for these images, and ``predicted``
    those of the network itself (`predict_probabilities`): they are not computed again then. Raises `ValueError`: there
    are no images, and `NotFiniteError`: the network's scores are not finite.
    """
    statistics: PredictionStatistics | None = None
    networks = [network, reference] if isinstance(reference, nn.Module) else [network]
    for model in networks:
        model.to(options.device)
    views = list(chain([random_mask()], mild_perturbations())) if perturbations is None else list(perturbations)
    with evaluation_mode(nn.ModuleList(networks)), torch.inference_mode():
        for index, raw in enumerate(images):
            image = raw.to(options.device)
            size = (image.shape[-2], image.shape[-1])
            probability = predicted[index] if predicted is not None else _probability(network, image, options)
            statistics = statistics or PredictionStatistics(len(probability))
            statistics.add(probability, options.seed, index)
            prediction = probability.argmax(0)
            if reference is network:
                statistics.compare("reference", prediction, prediction)
            elif isinstance(reference, nn.Module):
                statistics.compare("reference", prediction, _probability(reference, image, options).argmax(0))
            elif reference is not None:
                statistics.compare("reference", prediction, reference[index].argmax(0))
            for perturbation, generator in seeded(views, options.seed, index):
                perturbed = predict_scores(network, perturbation.apply(image, max_value, generator), options.window)
                statistics.compare(perturbation.name, prediction, perturbation.invert(perturbed, size).argmax(0))
    if statistics is None:
        raise ValueError("label-free metrics need at least one image, got 0")
    return statistics


def predict_probabilities(network: nn.Module, images: Iterable[Tensor], options: MetricOptions) -> Iterator[Tensor]:
    """Predict the class probabilities (K, H, W), half precision, on the CPU, of images (C, H, W).

    The network's training or evaluation mode is restored. Raises `NotFiniteError`: the network's scores are not finite.
    """
    with evaluation_mode(network.to(options.device)), torch.inference_mode():
        for image in images:
            yield _probability(network, image.to(options.device), options).half().cpu()


def _probability(network: nn.Module, image: Tensor, options: MetricOptions) -> Tensor:
    return predict_scores(network, image, options.window).softmax(0)


def seeded(
    perturbations: Iterable[Perturbation], seed: int, image_index: int
) -> Iterator[tuple[Perturbation, Generator]]:
    """Pair each perturbation with a generator seeded by (seed, image index, perturbation index)."""
    for index, perturbation in enumerate(perturbations):
        yield perturbation, torch.Generator().manual_seed((seed * 1_000_003 + image_index) * 1_009 + index)


class PredictionStatistics:
    """Running statistics of predictions over images; memory does not grow with image size.

    Attributes:
        confusions: by name of the perturbation, or ``reference``, a confusion matrix per image.
    """

    def __init__(self, classes: int) -> None:
        self.classes, self.images, self.pixels, self.entropy = classes, 0, 0, 0.0
        self.mean = torch.zeros(classes, dtype=torch.float64)
        self.predicted = torch.zeros(classes, dtype=torch.float64)
        self.samples: list[Tensor] = []
        self.confusions: dict[str, list[Confusion]] = {}

    def add(self, probability: Tensor, seed: int, index: int) -> None:
        """Add the probabilities (K, H, W) of one unperturbed image."""
        flat = probability.flatten(1).double()
        self.images, self.pixels = self.images + 1, self.pixels + flat.shape[1]
        self.entropy += float(distribution_entropy(flat.T).sum())
        self.mean += flat.sum(1).cpu()
        self.predicted += torch.bincount(flat.argmax(0), minlength=self.classes).cpu()
        chosen = random_pixels(*probability.shape[1:], PIXELS, seed, index)
        self.samples.append(flat[:, chosen.to(flat.device)].T.cpu())

    def compare(self, name: str, prediction: Tensor, other: Tensor) -> None:
        """Add the confusion matrix ``name`` of two predictions (H, W) of one image."""
        confusion = Confusion.from_predictions(other.cpu(), prediction.cpu(), self.classes)
        self.confusions.setdefault(name, []).append(confusion)

    def metrics(self, seed: int = 0) -> LabelFreeMetrics:
        """Compute the metrics of everything added."""
        scale = math.log(max(self.classes, 2))
        mean, shares = self.mean / self.pixels, self.predicted / self.pixels
        mean_entropy = self.entropy / self.pixels
        samples = torch.cat(self.samples)
        subset = samples[random_pixels(1, len(samples), NEIGHBORS, seed)] if len(samples) > NEIGHBORS else samples
        pairs = {name: sum(each[1:], each[0]) for name, each in self.confusions.items()}
        reference, masked = pairs.pop("reference", None), pairs.pop("masked", None)
        geometric = [max(0.0, finite(pair.kappa) or 0.0) for name, pair in pairs.items() if name in GEOMETRIC]
        return LabelFreeMetrics(
            entropy=-mean_entropy / scale, information=(float(distribution_entropy(mean)) - mean_entropy) / scale,
            nuclear_norm=nuclear_norm(samples), snd=finite(neighborhood_density(subset)),
            agreement=None if reference is None else reference.miou,
            masked=None if masked is None else masked.accuracy,
            masked_miou=None if masked is None else balanced_miou(masked),
            views=sum(pair.accuracy for pair in pairs.values()) / len(pairs) if pairs else None,
            views_miou=sum(map(balanced_miou, pairs.values())) / len(pairs) if pairs else None,
            diversity=float(distribution_entropy(shares)) / scale, shares=tuple(shares.tolist()),
            by_view={name: balanced_miou(pair) for name, pair in pairs.items()},
            consistency=math.fsum(geometric) / max(1, len(geometric)), images=self.images,
        )  # fmt: skip


def nuclear_norm(probability: Tensor) -> float:
    """Sum of the singular values of (N, K) over its upper bound √(N·min(N, K)), 0 to 1.

    1 for confident predictions, evenly over all classes; 1/√K for confident predictions of one class; 1/K for uniform
    probabilities (Cui et al., CVPR 2020: batch nuclear-norm maximization).
    """
    bound = math.sqrt(len(probability) * min(probability.shape))
    return min(1.0, float(torch.linalg.matrix_norm(probability.double(), "nuc")) / bound)


def neighborhood_density(probability: Tensor) -> float:
    """Soft neighborhood density of rows (N, F), 0 to 1: how many similar rows each has (Saito et al., ICCV 2021).

    The mean entropy of softmax(cosine similarity to all other rows / 0.05), over ln(N - 1); NaN for fewer than 3 rows.
    Rows may be probabilities or features. It is 1 if all rows are equal: density alone does not detect collapse. Memory
    grows as N².
    """
    if len(probability) < 3:
        return math.nan
    unit = torch.nn.functional.normalize(probability.float(), dim=1)
    similar = (unit @ unit.T / 0.05).fill_diagonal_(-torch.inf)
    return float(distribution_entropy(similar.softmax(1)).double().mean()) / math.log(len(unit) - 1)


def consensus(predicted: Iterable[Iterable[Tensor]]) -> list[list[Confusion]]:
    """Compare each network's predictions with the mean prediction of all networks.

    ``predicted`` holds for each network the probabilities (K, H, W) of the same images (`predict_probabilities`).
    Memory holds the mean, a byte per pixel and network, and what ``predicted`` holds. Returns for each network a
    confusion matrix per image, its rows the mean prediction; empty for fewer than three.
    """
    sums: list[Tensor] = []
    predictions: list[list[Tensor]] = []
    for images in predicted:
        own = []
        for index, probability in enumerate(images):
            if len(sums) == index:
                sums.append(torch.zeros(probability.shape))
            sums[index] += probability
            own.append(probability.argmax(0).to(torch.uint8))
        predictions.append(own)
    if len(predictions) < MIN_CONSENSUS:
        return [[] for _ in predictions]
    common = [(total.argmax(0), len(total)) for total in sums]
    return [
        [Confusion.from_predictions(ids, mean, classes) for ids, (mean, classes) in zip(own, common, strict=True)]
        for own in predictions
    ]


def balanced_miou(pair: Confusion) -> float:
    """Compute the mean IoU of two predictions over all K classes; classes that neither predicts count as 0.

    A constant network, which is consistent under every perturbation, therefore has 1/K: a lost class lowers the mean as
    much as a misclassified one.
    """
    return float(pair.iou.nan_to_num(0.0).mean())
