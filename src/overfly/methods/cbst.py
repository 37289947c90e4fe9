"""CBST: class-balanced self-training (Zou et al., ECCV 2018, arXiv:1810.07911)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from overfly.core.records import Batch, Losses
from overfly.core.spec import NonNegativeFloat, PositiveInt, Share
from overfly.methods.method import SelfTraining, TeacherStudent, prefixed
from overfly.ops.normalization import joint_forward
from overfly.ops.pseudo_labels import class_thresholds, ema_thresholds, filter_by_threshold, linear_ramp, pseudo_label


class ThresholdNetworks(TeacherStudent):
    """Student, teacher, and the confidence threshold of each class (K,), 0 to 1, a moving average over batches."""

    thresholds: Tensor

    def __init__(self, student: nn.Module, threshold: float = 0.0) -> None:
        super().__init__(student)
        self.register_buffer("thresholds", torch.full((len(self.segmenter.classes),), threshold))


class CBST(SelfTraining[ThresholdNetworks], name="cbst"):
    """Train on the most confident share of each class's pseudo-labels, a share that grows (Zou et al., 2018).

    A threshold per class (algorithm 2) keeps pixels of every class, where one threshold for all would keep only the
    easy classes. The paper labels the whole target anew in rounds; here a mean teacher labels each batch, and the
    thresholds are moving averages over batches. Source and target share one forward pass. Inference uses the teacher.
    """

    needs_start: ClassVar[bool] = True

    initial_share: Share = 0.2
    """Share of each class's pixels that is kept at the first step."""
    share: Share = 0.5
    """Share of each class's pixels that is kept after the ramp."""
    ramp_steps: PositiveInt = 2000
    """Steps over which the share grows linearly from `initial_share` to `share`."""
    threshold_ema: Share = 0.9
    """Decay of the thresholds' moving average; 0: the thresholds of the batch alone."""
    weight: NonNegativeFloat = 1.0
    """Weight of the losses on pseudo-labels."""

    def networks(self, student: nn.Module) -> ThresholdNetworks:
        return ThresholdNetworks(student)

    def losses(self, nets: ThresholdNetworks, batch: Batch) -> Losses:
        """Supervised loss on the source; pseudo-label loss on the target."""
        pseudo = pseudo_label(nets.teacher(batch.target).main, batch.nodata_mask)
        share = linear_ramp(self.initial_share, self.share, self.ramp_steps, nets.step)
        thresholds = class_thresholds(pseudo, share, len(nets.thresholds))
        nets.thresholds.copy_(ema_thresholds(nets.thresholds, thresholds, self.threshold_ema))
        label = filter_by_threshold(pseudo, nets.thresholds)
        source, target = joint_forward(nets.student, batch.source.image, batch.target)
        return {
            **prefixed("source", self.supervised(source, batch.source.label)),
            **prefixed("target", self.pseudo_supervised(target, label), self.weight),
        }
