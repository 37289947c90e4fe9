"""CBST: class-balanced self-training (Zou et al., 2018, arXiv:1810.07911)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from overfly.core.records import Batch, Losses
from overfly.core.spec import Count, NonNegative, Share
from overfly.methods.method import Method, TeacherStudent, named
from overfly.ops.normalization import together
from overfly.ops.pseudo_labels import follow, keep_above, moved, pseudo_label, rising, surest


class ThresholdNetworks(TeacherStudent):
    """Student and teacher, the steps that are done, and the threshold of each class."""

    steps: Tensor
    thresholds: Tensor

    def __init__(self, student: nn.Module, begin: float = 0.0) -> None:
        super().__init__(student)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("thresholds", torch.full((len(self.segmenter.classes),), begin))


class CBST(Method[ThresholdNetworks], name="cbst"):
    """Learn from the surest share of every class's pseudo-labels, a share that grows (Zou et al., 2018).

    One threshold for all classes would keep the easy ones alone. The paper labels the whole target anew in rounds; here
    a teacher follows the student at every step, and thresholds are moving averages over batches, so that more than the
    share is kept of a class that few batches show. Source and target go through the student in one pass. The teacher is
    what is deployed.
    """

    needs_start: ClassVar[bool] = True

    ema: Share = 0.99
    """Share of the teacher that is kept at every step."""
    share: Share = 0.2
    """Share of each class's pixels that is kept at the beginning."""
    final: Share = 0.5
    """Share that is kept at the end of the rise."""
    rise: Count = 2000
    """Steps over which the share goes from the first to the last, in a line."""
    keep: Share = 0.9
    """Share of the old thresholds that is kept at every step; 0: those of the batch alone."""
    weight: NonNegative = 1.0
    """Weight of the pseudo-labels' terms."""

    def networks(self, student: nn.Module) -> ThresholdNetworks:
        """The student and its teacher; no class has been met."""
        return ThresholdNetworks(student)

    def losses(self, nets: ThresholdNetworks, batch: Batch) -> Losses:
        """The criterion on the source, and on the target's surest pseudo-labels."""
        pseudo = pseudo_label(nets.teacher(batch.target).main, batch.nodata_mask)
        found = surest(pseudo, self.share_at(int(nets.steps)), len(nets.thresholds))
        nets.thresholds.copy_(moved(nets.thresholds, found, self.keep))
        kept = keep_above(pseudo, nets.thresholds)
        source, target = together(nets.student, batch.source.image, batch.target)
        return {
            **named("source", self.supervised(source, batch.source.label)),
            **named("target", self.imitated(target, kept), self.weight),
        }

    def share_at(self, step: int) -> float:
        """Share of each class's pixels that is kept at a step."""
        return rising(self.share, self.final, self.rise, step)

    def after_step(self, nets: ThresholdNetworks, step: int) -> None:
        """The teacher follows the student."""
        follow(nets.teacher, nets.student, self.ema, step)
        nets.steps += 1

    def deployed(self, nets: ThresholdNetworks) -> nn.Module:
        """The teacher."""
        return nets.teacher
