"""Estimate the mIoU on unlabeled images, with an interval, from confidence calibrated on the source.

With calibrated probabilities p, a pixel predicted as class j is of class k with probability p_k; sums of probabilities
by predicted class are an expected confusion matrix (confidence-based performance estimation). The error is measured on
held-out source images under many synthetic shifts, some towards the style of the target; new objects and other class
distributions are not among them.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from overfly.core.records import IGNORE
from overfly.core.spec import NonNegativeInt, PositiveFloat, Share, Spec
from overfly.data.domain import Domain, Split
from overfly.evaluation.images import MetricOptions, labeled_images, predict_scores, random_pixels, unlabeled_images
from overfly.evaluation.label_free_metrics import seeded
from overfly.evaluation.perturbations import domain_shifts
from overfly.evaluation.score import evaluation_mode
from overfly.evaluation.scores import Confusion

PIXELS = 2048
"""Random pixels per source image that the calibration is fitted on."""
MIN_CLASS_SHARE = 1e-3
"""Least share of expected or predicted pixels for a class to count in an estimated mean."""
KERNEL_WIDTH = 0.1
"""Width, in estimated mIoU, of the kernel that weights errors of shifts by their distance from the target."""
MIN_WEIGHT = 0.25
"""Least weight of the error of a shift."""
BOOTSTRAP_SAMPLES = 200
"""Bootstrap samples of the images."""
COVERAGE = 0.8
"""Share of the errors on shifted source images that the interval covers."""
STYLES = 3
"""Target images whose style is transferred to the source."""


class ShiftError(Spec):
    """Estimated and actual mIoU of the source under one shift."""

    name: str
    """The shift."""
    estimate: Share
    """Expected mIoU from calibrated confidence."""
    truth: Share
    """mIoU from the source's labels."""


class Estimate(Spec):
    """An estimate of the mIoU on unlabeled images; not a measurement."""

    miou: Share
    """The estimate, corrected by the median error on shifted source images."""
    low: Share
    """Lower end of the interval."""
    high: Share
    """Upper end of the interval."""
    expected: Share
    """Expected mIoU from calibrated confidence, before the correction."""
    temperature: PositiveFloat
    """Temperature of the softmax, fitted on the source."""
    classwise: bool
    """True if a bias per class was fitted too, because it lowered the loss on held-out source pixels."""
    shifts: tuple[ShiftError, ...]
    """The shifts behind the interval."""
    images: NonNegativeInt
    """Target images of the estimate."""
    source_labels: NonNegativeInt
    """Labels of the source that were read."""


class Calibrator(NamedTuple):
    """Scores to probabilities: softmax(scores / temperature + bias) (Guo et al., 2017).

    Attributes:
        temperature: above 1 lowers confidence.
        bias: (K,), zeros for plain temperature scaling.
    """

    temperature: float
    bias: Tensor

    def __call__(self, scores: Tensor) -> Tensor:
        """Probabilities of scores (K, ...), of the same shape, float64."""
        bias = self.bias.to(scores.device).reshape(-1, *[1] * (scores.dim() - 1))
        return (scores.double() / self.temperature + bias).softmax(0)


def calibrate(scores: Tensor, label: Tensor, groups: Tensor | None = None) -> Calibrator:
    """Fit a temperature, and a bias per class if it lowers the loss in two-fold cross-validation.

    Class scores (K, N), before any softmax, are of pixels with labels (N,); the folds are even and odd images, whose
    index is ``groups`` (N,). None: no bias.
    """
    known = label != IGNORE
    scores, label = scores[:, known].double(), label[known]
    plain = _fit_calibrator(scores, label, classwise=False)
    if groups is None:
        return plain
    odd = groups[known] % 2 == 1
    if not bool(odd.any()) or bool(odd.all()):
        return plain
    for fit, test in ((~odd, odd), (odd, ~odd)):
        fitted = [_fit_calibrator(scores[:, fit], label[fit], classwise=classwise) for classwise in (False, True)]
        loss = [F.nll_loss(each(scores[:, test]).clamp_min(1e-12).log().T, label[test]) for each in fitted]
        if loss[1] >= loss[0]:
            return plain
    return _fit_calibrator(scores, label, classwise=True)


def expected_confusion(probability: Tensor) -> Tensor:
    """Sum the probability of class k over pixels predicted as class j: row k, column j of (K, K), float64."""
    flat = probability.flatten(1).double()
    columns = torch.zeros(len(flat), len(flat), dtype=torch.float64, device=flat.device)
    return columns.index_add_(1, flat.argmax(0), flat).cpu()


def expected_miou(counts: Tensor) -> float:
    """Mean IoU of an expected confusion matrix (K, K), over the expected or predicted classes."""
    rows, columns, hits = counts.sum(1), counts.sum(0), counts.diagonal()
    present = torch.maximum(rows, columns) > MIN_CLASS_SHARE * counts.sum()
    iou = hits / (rows + columns - hits).clamp_min(1e-12)
    return float(iou[present].mean()) if bool(present.any()) else 0.0


def estimate(
    network: nn.Module, source: Domain, target: Domain, options: MetricOptions = MetricOptions(), *,
    source_split: Split = "val", split: Split = "train",
) -> Estimate:  # fmt: skip
    """Estimate a network's target mIoU without target labels; about thirty forward passes per source image.

    It is calibrated on the labels of the source's ``source_split``, which is held out from training; no label of the
    target's items is read. Raises `DataError`: the source split has no labels, or the target split no images, and
    `NotFiniteError`: the network's scores are not finite.
    """
    seed = options.seed
    with evaluation_mode(network.to(options.device)), torch.inference_mode():
        images = list(unlabeled_images(target, split, options))
        pairs = list(labeled_images(source, source_split, options))

        def score(image: Tensor) -> Tensor:
            return predict_scores(network, image.to(options.device), options.window).cpu()

        calibrator, truths = _calibrate_on_source(score, pairs, seed)
        styles = images[:: math.ceil(len(images) / STYLES)]
        errors = tuple(_shift_errors(score, calibrator, pairs, styles, max_value=source.max_value, seed=seed))
        counts = [expected_confusion(calibrator(score(image))) for image in images]
    expected = expected_miou(torch.stack(counts).sum(0))
    lower, middle, upper = interval(
        expected, errors, math.hypot(_bootstrap_deviation(counts, seed), _bootstrap_deviation(truths, seed))
    )
    return Estimate(
        miou=middle, low=lower, high=upper, expected=expected, temperature=calibrator.temperature,
        classwise=bool(calibrator.bias.any()), shifts=errors, images=len(images), source_labels=len(pairs),
    )  # fmt: skip


def interval(expected: float, errors: Sequence[ShiftError], deviation: float = 0.0) -> tuple[float, float, float]:
    """Compute lower end, estimate and upper end of the target mIoU from the errors of the shifts.

    Weighted quantiles of the errors (estimate minus truth) are subtracted from the expected value. Errors grow as
    estimates fall, so shifts with an estimate near the target's have the largest weight (`KERNEL_WIDTH`, `MIN_WEIGHT`).
    The sampling error of the images, ``deviation`` over bootstrap samples, is added in quadrature.
    """
    differences = np.array([error.estimate - error.truth for error in errors])
    distances = np.array([error.estimate for error in errors]) - expected
    weight = MIN_WEIGHT + np.exp(-((distances / KERNEL_WIDTH) ** 2) / 2)
    outside = (1 - COVERAGE) / 2
    lowest, median, highest = (_quantile(differences, weight, share) for share in (outside, 0.5, 1 - outside))
    sampling = 1.2816 * deviation  # the normal quantile of the same share
    low = expected - median - math.hypot(highest - median, sampling)
    high = expected - median + math.hypot(median - lowest, sampling)
    clipped = [min(1.0, max(0.0, value)) for value in (low, expected - median, high)]
    return clipped[0], clipped[1], clipped[2]


def _quantile(values: np.ndarray[tuple[int], np.dtype[np.float64]], weight: object, share: float) -> float:
    """Weighted quantile, linear between the middles of the weights."""
    order = np.argsort(values)
    sorted_weight = np.asarray(weight)[order]
    positions = (np.cumsum(sorted_weight) - sorted_weight / 2) / sorted_weight.sum()
    return float(np.interp(share, positions, values[order]))


def _calibrate_on_source(
    score: Callable[[Tensor], Tensor], pairs: Iterable[tuple[Tensor, Tensor]], seed: int
) -> tuple[Calibrator, list[Tensor]]:
    """The calibrator, and the confusion matrix (K, K), float64, of each image."""
    scores, labels, groups, counts = [], [], [], []
    for index, (image, label) in enumerate(pairs):
        chosen = random_pixels(*label.shape, PIXELS, seed, index)
        predicted = score(image)
        scores.append(predicted.flatten(1)[:, chosen])
        labels.append(label.flatten()[chosen])
        groups.append(torch.full_like(chosen, index))
        counts.append(Confusion.from_predictions(predicted.argmax(0), label, len(predicted)).counts.double())
    return calibrate(torch.cat(scores, 1), torch.cat(labels), torch.cat(groups)), counts


def _shift_errors(
    score: Callable[[Tensor], Tensor], calibrator: Calibrator, pairs: Sequence[tuple[Tensor, Tensor]],
    styles: Sequence[Tensor], *, max_value: float, seed: int,
) -> Iterator[ShiftError]:  # fmt: skip
    """Estimated and actual mIoU of each shift, over labeled pixels."""
    for index, perturbation in enumerate(domain_shifts(styles)):
        expected, truth = torch.zeros(1), None
        for number, (image, label) in enumerate(pairs):
            _, generator = next(iter(seeded([perturbation], seed + index, number)))
            known = label != IGNORE
            size = (image.shape[-2], image.shape[-1])
            scores = perturbation.invert(score(perturbation.apply(image, max_value, generator)), size)[:, known]
            expected = expected + expected_confusion(calibrator(scores))
            counts = Confusion.from_predictions(scores.argmax(0), label[known], len(scores))
            truth = counts if truth is None else truth + counts
        if truth is not None and truth.pixels:
            yield ShiftError(name=perturbation.name, estimate=expected_miou(expected), truth=truth.miou)


def _bootstrap_deviation(counts: Sequence[Tensor], seed: int) -> float:
    """Standard deviation of the mIoU of summed counts over bootstrap samples of the images."""
    stack, random = torch.stack(list(counts)), np.random.default_rng(seed)
    samples = random.integers(0, len(stack), (BOOTSTRAP_SAMPLES, len(stack)))
    return float(np.std([expected_miou(stack[torch.from_numpy(sample)].sum(0)) for sample in samples]))


@torch.inference_mode(mode=False)
@torch.enable_grad()
def _fit_calibrator(scores: Tensor, label: Tensor, *, classwise: bool) -> Calibrator:
    """The temperature, and bias, of least negative log-likelihood."""
    scores, label = scores.clone(), label.clone()  # inference tensors have no gradients
    log = torch.zeros((), dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(len(scores), dtype=torch.float64, requires_grad=classwise)
    parameters = [log, bias] if classwise else [log]
    optimizer = torch.optim.LBFGS(parameters, max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> float:
        optimizer.zero_grad()
        penalty = 1e-3 * (bias**2).sum()
        loss = F.cross_entropy((scores * (-log).exp() + bias[:, None]).T, label) + penalty
        torch.autograd.backward(loss)
        return float(loss.detach())

    if len(label):
        optimizer.step(closure)  # type: ignore[no-untyped-call]
    temperature = min(max(math.exp(float(log.detach())), 0.05), 20.0)
    return Calibrator(temperature, bias.detach())
