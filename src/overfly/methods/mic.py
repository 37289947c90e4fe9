"""MIC: masked image consistency (Hoyer et al., CVPR 2023, arXiv:2212.01322)."""

from __future__ import annotations

from overfly.core.records import Batch, Losses
from overfly.core.spec import NonNegativeFloat, Pixels, Share
from overfly.methods.dacs import DACS
from overfly.methods.method import TeacherStudent, prefixed
from overfly.ops.color import augment_colors
from overfly.ops.mixing import block_mask, fill_mean_color
from overfly.ops.normalization import joint_forward, untracked_statistics


class MIC(DACS, name="mic"):
    """DACS plus consistency of masked target images with the teacher's pseudo-labels (Hoyer et al., 2023).

    Source and mixed images share one forward pass. Masked images have a pass of their own that leaves the running
    statistics of batch normalization unchanged, since no image is masked at inference.
    """

    ema: Share = 0.999
    """Decay of the teacher's moving average."""
    mask_block: Pixels = 64
    """Side of the masked squares in pixels; the paper takes 64 for crops of 1024, 32 at half that resolution."""
    mask_ratio: Share = 0.7
    """Share of the squares that is masked."""
    masked_weight: NonNegativeFloat = 1.0
    """Weight of the losses on masked images."""

    def losses(self, nets: TeacherStudent, batch: Batch) -> Losses:
        """The losses of DACS; pseudo-label loss on masked target images."""
        image, label = batch.source
        if nets.step < self.warmup:
            return self.source_loss(nets, nets.student(image), label)
        mixed = self.mix(nets, batch)
        view = augment_colors(batch.target, self.strong_augment, nets.segmenter.max_value)
        masked = fill_mean_color(view, block_mask(view, self.mask_block, self.mask_ratio))
        source, logits = joint_forward(nets.student, image, mixed.image)
        with untracked_statistics(nets.student):
            prediction = nets.student(masked)
        masked_terms = self.pseudo_supervised(prediction, mixed.pseudo_label, mixed.pseudo_weight)
        return {
            **self.source_loss(nets, source, label),
            **self.mixed_loss(logits, mixed),
            **prefixed("masked", masked_terms, self.masked_weight),
        }
