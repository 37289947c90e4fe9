"""Label-free figures of a network on unlabeled pictures: what to choose by where nobody has labels.

Every figure is signed so that higher is better, and none proves anything by itself. How collapse shows, the commonest
failure of adaptation: a network that says one class everywhere, surely, has the best entropy (0), the best pixel
agreement under any view (1) and the highest soft neighborhood density there is; while its information is 0, its BNM
falls to 1/√K, its diversity to 0, and its class-balanced consistency to 1/K, since a class that is never predicted
counts as 0. A network whose classes are exchanged with each other shows in none of these: only the source's labels and
agreement with the network before adaptation tell.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Literal, get_args

import torch
from torch import Generator, Tensor, nn

from overfly.core.spec import Share, Spec, Whole
from overfly.data.domain import Domain, Split
from overfly.evaluation.confusion import Confusion
from overfly.evaluation.images import predict_scores, random_pixels, unlabeled_images
from overfly.evaluation.perturbations import Perturbation, masked, views
from overfly.evaluation.ranking import committee
from overfly.evaluation.score import evaluation_mode
from overfly.evaluation.scores import number
from overfly.ops.losses import distribution_entropy

Validator = Literal[
    "entropy", "information", "nuclear_norm", "snd", "agreement",
    "masked", "masked_miou", "views", "views_miou", "source_miou", "consensus",
]  # fmt: skip
VALIDATORS: tuple[Validator, ...] = get_args(Validator)
DEFAULT_VALIDATORS: tuple[Validator, ...] = ("consensus", "masked_miou", "views_miou", "source_miou")
"""Who votes by default. What all candidates say together is commonly better than any of them, and who is nearest to it
errs least in ways of its own; of fewer than three candidates there is no such thing. Class-balanced consistency of
two kinds tells whether predictions hang on what is seen and falls when classes are given up, but cannot tell whether
classes are called by their right names; source validation can, and knows nothing of the target. Left out: entropy,
density and plain pixel agreement, since collapse is their optimum; information and BNM, which reward an even mix of
classes, so that recalibrated statistics look best where they do most harm, evening out a mix that truly differs
between the domains; agreement, whose optimum is the reference itself."""
PIXELS = 512
"""Random pixels of each picture whose probabilities are kept for BNM."""
NEIGHBORS = 3072
"""Random pixels in all, over the pictures, that soft neighborhood density compares with each other."""


class LabelFreeMetrics(Spec):
    """What can be said of a network on pictures without labels; of every validator, higher is better."""

    entropy: float
    """Minus the mean entropy of a pixel's probabilities, as a share of ln K: -1 knows nothing, 0 is sure of all."""
    information: float
    """Entropy of the mean prediction minus mean entropy, as a share of ln K, 0 to 1: sure, and of many classes
    (Krause et al., 2010; Shi and Sha, 2012)."""
    nuclear_norm: Share
    """Nuclear norm of the probabilities of random pixels (N, K) over its bound √(N·min(N, K)) (Cui et al., 2020)."""
    snd: float | None
    """Soft neighborhood density of random pixels' probabilities, as a share of ln(N - 1) (Saito et al., 2021)."""
    agreement: Share | None
    """Mean IoU between its predictions and those of the reference, such as its teacher, over the classes that either
    of them says; none without a reference."""
    masked: Share
    """Share of pixels predicted as before when half of the picture is covered."""
    masked_miou: Share
    """Class-balanced mIoU between the predictions with and without cover."""
    views: Share
    """Share of pixels predicted as before when turned, scaled, recolored, blurred and with noise; mean over views."""
    views_miou: Share
    """Class-balanced mIoU between plain predictions and those of a view, turned back; mean over views."""
    source_miou: Share | None = None
    """mIoU on the source's held-out labels; none where nobody measured it."""
    consensus: Share | None = None
    """Class-balanced mIoU with what all candidates say together; none where they were not compared with each other."""
    diversity: float
    """Entropy of the shares of predicted classes, as a share of ln K: 0 for one class. Not a validator: the truth has a
    diversity of its own."""
    shares: tuple[Share, ...]
    """Share of pixels predicted as each class."""
    by_view: dict[str, Share]
    """Class-balanced mIoU with the plain prediction of each view."""
    images: Whole
    """Pictures that were looked at."""
    labels_opened: Whole = 0
    """Labels of these pictures that were read: none ever is."""

    def by_validator(self) -> dict[str, float | None]:
        """The figures that candidates are ranked by."""
        return {name: getattr(self, name) for name in VALIDATORS}


def label_free_metrics(
    network: nn.Module,
    domain: Domain,
    split: Split = "train",
    *,
    reference: nn.Module | None = None,
    limit: int | None = 24,
    crop: int | None = None,
    window: int | None = None,
    resize: int | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> LabelFreeMetrics:
    """Label-free figures of a network on fixed pictures of a domain; about ten forward passes of each.

    Args:
        network: images (B, C, H, W) in the sensor's range to `Logits` at their size; moved to ``device``, training or
            evaluation mode is as before afterwards.
        domain: whose pictures; labels are taken away from its items before anything is read.
        split: which pictures.
        reference: another network, such as the teacher, that its predictions are compared with.
        limit: pictures at most, evenly spread; None: all.
        crop: longest side that is cut from the middle of each picture; None: whole pictures.
        window: side of overlapping windows for pictures that are larger; None: the whole picture at once.
        resize: side of the square that pictures are first resized to.
        device: where the network runs.
        seed: of the fixed random draws: same seed, same figures. No global random state is read or changed.

    Raises:
        DataError: there are no pictures, or one cannot be read.
        NotFiniteError: the network gives scores that are not finite.
    """
    images = unlabeled_images(domain, split, limit=limit, resize=resize, crop=crop)
    return label_free_metrics_of_images(
        network, images, domain.max_value, reference=reference, window=window, device=device, seed=seed
    )


def label_free_metrics_of_images(
    network: nn.Module,
    images: Iterable[Tensor],
    max_value: float,
    *,
    reference: nn.Module | None = None,
    window: int | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> LabelFreeMetrics:
    """As `label_free_metrics`, of pictures (C, H, W) that are there already."""
    tally: Tally | None = None
    others = [network] if reference is None else [network, reference]
    for each in others:
        each.to(device)
    with evaluation_mode(nn.ModuleList(others)), torch.inference_mode():
        for place, image in enumerate(images):
            seen = image.to(device)
            plain = predict_scores(network, seen, window)
            tally = tally or Tally(len(plain))
            tally.plain(plain.softmax(0), seed, place)
            prediction = plain.argmax(0)
            if reference is not None:
                tally.compare("reference", prediction, predict_scores(reference, seen, window).argmax(0))
            for view, generator in drawn(chain([masked()], views()), seed, place):
                scores = predict_scores(network, view.alter(seen, max_value, generator), window)
                tally.compare(view.name, prediction, view.back(scores, (seen.shape[-2], seen.shape[-1])).argmax(0))
    if tally is None:
        raise ValueError("there is no picture to look at")
    return tally.metrics(seed)


def drawn(family: Iterable[Perturbation], seed: int, place: int) -> Iterable[tuple[Perturbation, Generator]]:
    """Each view with a generator of its own: a function of the seed, the picture's place and the view's."""
    for index, view in enumerate(family):
        yield view, torch.Generator().manual_seed((seed * 1_000_003 + place) * 1_009 + index)


class Tally:
    """What a look counts, picture by picture; memory does not grow with their size."""

    def __init__(self, classes: int) -> None:
        self.classes, self.images, self.pixels, self.entropy = classes, 0, 0, 0.0
        self.mean = torch.zeros(classes, dtype=torch.float64)
        self.predicted = torch.zeros(classes, dtype=torch.float64)
        self.samples: list[Tensor] = []
        self.confusions: dict[str, Confusion] = {}

    def plain(self, probability: Tensor, seed: int, place: int) -> None:
        """Count the probabilities (K, H, W) of a picture as it is."""
        flat = probability.flatten(1).double()
        self.images, self.pixels = self.images + 1, self.pixels + flat.shape[1]
        self.entropy += float(distribution_entropy(flat.T).sum())
        self.mean += flat.sum(1).cpu()
        self.predicted += torch.bincount(flat.argmax(0), minlength=self.classes).cpu()
        chosen = random_pixels(*probability.shape[1:], PIXELS, seed, place)
        self.samples.append(flat[:, chosen.to(flat.device)].T.cpu())

    def compare(self, name: str, plain: Tensor, other: Tensor) -> None:
        """Count two predictions (H, W) of the same pixels."""
        one = Confusion.of(other.cpu(), plain.cpu(), self.classes)
        self.confusions[name] = self.confusions[name] + one if name in self.confusions else one

    def metrics(self, seed: int = 0) -> LabelFreeMetrics:
        """What was found."""
        scale = math.log(max(self.classes, 2))
        mean, shares = self.mean / self.pixels, self.predicted / self.pixels
        certainty = self.entropy / self.pixels
        samples = torch.cat(self.samples)
        few = samples[random_pixels(1, len(samples), NEIGHBORS, seed)] if len(samples) > NEIGHBORS else samples
        pairs = dict(self.confusions)
        reference, cover = pairs.pop("reference", None), pairs.pop("masked")
        by_view = {name: balanced_miou(pair) for name, pair in pairs.items()}
        return LabelFreeMetrics(
            entropy=-certainty / scale,
            information=(float(distribution_entropy(mean)) - certainty) / scale,
            nuclear_norm=nuclear_norm(samples),
            snd=number(neighborhood_density(few)),
            agreement=None if reference is None else shared_miou(reference),
            masked=cover.accuracy,
            masked_miou=balanced_miou(cover),
            views=sum(pair.accuracy for pair in pairs.values()) / len(pairs),
            views_miou=sum(by_view.values()) / len(by_view),
            diversity=float(distribution_entropy(shares)) / scale,
            shares=tuple(shares.tolist()),
            by_view=by_view,
            images=self.images,
        )


def nuclear_norm(probability: Tensor) -> float:
    """Sum of the singular values of (N, K) over their largest possible sum √(N·min(N, K)), 0 to 1.

    1 when predictions are sure and of all classes alike; 1/√K when sure and all of one; 1/K when nothing is known
    (Cui et al., CVPR 2020: batch nuclear-norm maximization).
    """
    bound = math.sqrt(len(probability) * min(probability.shape))
    return min(1.0, float(torch.linalg.matrix_norm(probability.double(), "nuc")) / bound)


def neighborhood_density(probability: Tensor, temperature: float = 0.05, chunk: int = 1024) -> float:
    """Soft neighborhood density of rows (N, F): how many alike each has, 0 to 1 (Saito et al., ICCV 2021).

    The mean entropy of softmax(cosine similarity to all other rows / temperature), over ln(N - 1). Rows may be
    probabilities or features. It is 1 where all rows are equal: density alone cannot tell agreement from collapse.

    Args:
        probability: rows, N of 3 or more.
        temperature: 0.05 in the paper.
        chunk: rows whose similarities are held at once.

    Returns:
        NaN for fewer than 3 rows.
    """
    count = len(probability)
    if count < 3:
        return math.nan
    unit = torch.nn.functional.normalize(probability.float(), dim=1)
    total = 0.0
    for first in range(0, count, chunk):
        similar = unit[first : first + chunk] @ unit.T / temperature
        own = torch.arange(len(similar))
        similar[own, own + first] = -torch.inf
        total += float(distribution_entropy(similar.softmax(1)).double().sum())
    return total / count / math.log(count - 1)


def balanced_miou(pair: Confusion) -> float:
    """Mean IoU of two predictions over all K classes; a class that neither predicts counts as 0.

    So a constant network, which agrees with itself under every view, has 1/K and not 1: giving a class up costs what
    losing it would cost on the target. Where the target truly lacks a class, all candidates lose the same.
    """
    return float(pair.iou.nan_to_num(0.0).mean())


def shared_miou(pair: Confusion) -> float:
    """Mean IoU of two predictions over the classes that either of them says: 1 for a network and itself.

    A class that one says and the other has given up counts as 0. One that neither says is nothing to agree on: were it
    counted, who says three classes of five would agree with itself by 60 %.
    """
    return float(pair.iou.nanmean())


def elect(candidates: Sequence[LabelFreeMetrics], members: Sequence[str] = DEFAULT_VALIDATORS) -> list[float]:
    """The committee's verdict on some networks: mean rank over its members, 0 (last with all) to 1 (first with all)."""
    found: list[Mapping[str, float | None]] = [candidate.by_validator() for candidate in candidates]
    return committee(found, members)


__all__ = [
    "DEFAULT_VALIDATORS",
    "VALIDATORS",
    "LabelFreeMetrics",
    "Tally",
    "Validator",
    "balanced_miou",
    "elect",
    "label_free_metrics",
    "label_free_metrics_of_images",
    "neighborhood_density",
    "nuclear_norm",
    "shared_miou",
]
