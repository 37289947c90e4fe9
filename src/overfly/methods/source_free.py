"""Adaptation without source images: `source_free`, and Tent (Wang et al., ICLR 2021, arXiv:2006.10726)."""

from typing import ClassVar, Literal

from torch import nn

from overfly.core.records import Batch, Losses
from overfly.core.spec import NonNegativeFloat, Share
from overfly.methods.method import Method, Networks
from overfly.methods.multiscale_self_training import ILLUMINATION, MultiscaleNetworks, MultiscaleTeacher
from overfly.ops.color import ColorAugments, augment_colors
from overfly.ops.losses import diversity, mean_entropy
from overfly.ops.normalization import batch_norms, freeze_unused, frozen_statistics, updating_statistics


class SourceFree(MultiscaleTeacher, name="source_free"):
    """Train on color-augmented target images with the teacher's class-balanced pseudo-labels, without the source.

    A mean teacher (Tarvainen and Valpola, 2017, arXiv:1703.01780) with the pseudo-labels of `multiscale_self_training`,
    and information maximization (Liang et al., 2020, arXiv:2002.08546): each prediction confident, all together
    diverse, so that training does not collapse to one class. Batch normalization keeps the source's statistics. A
    boundary head stays unchanged, since there are no true boundaries. Inference uses the teacher.
    """

    needs_source: ClassVar[bool] = False

    share: Share = 0.5
    """Share of each class's pixels that is kept."""
    threshold_ema: Share = 0.9
    """Decay of the thresholds' moving average over batches."""
    strong_augment: ColorAugments = ILLUMINATION
    """Color augmentations of the student's images; by default illumination and blur, which keep hues."""
    statistics: Literal["frozen", "batch"] = "frozen"
    """Batch-normalization statistics of the student: those of the starting network, or those of target batches."""
    information: NonNegativeFloat = 0.1
    """Weight of information maximization: mean entropy minus the entropy of the mean prediction, plus 1."""

    def networks(self, student: nn.Module) -> MultiscaleNetworks:
        nets = super().networks(student)
        freeze_unused(student, lambda logits: (logits.main, *(logits.aux if self.criterion.aux else ())))
        return nets

    def losses(self, nets: MultiscaleNetworks, batch: Batch) -> Losses:
        """Pseudo-label loss on color-augmented target images; information maximization."""
        label = self.label_target(
            nets, batch.target, batch.nodata_mask, share=self.share, threshold_ema=self.threshold_ema
        )
        with frozen_statistics(nets.student, active=self.statistics == "frozen"):
            logits = nets.student(augment_colors(batch.target, self.strong_augment, nets.segmenter.max_value))
        information = mean_entropy(logits.main, batch.valid_mask) - diversity(logits.main, batch.valid_mask) + 1
        return {**self.target_loss(logits, label), "information": self.information * information}


class Tent(Method[Networks], name="tent"):
    """Minimize the entropy of target predictions over scales and shifts of batch normalization (Wang et al., 2021).

    Batches are normalized by their own statistics; inference uses the running ones, which converge to the
    target within about thirty steps. The paper adapts at test time, this method on the target's training images.
    """

    needs_source: ClassVar[bool] = False
    needs_start: ClassVar[bool] = True

    def networks(self, student: nn.Module) -> Networks:
        """The student, frozen except for the scales and shifts that its class scores depend on."""
        student.requires_grad_(False)
        for norm in batch_norms(student):
            norm.requires_grad_(True)
        nets = Networks(student)
        freeze_unused(student, lambda logits: (logits.main,))
        return nets

    def losses(self, nets: Networks, batch: Batch) -> Losses:
        """Mean entropy of the target's predictions."""
        with updating_statistics(nets.student):
            logits = nets.student(batch.target)
        return {"entropy": mean_entropy(logits.main, batch.valid_mask)}
