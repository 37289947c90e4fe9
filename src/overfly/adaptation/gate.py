"""Accept or reject adapted networks without target labels, by comparison with the network before adaptation.

No single label-free metric detects every failure: a network with two classes exchanged is as confident and consistent
as before, and a collapsed one even more. The gate combines several checks; one failed check rejects a candidate.
Two more checks concern the target images: the familiarity to the network before adaptation, and the reverse validation
of its predictions (`overfly.adaptation.reverse_validation`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated

from pydantic import Field

from overfly.core.progress import percent
from overfly.core.spec import Share, Spec
from overfly.evaluation.label_free_metrics import LabelFreeMetrics
from overfly.evaluation.perturbations import geometric_perturbations

UNFAMILIAR = (
    "the target may show other objects than the source's classes, or lack some; if you have checked that it shows "
    "them, pass --skip-familiarity"
)
GEOMETRIC = tuple(perturbation.name for perturbation in geometric_perturbations())


class Gate(Spec):
    """Bounds that a candidate must meet to be accepted."""

    max_source_loss: Share = 0.05
    """Largest accepted loss of mIoU on the source's held-out labels."""
    min_agreement: Share = 0.25
    """Least mIoU between the predictions on the target before and after adaptation, over the classes that either
    predicts. Below it, classes were lost or exchanged, or the network before adaptation was very bad."""
    min_reverse_familiarity: Share = 0.38
    """Least product of `familiarity` and `overfly.adaptation.reverse_validation`, both of the network before
    adaptation. Images that show other objects than the classes cannot be adapted to."""
    min_familiarity: Share = 0.65
    """Least familiarity if reverse validation is not available."""
    max_confidence_loss: Share = 0.05
    """Largest accepted loss of the nuclear norm of the probabilities on the target. Contradictory pseudo-labels lower
    it even if predictions are consistent."""
    min_consistency_gain: Annotated[float, Field(ge=-1, le=1)] = 0.02
    """Gain of `consistency` on the target that must be exceeded. Nearly all networks that self-training improved gained
    2.6 points or more; three gained about 1 and are rejected, since any further training gains as much."""
    tolerance: Share = 0.02
    """Difference in `geometric_consistency` on the target below which two networks count as equal."""
    skip_familiarity: bool = False
    """Skip familiarity and reverse validation, for target images that a user has checked."""

    def rejections(self, before: LabelFreeMetrics, after: LabelFreeMetrics) -> tuple[str, ...]:
        """Reasons to reject a network; empty if it is accepted.

        Args:
            before: metrics of the network before adaptation.
            after: metrics of the adapted network on the same images, its ``agreement`` with the former.
        """
        reasons = []
        if before.source_miou is not None and after.source_miou is not None:
            loss = before.source_miou - after.source_miou
            if loss > self.max_source_loss:
                reasons.append(
                    f"source mIoU falls by {percent(loss, 1)} points, more than {percent(self.max_source_loss, 1)}"
                )
        if after.agreement is not None and after.agreement < self.min_agreement:
            reasons.append(
                f"agreement with source only on the target is {percent(after.agreement, 1)} % mIoU, less "
                f"than {percent(self.min_agreement, 1)} %"
            )
        loss = before.nuclear_norm - after.nuclear_norm
        if loss > self.max_confidence_loss:
            reasons.append(
                f"confidence on the target (nuclear norm) falls by {percent(loss, 1)} points, more than "
                f"{percent(self.max_confidence_loss, 1)}"
            )
        gain = consistency(after) - consistency(before)
        if gain <= self.min_consistency_gain:
            reasons.append(
                f"consistency on the target changes from {percent(consistency(before), 1)} to "
                f"{percent(consistency(after), 1)} % mIoU, a gain of {percent(gain, 1)} points; more than "
                f"{percent(self.min_consistency_gain, 1)} is required"
            )
        return tuple(reasons)

    def unfamiliar(self, familiarity: float | None, reverse_validation: float | None = None) -> tuple[str, ...]:
        """Reasons to reject every adaptation to the target images; empty if there are none.

        Args:
            familiarity: of the target to the network before adaptation; None: unknown.
            reverse_validation: score of the network's predictions on the target; None: unknown.
        """
        if familiarity is None or self.skip_familiarity:
            return ()
        if reverse_validation is None:
            if familiarity >= self.min_familiarity:
                return ()
            return (
                f"familiarity of the target is {percent(familiarity, 1)} %, less than "
                f"{percent(self.min_familiarity, 1)} %: {UNFAMILIAR}",
            )
        product = familiarity * reverse_validation
        if product >= self.min_reverse_familiarity:
            return ()
        return (
            f"familiarity of the target is {percent(familiarity, 1)} % and its reverse validation "
            f"{percent(reverse_validation, 1)} %; their product, {percent(product, 1)} %, is less than "
            f"{percent(self.min_reverse_familiarity, 1)} %: {UNFAMILIAR}",
        )

    def all_rejections(
        self,
        baseline: str,
        metrics: Mapping[str, LabelFreeMetrics],
        familiarity: float | None = None,
        reverse_validation: float | None = None,
    ) -> dict[str, tuple[str, ...]]:
        """Reasons to reject each network except the one before adaptation; empty for accepted networks.

        Args:
            baseline: name of the network before adaptation.
            metrics: of all networks, by name.
            familiarity: see `unfamiliar`.
            reverse_validation: see `unfamiliar`.
        """
        unfamiliar = self.unfamiliar(familiarity, reverse_validation)
        return {
            name: unfamiliar + self.rejections(metrics[baseline], candidate)
            for name, candidate in metrics.items()
            if name != baseline
        }


def select(baseline: str, metrics: Mapping[str, LabelFreeMetrics], tolerance: float) -> str:
    """Name of the first accepted network within ``tolerance`` of the highest geometric consistency on the target.

    Args:
        baseline: name of the network before adaptation; returned if there is no other.
        metrics: of the accepted networks, by name, preferred ones first.
        tolerance: `Gate.tolerance`.
    """
    values = {name: geometric_consistency(candidate) for name, candidate in metrics.items() if name != baseline}
    highest = max(values.values(), default=0.0)
    return next((name for name, value in values.items() if highest - value < tolerance), baseline)


def geometric_consistency(metrics: LabelFreeMetrics) -> float:
    """Mean class-balanced consistency under the geometric perturbations, 0 to 1.

    Candidates are compared by these alone: every recipe augments with rotations, flips and scales, while color changes,
    masking and pasting are augmentations of some methods only, whose networks are more consistent under them.
    """
    return math.fsum(metrics.by_view[name] for name in GEOMETRIC) / len(GEOMETRIC)


def consistency(metrics: LabelFreeMetrics) -> float:
    """Mean of class-balanced consistency under masking and under mild perturbations, 0 to 1."""
    return (metrics.masked_miou + metrics.views_miou) / 2


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
