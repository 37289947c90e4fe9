"""Checks of candidates without target labels, and how surely one is better than source only.

The checks that reject look for a lost source and for collapse. Everything else is a warning with its value: as bounds,
agreement, consistency, familiarity and reverse validation had rejected good candidates (docs/adr/0013-selection.md).
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, ValidationError
from torch import Tensor

from overfly.core.errors import RecipeError
from overfly.core.progress import percent
from overfly.core.settings import set_value, validation_message
from overfly.core.spec import Share, Spec
from overfly.evaluation.label_free_metrics import LabelFreeMetrics
from overfly.evaluation.scores import Confusion, kappa

CLASS_SHARE = 1e-3
"""Least share of the pixels for a class to count as predicted."""
UNSURE = (0.2, 0.8)
"""Between these values of `share_better` a recommendation without labels is unsure."""
BOOTSTRAP_SAMPLES = 1000
"""Bootstrap samples of the target images."""


class Check(Spec):
    """One check of a candidate: a value and its lower bound."""

    name: str
    """Name of the value."""
    value: float
    """The value, as a share."""
    bound: float
    """The least accepted value, as a share."""
    rejects: bool = True
    """True if a failed check rejects the candidate; False if it is a warning."""

    @property
    def passed(self) -> bool:
        """Whether the value reaches the bound."""
        return self.value >= self.bound

    @property
    def cell(self) -> str:
        """The value in percent, marked x if it rejects and ! if it warns."""
        return percent(self.value, 1) + ("" if self.passed else " x" if self.rejects else " !")

    def __str__(self) -> str:
        return f"{self.name} is {percent(self.value, 1)} %, less than {percent(self.bound, 1)} %"


class Gate(Spec):
    """Bounds of the checks. The first three reject a candidate, the others warn."""

    max_source_loss: Share = 0.05
    """Largest loss of mIoU on the source's held-out labels, each network with the source's statistics."""
    max_confidence_loss: Share = 0.15
    """Largest loss of the nuclear norm of the probabilities on the target. Contradictory pseudo-labels and collapse
    lower it. Without source labels, which reveal most of these, no loss is accepted."""
    min_classes: Share = 0.5
    """Least share of the classes that source only predicts on the target which a candidate predicts too."""
    min_agreement: Share = 0.25
    """Warns: least mIoU between the predictions on the target before and after adaptation."""
    min_consistency_gain: float = Field(default=0.0, ge=-1, le=1)
    """Warns: least gain of consistency on the target."""
    min_familiarity: Share = 0.65
    """Warns: least `familiarity` of the target to source only."""
    min_reverse_validation: Share = 0.5
    """Warns: least reverse validation of source only's predictions on the target."""

    def checks(self, before: LabelFreeMetrics, after: LabelFreeMetrics) -> tuple[Check, ...]:
        """The checks of a candidate: metrics of source only, and its own with ``agreement`` on the same images."""
        consistent = before.consistency + self.min_consistency_gain
        loss = 0.0 if before.source_miou is None else self.max_confidence_loss
        predicted = [now for share, now in zip(before.shares, after.shares, strict=True) if share >= CLASS_SHARE]
        shared = sum(now >= CLASS_SHARE for now in predicted) / max(1, len(predicted))
        checks = [
            Check(name="nuclear norm", value=after.nuclear_norm, bound=before.nuclear_norm - loss),
            Check(name="classes", value=shared, bound=self.min_classes),
            Check(name="consistency", value=after.consistency, bound=consistent, rejects=False),
        ]
        if before.source_statistics_miou is not None and after.source_statistics_miou is not None:
            bound = max(0.0, before.source_statistics_miou - self.max_source_loss)
            checks.insert(0, Check(name="source mIoU", value=after.source_statistics_miou, bound=bound))
        if after.agreement is not None:
            checks.append(Check(name="agreement", value=after.agreement, bound=self.min_agreement, rejects=False))
        return tuple(checks)

    def target_checks(self, familiarity: float | None, reverse_validation: float | None) -> tuple[Check, ...]:
        """Warnings about the target: whether it looks like images of the source's classes; None is not checked."""
        values = {
            "familiarity": (familiarity, self.min_familiarity),
            "reverse validation": (reverse_validation, self.min_reverse_validation),
        }
        return tuple(
            Check(name=name, value=value, bound=bound, rejects=False)
            for name, (value, bound) in values.items()
            if value is not None
        )


def read_gate(settings: Sequence[str]) -> Gate:
    """Read bounds such as ``max_source_loss=0.1``; raise `RecipeError` if one is unknown or out of range."""
    values: dict[str, Any] = {}
    for setting in settings:
        set_value(values, setting)
    try:
        return Gate.model_validate(values)
    except ValidationError as error:
        raise RecipeError(validation_message(error, "--gate", Gate)) from None


def passes(checks: Sequence[Check]) -> bool:
    """Whether no failed check rejects."""
    return all(check.passed for check in checks if check.rejects)


class ImageCounts(NamedTuple):
    """Confusion matrices of a candidate, one per image, that its score is computed from."""

    views: Sequence[Sequence[Confusion]]
    """For each perturbation and target image: the predictions with and without it."""
    source: Sequence[Confusion]
    """For each held-out source image: labels and predictions; empty without labels."""


def share_better(baseline: ImageCounts, candidate: ImageCounts) -> float:
    """Share of bootstrap samples of the images in which a candidate's `LabelFreeMetrics.score` is higher, 0 to 1.

    Target and source images are sampled separately; both networks are compared on the same samples.
    """
    generator = np.random.default_rng(0)
    samples = [bootstrap_samples(count, generator) for count in (len(baseline.views[0]), len(baseline.source))]
    return float(np.mean(_scores(candidate, *samples) > _scores(baseline, *samples)))


def _scores(counts: ImageCounts, target: NDArray[np.int64], source: NDArray[np.int64]) -> NDArray[np.float64]:
    """Scores (S,) of samples (S, images), which hold how often each image was drawn."""
    views = [sampled_counts(target, view) for view in counts.views]
    consistency = torch.stack([kappa(view).nan_to_num(0.0).clamp_min(0) for view in views]).mean(0)
    if counts.source:
        return np.asarray((consistency + ious(sampled_counts(source, counts.source)).nanmean(1)) / 2)
    return np.asarray((consistency + torch.stack([ious(view).nan_to_num(0.0).mean(1) for view in views]).mean(0)) / 2)


def bootstrap_samples(count: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """How often each of ``count`` images is drawn in `BOOTSTRAP_SAMPLES` samples (S, count); empty for no images."""
    shares = np.full(count, 1 / max(1, count))
    return generator.multinomial(count, shares, BOOTSTRAP_SAMPLES) if count else np.empty(0, np.int64)


def ious(counts: Tensor) -> Tensor:
    """IoU (S, K) of confusion matrices (S, K, K); NaN for classes in neither side."""
    hits = counts.diagonal(dim1=-2, dim2=-1)
    return torch.as_tensor(hits / (counts.sum(-1) + counts.sum(-2) - hits))


def sampled_counts(samples: NDArray[np.int64], pairs: Sequence[Confusion]) -> Tensor:
    """Confusion matrices (S, K, K) of samples (S, images)."""
    counts = torch.stack([pair.counts for pair in pairs]).double()
    return torch.as_tensor(torch.tensordot(torch.as_tensor(samples).double(), counts, 1))


def familiarity(source: LabelFreeMetrics, target: LabelFreeMetrics) -> float:
    """Consistency and confidence of a network on the target, relative to held-out source images, 0 to 1.

    The product of two ratios, each at most 1: of consistency and of the nuclear norm. Masking and color changes are
    left out: consistency under them depends on how uniform the ground is, and on the augmentation that the network was
    trained with.
    """
    ratios = ((target.consistency, source.consistency), (target.nuclear_norm, source.nuclear_norm))
    return math.prod(min(1.0, value / reference) if reference else 1.0 for value, reference in ratios)
