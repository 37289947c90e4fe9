"""An estimate of the mIoU on pictures without labels, with an interval, from confidences that the source calibrates.

What a calibrated network expects: a pixel predicted as class j with probabilities p is of class k with probability p_k,
so sums of probabilities by predicted class are an expected confusion matrix (confidence-based performance estimation).
Calibration learned on the source fails under shift, mostly by too much confidence. By how much is measured where the
truth is known: on the source's own held-out pictures, shifted in many ways, some towards the look of the target. It
stays an estimate: shifts of kind (new things, other shares of the classes) are not among them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from overfly.core.records import IGNORE
from overfly.core.spec import Positive, Share, Spec, Whole
from overfly.data.domain import Domain, Split
from overfly.evaluation.confusion import Confusion
from overfly.evaluation.images import labeled_images, predict_scores, random_pixels, unlabeled_images
from overfly.evaluation.label_free_metrics import seeded
from overfly.evaluation.perturbations import domain_shifts
from overfly.evaluation.score import evaluation_mode

PIXELS = 2048
"""Random pixels of each source picture that calibration learns from."""
PRESENT = 1e-3
"""Share of pixels that a class must be expected on, or predicted on, to count in an estimated mean."""
NEAR = 0.1
"""Distance in estimated mIoU within which a shift's error counts most for the target."""
FLOOR = 0.25
"""Weight of the error of a shift that is nowhere near, against one that is just there."""
DRAWS = 200
"""Bootstrap samples of the pictures."""
COVERED = 0.8
"""Share of the errors on shifted source that the interval covers."""
STYLES = 3
"""Target pictures whose look the source is given."""


class ShiftError(Spec):
    """One shift of the source: what was estimated, and what was true."""

    name: str
    """The shift."""
    estimate: Share
    """mIoU that the confidences expect."""
    truth: Share
    """mIoU against the source's labels."""


class Estimate(Spec):
    """An estimate of mIoU on pictures without labels. It is not a measurement."""

    miou: Share
    """The estimate, corrected by the median error on shifted source."""
    low: Share
    """Lower end of the interval."""
    high: Share
    """Upper end of the interval."""
    expected: Share
    """What the calibrated confidences alone expect, before the correction."""
    temperature: Positive
    """What scores are divided by before the softmax, fitted on the source."""
    classwise: bool
    """Whether each class's score is moved by a constant too; only where that fits held-out source pixels better."""
    shifts: tuple[ShiftError, ...]
    """What the interval was made from."""
    images: Whole
    """Target pictures looked at."""
    labels_opened: Whole = 0
    """Labels of the target that were read: none."""
    source_labels: Whole
    """Labels of the source that were read."""


class Calibrator(NamedTuple):
    """Scores to probabilities: softmax(scores / temperature + bias) (Guo et al., 2017).

    Attributes:
        temperature: above 1 makes less confident.
        bias: (K,), zeros for plain temperature scaling.
    """

    temperature: float
    bias: Tensor

    def __call__(self, scores: Tensor) -> Tensor:
        """Probabilities of scores (K, ...), of the same shape, float64."""
        bias = self.bias.to(scores.device).reshape(-1, *[1] * (scores.dim() - 1))
        return (scores.double() / self.temperature + bias).softmax(0)


def calibrate(scores: Tensor, label: Tensor, groups: Tensor | None = None) -> Calibrator:
    """Fit a temperature, and constants of the classes if they help where they were not fitted.

    Args:
        scores: class scores of pixels (K, N), before any softmax.
        label: their true classes (N,), `IGNORE` left out.
        groups: which picture each pixel is of (N,); constants must help the odd ones when fitted on the even ones, and
            the other way round. None: no constants.
    """
    known = label != IGNORE
    scores, label = scores[:, known].double(), label[known]
    plain = _fitted(scores, label, classwise=False)
    if groups is None:
        return plain
    held = groups[known] % 2 == 1
    if not bool(held.any()) or bool(held.all()):
        return plain
    for fit, test in ((~held, held), (held, ~held)):
        tried = [_fitted(scores[:, fit], label[fit], classwise=each) for each in (False, True)]
        loss = [_loss(each(scores[:, test]), label[test]) for each in tried]
        if loss[1] >= loss[0]:
            return plain
    return _fitted(scores, label, classwise=True)


def expected_confusion(probability: Tensor, classes: int) -> Tensor:
    """Expected pixels (K, K), float64: row k, column j is the probability of k summed over pixels predicted as j."""
    flat = probability.flatten(1).double()
    columns = torch.zeros(classes, classes, dtype=torch.float64, device=flat.device)
    return columns.index_add_(1, flat.argmax(0), flat).cpu()


def expected_miou(counts: Tensor) -> float:
    """Mean IoU of an expected confusion matrix (K, K), over the classes that are expected or predicted at all."""
    rows, columns, hits = counts.sum(1), counts.sum(0), counts.diagonal()
    present = torch.maximum(rows, columns) > PRESENT * counts.sum()
    iou = hits / (rows + columns - hits).clamp_min(1e-12)
    return float(iou[present].mean()) if bool(present.any()) else 0.0


def estimate(
    network: nn.Module,
    source: Domain,
    target: Domain,
    *,
    source_split: Split = "val",
    split: Split = "train",
    limit: int | None = 24,
    crop: int | None = None,
    window: int | None = None,
    resize: int | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Estimate:
    """Estimate a network's mIoU on a target without its labels; about thirty passes over the source's pictures.

    Args:
        network: as `overfly.evaluation.label_free_metrics.label_free_metrics` takes it.
        source: whose labels calibration is learned from.
        target: whose pictures are estimated; their labels are taken away before anything is read.
        source_split: pictures of the source, held out from training.
        split: pictures of the target.
        limit: pictures of each, at most, evenly spread.
        crop: longest side that is cut from the middle of each.
        window: side of overlapping windows for pictures that are larger.
        resize: side of the square that pictures are first resized to.
        device: where the network runs.
        seed: of the fixed random draws.

    Raises:
        DataError: the source split has no labels, or the target split no pictures.
        NotFiniteError: the network gives scores that are not finite.
    """
    with evaluation_mode(network.to(device)), torch.inference_mode():
        images = list(unlabeled_images(target, split, limit=limit, resize=resize, crop=crop))
        pairs = list(labeled_images(source, source_split, limit=limit, resize=resize, crop=crop))

        def score(image: Tensor) -> Tensor:
            return predict_scores(network, image.to(device), window).cpu()

        calibrator, truths = _calibrated(score, pairs, seed)
        styles = images[:: math.ceil(len(images) / STYLES)]
        errors = tuple(_errors(score, calibrator, pairs, styles, max_value=source.max_value, seed=seed))
        counts = [_expected(calibrator, score(image)) for image in images]
    expected = expected_miou(torch.stack(counts).sum(0))
    lower, middle, upper = interval(expected, errors, math.hypot(_spread(counts, seed), _spread(truths, seed)))
    return Estimate(
        miou=middle,
        low=lower,
        high=upper,
        expected=expected,
        temperature=calibrator.temperature,
        classwise=bool(calibrator.bias.any()),
        shifts=errors,
        images=len(images),
        source_labels=len(pairs),
    )


def interval(expected: float, errors: Sequence[ShiftError], deviation: float = 0.0) -> tuple[float, float, float]:
    """Low, middle and high of the truth, from errors (estimate minus truth) of shifts whose truth is known.

    Quantiles of the errors are taken off the expected value. Errors grow as estimates fall, so those of shifts that the
    network takes about as hard as the target weigh most (`NEAR`, `FLOOR`). What the choice of pictures adds is added in
    squares.

    Args:
        expected: what confidences expect of the target.
        errors: one a shift.
        deviation: standard deviation over which pictures were looked at.
    """
    wrong = np.array([error.estimate - error.truth for error in errors])
    apart = np.array([error.estimate for error in errors]) - expected
    weight = FLOOR + np.exp(-((apart / NEAR) ** 2) / 2)
    outside = (1 - COVERED) / 2
    least, median, most = (_quantile(wrong, weight, share) for share in (outside, 0.5, 1 - outside))
    sampling = 1.2816 * deviation  # the normal quantile of the same share
    low = expected - median - math.hypot(most - median, sampling)
    high = expected - median + math.hypot(median - least, sampling)
    clipped = [min(1.0, max(0.0, value)) for value in (low, expected - median, high)]
    return clipped[0], clipped[1], clipped[2]


def _quantile(values: np.ndarray[tuple[int], np.dtype[np.float64]], weight: object, share: float) -> float:
    """Weighted quantile, linear between the middles of the weights."""
    order = np.argsort(values)
    sorted_weight = np.asarray(weight)[order]
    place = (np.cumsum(sorted_weight) - sorted_weight / 2) / sorted_weight.sum()
    return float(np.interp(share, place, values[order]))


def _expected(calibrator: Calibrator, scores: Tensor) -> Tensor:
    return expected_confusion(calibrator(scores), len(scores))


def _calibrated(
    score: Callable[[Tensor], Tensor], pairs: Iterable[tuple[Tensor, Tensor]], seed: int
) -> tuple[Calibrator, list[Tensor]]:
    """The calibrator, and each picture's confusion matrix (K, K), float64."""
    scores, labels, groups, counts = [], [], [], []
    for place, (image, label) in enumerate(pairs):
        chosen = random_pixels(*label.shape, PIXELS, seed, place)
        found = score(image)
        scores.append(found.flatten(1)[:, chosen])
        labels.append(label.flatten()[chosen])
        groups.append(torch.full_like(chosen, place))
        counts.append(Confusion.of(found.argmax(0), label, len(found)).counts.double())
    return calibrate(torch.cat(scores, 1), torch.cat(labels), torch.cat(groups)), counts


def _errors(
    score: Callable[[Tensor], Tensor],
    calibrator: Calibrator,
    pairs: Sequence[tuple[Tensor, Tensor]],
    styles: Sequence[Tensor],
    *,
    max_value: float,
    seed: int,
) -> Iterator[ShiftError]:
    """Estimate and truth of each shift; both leave out the pixels that have no label."""
    for index, perturbation in enumerate(domain_shifts(styles)):
        expected, truth = torch.zeros(1), None
        for place, (image, label) in enumerate(pairs):
            _, generator = next(iter(seeded([perturbation], seed + index, place)))
            known = label != IGNORE
            size = (image.shape[-2], image.shape[-1])
            scores = perturbation.invert(score(perturbation.apply(image, max_value, generator)), size)[:, known]
            expected = expected + _expected(calibrator, scores)
            one = Confusion.of(scores.argmax(0), label[known], len(scores))
            truth = one if truth is None else truth + one
        if truth is not None and truth.pixels:
            yield ShiftError(name=perturbation.name, estimate=expected_miou(expected), truth=truth.miou)


def _spread(counts: Sequence[Tensor], seed: int) -> float:
    """Standard deviation of the mIoU of summed counts over which pictures were looked at (bootstrap)."""
    stack, random = torch.stack(list(counts)), np.random.default_rng(seed)
    picks = random.integers(0, len(stack), (DRAWS, len(stack)))
    return float(np.std([expected_miou(stack[torch.from_numpy(pick)].sum(0)) for pick in picks]))


@torch.inference_mode(mode=False)
@torch.enable_grad()
def _fitted(scores: Tensor, label: Tensor, *, classwise: bool) -> Calibrator:
    """The temperature, and constants, of least negative log-likelihood."""
    scores, label = scores.clone(), label.clone()  # tensors of inference mode take no part in gradients
    log = torch.zeros((), dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(len(scores), dtype=torch.float64, requires_grad=classwise)
    wanted = [log, bias] if classwise else [log]
    optimizer = torch.optim.LBFGS(wanted, max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> float:
        optimizer.zero_grad()
        shrunk = 1e-3 * (bias**2).sum()
        loss = F.cross_entropy((scores * (-log).exp() + bias[:, None]).T, label) + shrunk
        torch.autograd.backward(loss)
        return float(loss.detach())

    if len(label):
        optimizer.step(closure)  # type: ignore[no-untyped-call]
    temperature = min(max(math.exp(float(log.detach())), 0.05), 20.0)
    return Calibrator(temperature, bias.detach())


def _loss(probability: Tensor, label: Tensor) -> float:
    chosen = probability.gather(0, label[None])[0]
    return float(-chosen.clamp_min(1e-12).log().mean())


__all__ = [
    "Calibrator",
    "Estimate",
    "ShiftError",
    "calibrate",
    "estimate",
    "expected_confusion",
    "expected_miou",
    "interval",
]
