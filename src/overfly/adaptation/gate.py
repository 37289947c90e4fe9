"""Do no harm: whether a network that was adapted without labels may take the place of the one it came from.

Adaptation often ends worse than where it began, and no single label-free figure shows it: a network that has exchanged
two classes is as sure and as consistent as before, one that has collapsed is surer. So the gate asks several questions,
each against the network before adaptation, and one answer against it is enough to refuse. One more is asked of that
network alone: whether the target shows what it has learned at all. Since it is as unsteady where it is bad as where the
pictures are strange, one is asked too who learns from what it says (`overfly.adaptation.reverse_validation`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from overfly.core.spec import Share, Spec
from overfly.evaluation.label_free_metrics import LabelFreeMetrics
from overfly.evaluation.perturbations import geometric

STRANGE = (
    "the target may show other things than the classes, or lack some; if you have looked and it shows them, say "
    "--skip-familiarity"
)
GEOMETRIC = tuple(view.name for view in geometric())


class Gate(Spec):
    """What a network must hold to take the place of the one before adaptation."""

    source_loss: Share = 0.05
    """mIoU on the source's held-out labels that may be lost: the network is to work in both places."""
    agreement: Share = 0.25
    """Least mIoU between its predictions on the target and those before adaptation, over the classes that either says.
    Adaptation mends a part of the picture; where more than this has changed, classes were lost or exchanged, or the
    network before was very bad."""
    known: Share = 0.38
    """How well the network before adaptation must know the target: how familiar it is (`familiarity`) times what its
    labels of it teach of the source's classes (`overfly.adaptation.reverse_validation`). Pictures that show other
    things than the classes turn any adaptation into invention."""
    familiar: Share = 0.65
    """How familiar it must be, instead, where the latter cannot be asked. 0 where somebody has looked: then nobody asks
    what the target shows."""
    sureness: Share = 0.05
    """Nuclear norm of its probabilities on the target, from sure and of many classes down to unsure or of few, that may
    be lost. Labels that contradict each other leave a network unsure, however consistent it is."""
    margin: Share = 0.02
    """How much more consistent, on average under cover and under other views, it must be on the target. Self-training
    that won gained 2.6 points and more of it in nearly all cases; three networks that won gained about 1, and are
    refused, since as much comes from any further training."""
    alike: Share = 0.02
    """Difference in `geometric_consistency` on the target below which two networks count as equal."""

    def rejections(self, before: LabelFreeMetrics, after: LabelFreeMetrics) -> tuple[str, ...]:
        """What speaks against a network, as sentences; empty where nothing does.

        Args:
            before: figures of the network before adaptation.
            after: figures of the adapted one on the same pictures, its ``agreement`` taken with that network.
        """
        found = []
        if before.source_miou is not None and after.source_miou is not None:
            lost = before.source_miou - after.source_miou
            if lost > self.source_loss:
                found.append(
                    f"it loses {100 * lost:.1f} points of mIoU on the source's held-out labels, more than "
                    f"{100 * self.source_loss:g}"
                )
        if after.agreement is not None and after.agreement < self.agreement:
            found.append(
                f"on the target it agrees with the network before adaptation by {100 * after.agreement:.1f} % mIoU "
                f"alone, less than {100 * self.agreement:g}"
            )
        if (unsure := before.nuclear_norm - after.nuclear_norm) > self.sureness:
            found.append(
                f"on the target it is less sure of its classes, or of fewer, than the network before adaptation, by "
                f"{100 * unsure:.1f} points of nuclear norm, more than {100 * self.sureness:g}"
            )
        gained = consistency(after) - consistency(before)
        if gained <= self.margin:
            found.append(
                f"its predictions on the target are not clearly more consistent ({100 * consistency(after):.1f} % mIoU "
                f"under cover and other views, {100 * consistency(before):.1f} before)"
            )
        return tuple(found)

    def unfamiliar(self, familiar: float | None, reverse_validation: float | None = None) -> tuple[str, ...]:
        """What speaks against any adaptation to these pictures, as a sentence.

        Args:
            familiar: how familiar the target is to the network before adaptation; none: nobody can tell.
            reverse_validation: what its labels of the target teach of the source's classes; none: nobody can tell.
        """
        if familiar is None or not self.familiar:
            return ()
        share = f"{100 * familiar:.1f} % as familiar to the network before adaptation as the source's"
        if reverse_validation is None:
            few = f"the target's pictures are only {share}, less than {100 * self.familiar:g}: {STRANGE}"
            return (few,) if familiar < self.familiar else ()
        if (known := familiar * reverse_validation) >= self.known:
            return ()
        return (
            f"the target's pictures are {share}, and its labels of them teach {100 * reverse_validation:.1f} % of what "
            f"the source's own labels teach of its classes, {100 * known:.1f} % together, less than "
            f"{100 * self.known:g}: {STRANGE}",
        )

    def refusals(
        self,
        before: str,
        metrics: Mapping[str, LabelFreeMetrics],
        familiar: float | None = None,
        reverse_validation: float | None = None,
    ) -> dict[str, tuple[str, ...]]:
        """What speaks against each network but the one before adaptation, as sentences; empty where nothing does.

        Args:
            before: name of the network before adaptation.
            metrics: of all networks, by name.
            familiar: how familiar the target is to the network before adaptation; none: nobody can tell.
            reverse_validation: what its labels of the target teach of the source's classes; none: nobody can tell.
        """
        unfamiliar = self.unfamiliar(familiar, reverse_validation)
        return {
            name: unfamiliar + self.rejections(metrics[before], each)
            for name, each in metrics.items()
            if name != before
        }


def select(before: str, metrics: Mapping[str, LabelFreeMetrics], alike: float) -> str:
    """Of networks that nothing speaks against, the first that is about as steady on the target as the steadiest.

    Args:
        before: name of the network before adaptation; returned where there is no other.
        metrics: of the networks that nothing speaks against, by name, what to prefer where they are alike first.
        alike: difference in steadiness below which networks are; `Gate.alike`.
    """
    steady = {name: geometric_consistency(each) for name, each in metrics.items() if name != before}
    most = max(steady.values(), default=0.0)
    return next((name for name, found in steady.items() if most - found < alike), before)


def geometric_consistency(metrics: LabelFreeMetrics) -> float:
    """Mean class-balanced consistency under the geometric views, 0 to 1.

    Networks are only compared fairly by what all of them were taught alike. Methods differ in what they teach to
    ignore: one changes colors, another covers or pastes, and each then stands firm under its own. Turns, mirrors and
    sizes are taught by every recipe's augmentation, and change no pixel's value.
    """
    return math.fsum(metrics.by_view[name] for name in GEOMETRIC) / len(GEOMETRIC)


def consistency(metrics: LabelFreeMetrics) -> float:
    """Mean of class-balanced consistency under cover and under other views, 0 to 1."""
    return (metrics.masked_miou + metrics.views_miou) / 2


def familiarity(home: LabelFreeMetrics, away: LabelFreeMetrics) -> float:
    """How steady and sure of many classes a network is away, as a share of what it is at home, 0 to 1.

    The product of two shares, neither counted above 1: of `geometric_consistency` and of the nuclear norm.
    Under cover a network is steadier the plainer the ground, and under changed colors the more it was taught to
    ignore them, whatever is shown; so these are left out.

    Args:
        home: figures of a network on held-out pictures of the domain it learned from.
        away: its figures elsewhere.
    """
    shares = ((geometric_consistency(away), geometric_consistency(home)), (away.nuclear_norm, home.nuclear_norm))
    return math.prod(min(1.0, there / here) if here else 1.0 for there, here in shares)


__all__ = ["Gate", "consistency", "familiarity", "geometric_consistency", "select"]
