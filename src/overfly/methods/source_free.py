"""Self-training from a trained network alone, where the source's imagery cannot be had."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from overfly.core.records import Batch, Losses
from overfly.core.spec import NonNegative, Share
from overfly.methods.cbst import ThresholdNetworks
from overfly.methods.method import Method, named
from overfly.ops.colour import ColourJitter, GaussianBlur, Strong, recoloured
from overfly.ops.freezing import freeze_unreached
from overfly.ops.information import diversity
from overfly.ops.losses import mean_entropy
from overfly.ops.teacher import follow, keep_above, moved, pseudo_label, surest


class SourceFree(Method[ThresholdNetworks], name="source_free"):
    """Strong views of target images must get the teacher's surest labels of every class, without any source image.

    A mean teacher (Tarvainen and Valpola, 2017, arXiv:1703.01780) with class-balanced pseudo-labels (Zou et al., 2018)
    and information maximisation (Liang et al., 2020, arXiv:2002.08546): each prediction sure, and all together varied,
    so that training does not end in one class. A head for boundaries stays as it was: there are no true ones to learn
    from. The teacher is what is deployed.
    """

    needs_source: ClassVar[bool] = False
    needs_start: ClassVar[bool] = True

    ema: Share = 0.99
    """Share of the teacher that is kept at every step."""
    share: Share = 0.5
    """Share of each class's pixels, the surest, that is learnt from."""
    keep: Share = 0.9
    """Share of the old thresholds that is kept at every step."""
    strong: Strong = (ColourJitter(p=0.8), GaussianBlur(p=0.5, low=0.15, high=1.15))
    """What is done to the colours of the student's views."""
    information: NonNegative = 0.1
    """Weight of information maximisation: mean entropy less the entropy of the mean prediction, plus 1."""

    def networks(self, student: nn.Module) -> ThresholdNetworks:
        """The student, its boundary head frozen, and its teacher."""
        nets = ThresholdNetworks(student)
        freeze_unreached(
            student, nets.segmenter.bands, lambda logits: (logits.main, *(logits.aux if self.criterion.aux else ()))
        )
        return nets

    def losses(self, nets: ThresholdNetworks, batch: Batch) -> Losses:
        """The criterion on strong views with kept pseudo-labels, and information maximisation."""
        pseudo = pseudo_label(nets.teacher(batch.target).main, batch.blank)
        found = surest(pseudo, self.share, len(nets.thresholds))
        nets.thresholds.copy_(moved(nets.thresholds, found, self.keep))
        kept = keep_above(pseudo, nets.thresholds)
        logits = nets.student(recoloured(batch.target, self.strong, nets.segmenter.peak))
        measured = batch.measured
        information = mean_entropy(logits.main, measured) - diversity(logits.main, measured) + 1
        return {
            **named("target", self.imitated(logits, kept)),
            "information": self.information * information,
        }

    def after_step(self, nets: ThresholdNetworks, step: int) -> None:  # noqa: ARG002 - the teacher is never young
        """The teacher, trained already, follows the student from the first step on."""
        follow(nets.teacher, nets.student, self.ema)
        nets.steps += 1

    def deployed(self, nets: ThresholdNetworks) -> nn.Module:
        """The teacher."""
        return nets.teacher
