"""IAST: instance-adaptive self-training (Mei et al., 2020, arXiv:2008.12197)."""

from __future__ import annotations

import math
from typing import ClassVar

from torch import nn

from overfly.core.records import IGNORE, Batch, Losses
from overfly.core.spec import NonNegative, Positive, Share
from overfly.methods.cbst import ThresholdNetworks
from overfly.methods.method import Method, named
from overfly.ops.information import distance_to_uniform
from overfly.ops.losses import mean_entropy
from overfly.ops.normalization import together
from overfly.ops.pseudo_labels import follow, instance_thresholds, keep_above, pseudo_label


class IAST(Method[ThresholdNetworks], name="iast"):
    """Thresholds that follow each image; entropy is pressed down where they ignore, up elsewhere (Mei et al., 2020).

    The paper labels the whole target anew in rounds; here a teacher follows the student at every step. Source and
    target go through the student in one pass. The teacher is what is deployed.
    """

    needs_start: ClassVar[bool] = True

    ema: Share = 0.99
    """Share of the teacher that is kept at every step."""
    begin: Positive = 0.9
    """Threshold of every class before the first image."""
    share: Share = 0.2
    """Share of the pixels that is kept of a class whose threshold is 1 (alpha of the paper)."""
    keep: Share = 0.9
    """Share of the old threshold that is kept at every image (beta)."""
    hardness: NonNegative = 8.0
    """How much fewer pixels are kept of classes with low thresholds (gamma)."""
    entropy: NonNegative = 3.0
    """Weight of the entropy of ignored pixels, in nats, a mean over pixels and classes as in the published code."""
    uniform: NonNegative = 0.1
    """Weight of the distance to uniform predictions at pixels that are kept, a mean over pixels and classes too."""

    def networks(self, student: nn.Module) -> ThresholdNetworks:
        """The student and its teacher; every class begins at the same threshold."""
        return ThresholdNetworks(student, self.begin)

    def losses(self, nets: ThresholdNetworks, batch: Batch) -> Losses:
        """The criterion on the source and on kept pseudo-labels, and both regularizers."""
        pseudo = pseudo_label(nets.teacher(batch.target).main, batch.nodata_mask)
        thresholds = instance_thresholds(pseudo, nets.thresholds, self.share, self.hardness, self.keep)
        nets.thresholds.copy_(thresholds[-1])
        kept = keep_above(pseudo, thresholds)
        ignored = (kept == IGNORE) & (pseudo.label != IGNORE)
        source, target = together(nets.student, batch.source.image, batch.target)
        classes = len(nets.thresholds)
        return {
            **named("source", self.supervised(source, batch.source.label)),
            **named("target", self.imitated(target, kept)),
            "entropy": self.entropy * math.log(classes) / classes * mean_entropy(target.main, ignored),
            "uniform": self.uniform / classes * distance_to_uniform(target.main, kept != IGNORE),
        }

    def after_step(self, nets: ThresholdNetworks, step: int) -> None:
        """The teacher follows the student."""
        follow(nets.teacher, nets.student, self.ema, step)
        nets.steps += 1

    def deployed(self, nets: ThresholdNetworks) -> nn.Module:
        """The teacher."""
        return nets.teacher
