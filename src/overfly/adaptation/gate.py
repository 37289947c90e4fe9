"""Checks of candidates without target labels, and the choice among those that pass.

The checks that reject look for a lost source and for collapse. Everything else is a warning with its value: as bounds,
agreement, consistency, familiarity and reverse validation had rejected good candidates (docs/adr/0013-consensus.md).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from overfly.core.errors import RecipeError
from overfly.core.progress import percent
from overfly.core.settings import set_value, validation_message
from overfly.core.spec import Share, Spec
from overfly.evaluation.confusion import Confusion
from overfly.evaluation.label_free_metrics import MIN_CONSENSUS, LabelFreeMetrics
from overfly.evaluation.perturbations import GEOMETRIC

CLASS_SHARE = 1e-3
"""Least share of the pixels for a class to count as predicted."""
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
    lower it."""
    min_classes: Share = 0.5
    """Least share of the classes that source only predicts on the target which a candidate predicts too."""
    min_agreement: Share = 0.25
    """Warns: least mIoU between the predictions on the target before and after adaptation."""
    min_consistency_gain: float = Field(default=0.0, ge=-1, le=1)
    """Warns: least gain of `geometric_consistency` on the target."""
    min_familiarity: Share = 0.65
    """Warns: least `familiarity` of the target to source only."""
    min_reverse_validation: Share = 0.5
    """Warns: least reverse validation of source only's predictions on the target."""

    def checks(self, before: LabelFreeMetrics, after: LabelFreeMetrics) -> tuple[Check, ...]:
        """The checks of a candidate.

        Args:
            before: metrics of source only.
            after: metrics of the candidate on the same images, its ``agreement`` with source only.
        """
        consistent = geometric_consistency(before) + self.min_consistency_gain
        checks = [
            Check(name="nuclear norm", value=after.nuclear_norm, bound=before.nuclear_norm - self.max_confidence_loss),
            Check(name="classes", value=_shared_classes(before, after), bound=self.min_classes),
            Check(name="consistency", value=geometric_consistency(after), bound=consistent, rejects=False),
        ]
        if before.source_miou is not None and after.source_miou is not None:
            bound = max(0.0, before.source_miou - self.max_source_loss)
            checks.insert(0, Check(name="source mIoU", value=after.source_miou, bound=bound))
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
    """Read bounds such as ``max_source_loss=0.1``; the others keep their defaults.

    Raises:
        RecipeError: a bound is unknown or out of range.
    """
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


def _shared_classes(before: LabelFreeMetrics, after: LabelFreeMetrics) -> float:
    """Share of the classes predicted before that are predicted after, too."""
    pairs = [now for share, now in zip(before.shares, after.shares, strict=True) if share >= CLASS_SHARE]
    return sum(now >= CLASS_SHARE for now in pairs) / max(1, len(pairs))


def select(
    baseline: str, agreements: Mapping[str, Sequence[Confusion]]
) -> tuple[str, dict[str, float], dict[str, float]]:
    """Select the network whose predictions agree most with the mean prediction of all (after Hu et al., 2023, EnsV).

    Args:
        baseline: name of the network before adaptation; selected if there are fewer than `MIN_CONSENSUS` networks.
        agreements: for each network and target image, the confusion matrix of its prediction with the mean prediction
            of all (`overfly.evaluation.label_free_metrics.consensus`).

    Returns:
        The name; the agreement of each network as class-balanced mIoU; and for each but the baseline the share of
        bootstrap samples of the images in which it agrees more than the baseline.
    """
    counts = {name: np.stack([pair.counts.numpy() for pair in pairs]) for name, pairs in agreements.items() if pairs}
    if len(counts) < MIN_CONSENSUS:
        return baseline, {}, {}
    images = len(counts[baseline])
    draws = np.random.default_rng(0).multinomial(images, np.full(images, 1 / images), BOOTSTRAP_SAMPLES)
    samples = {name: _balanced_mious(np.tensordot(draws, stack, 1)) for name, stack in counts.items()}
    scores = {name: float(_balanced_mious(stack.sum(0))) for name, stack in counts.items()}
    better = {name: float(np.mean(each > samples[baseline])) for name, each in samples.items() if name != baseline}
    return max(scores, key=lambda name: scores[name]), scores, better


def _balanced_mious(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Mean IoU (...) of confusion matrices (..., K, K); classes in neither prediction count as 0."""
    hits = np.diagonal(counts, axis1=-2, axis2=-1)
    union = counts.sum(-1) + counts.sum(-2) - hits
    return np.asarray((hits / np.maximum(union, 1)).mean(-1))


def geometric_consistency(metrics: LabelFreeMetrics) -> float:
    """Mean class-balanced consistency under the geometric perturbations, 0 to 1.

    Candidates are compared by these alone: every recipe augments with rotations, flips and scales, while color changes,
    masking and pasting are augmentations of some methods only, whose networks are more consistent under them.
    """
    values = [value for name, value in metrics.by_view.items() if name in GEOMETRIC]
    return math.fsum(values) / max(1, len(values))


def familiarity(source: LabelFreeMetrics, target: LabelFreeMetrics) -> float:
    """Consistency and confidence of a network on the target, relative to held-out source images, 0 to 1.

    The product of two ratios, each at most 1: of geometric consistency, summed over the classes that the network
    predicts, and of the nuclear norm. Classes that it predicts on the source only therefore lower the first. Masking
    and color changes are left out: consistency under them depends on how uniform the ground is, and on the
    augmentation that the network was trained with.

    Args:
        source: metrics on held-out images of the domain that the network was trained on, over the classes it predicts.
        target: metrics on the target, over the classes it predicts.
    """
    on_source, on_target = (
        geometric_consistency(domain) * sum(share > 0 for share in domain.shares) for domain in (source, target)
    )
    ratios = ((on_target, on_source), (target.nuclear_norm, source.nuclear_norm))
    return math.prod(min(1.0, value / reference) if reference else 1.0 for value, reference in ratios)
