"""Class thresholds: CBST (Zou et al., ECCV 2018, arXiv:1810.07911), IAST (Mei et al., ECCV 2020, arXiv:2008.12197)."""

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from overfly.core.records import IGNORE, Batch, Losses
from overfly.core.spec import NonNegativeFloat, PositiveFloat, PositiveInt, Share
from overfly.methods.method import SelfTraining, TeacherStudent, prefixed
from overfly.ops.losses import distance_to_uniform, mean_entropy
from overfly.ops.normalization import joint_forward
from overfly.ops.pseudo_labels import (
    class_thresholds,
    ema_thresholds,
    filter_by_threshold,
    instance_thresholds,
    linear_ramp,
    pseudo_label,
)


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
            **self.target_loss(target, label, self.weight),
        }


class IAST(SelfTraining[ThresholdNetworks], name="iast"):
    """Adapt class thresholds to each image; regularize labeled and ignored pixels (Mei et al., 2020).

    Entropy is minimized at ignored pixels, and overconfident predictions at labeled pixels are penalized. The
    paper labels the whole target anew in rounds; here a mean teacher labels each batch. Source and target share one
    forward pass. Inference uses the teacher.
    """

    needs_start: ClassVar[bool] = True

    initial_threshold: PositiveFloat = 0.9
    """Threshold of every class before the first image."""
    share: Share = 0.2
    """Share of the pixels that is kept of a class whose threshold is 1 (alpha)."""
    threshold_ema: Share = 0.9
    """Decay of the thresholds' moving average over images (beta)."""
    hardness: NonNegativeFloat = 8.0
    """Exponent of the threshold in the kept share: higher keeps fewer pixels of hard classes (gamma)."""
    entropy: NonNegativeFloat = 3.0
    """Weight of the entropy of ignored pixels, in nats, averaged over pixels and classes as in the published code."""
    uniform: NonNegativeFloat = 0.1
    """Weight of the divergence from uniform predictions at labeled pixels, averaged over pixels and classes."""

    def networks(self, student: nn.Module) -> ThresholdNetworks:
        """The student and its teacher, with `initial_threshold` for every class."""
        return ThresholdNetworks(student, self.initial_threshold)

    def losses(self, nets: ThresholdNetworks, batch: Batch) -> Losses:
        """Supervised loss on the source; pseudo-label loss and both regularizers on the target."""
        pseudo = pseudo_label(nets.teacher(batch.target).main, batch.nodata_mask)
        thresholds = instance_thresholds(pseudo, nets.thresholds, self.share, self.hardness, self.threshold_ema)
        nets.thresholds.copy_(thresholds[-1])
        label = filter_by_threshold(pseudo, thresholds)
        ignored = (label == IGNORE) & (pseudo.label != IGNORE)
        source, target = joint_forward(nets.student, batch.source.image, batch.target)
        classes = len(nets.thresholds)
        return {
            **prefixed("source", self.supervised(source, batch.source.label)),
            **self.target_loss(target, label),
            "entropy": self.entropy * math.log(classes) / classes * mean_entropy(target.main, ignored),
            "uniform": self.uniform / classes * distance_to_uniform(target.main, label != IGNORE),
        }
