"""DACS: domain adaptation by cross-domain mixed sampling (Tranheden et al., WACV 2021, arXiv:2007.08702)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from overfly.core.records import Batch, Labeled, Logits, Losses
from overfly.core.spec import NonNegativeFloat, NonNegativeInt, Share
from overfly.methods.method import SelfTraining, TeacherStudent, prefixed
from overfly.ops.color import ColorAugments, ColorJitter, GaussianBlur, augment_colors
from overfly.ops.mixing import class_mask, paste
from overfly.ops.normalization import joint_forward
from overfly.ops.pseudo_labels import PseudoLabels, confident_share, pseudo_label


class Mixed(NamedTuple):
    """Target images with pasted source classes.

    Attributes:
        image: (B, C, H, W), color-augmented.
        label: source labels and pseudo-labels (B, H, W).
        weight: loss weight of each pixel (B, H, W): 1 at source pixels, ``pseudo_weight`` elsewhere.
        from_source: True at source pixels (B, H, W).
        pseudo_label: pseudo-labels of the whole target images (B, H, W).
        pseudo_weight: loss weight of the pseudo-labels, (B, 1, 1) or (B, H, W), 0 to 1.
    """

    image: Tensor
    label: Tensor
    weight: Tensor
    from_source: Tensor
    pseudo_label: Tensor
    pseudo_weight: Tensor


class DACS(SelfTraining[TeacherStudent], name="dacs"):
    """Paste half of a source image's classes onto a target image; train on both (Tranheden et al., 2021, algorithm 1).

    Source and mixed images share one forward pass. Boundaries are trained at source pixels only. Inference
    uses the teacher.
    """

    confidence: Share = 0.968
    """Probability above which a pseudo-label is confident; the share of confident pixels weighs an image's loss."""
    mix_share: Share = 0.5
    """Share of each source image's classes that is pasted, rounded up."""
    strong_augment: ColorAugments = (ColorJitter(p=0.8), GaussianBlur(p=0.5, low=0.15, high=1.15))
    """Color augmentations of the mixed images."""
    weight: NonNegativeFloat = 1.0
    """Weight of the losses on mixed images."""
    warmup: NonNegativeInt = 0
    """Steps on the source alone before the first pseudo-labels; 0 where ``start`` is a trained network."""

    def losses(self, nets: TeacherStudent, batch: Batch) -> Losses:
        """Supervised loss on source images and on mixed images."""
        if nets.step < self.warmup:
            return self.source_loss(nets, nets.student(batch.source.image), batch.source.label)
        mixed = self.mix(nets, batch)
        source, logits = joint_forward(nets.student, batch.source.image, mixed.image)
        return {**self.source_loss(nets, source, batch.source.label), **self.mixed_loss(logits, mixed)}

    def mix(self, nets: TeacherStudent, batch: Batch) -> Mixed:
        """Label the target by the teacher; paste source classes onto it."""
        pseudo = pseudo_label(nets.teacher(batch.target).main, batch.nodata_mask)
        pseudo_weight = self.pseudo_weight(pseudo)
        mask = class_mask(batch.source.label, self.mix_share)
        image, label = paste(mask, batch.source, Labeled(batch.target, pseudo.label))
        image = augment_colors(image, self.strong_augment, nets.segmenter.max_value)
        weight = torch.where(mask, torch.ones_like(pseudo_weight), pseudo_weight)
        return Mixed(image, label, weight, mask, pseudo.label, pseudo_weight)

    def pseudo_weight(self, pseudo: PseudoLabels) -> Tensor:
        """Loss weight of pseudo-labels (B, 1, 1): the share of confident pixels."""
        return confident_share(pseudo, self.confidence)

    def source_loss(self, nets: TeacherStudent, logits: Logits, label: Tensor) -> Losses:  # noqa: ARG002 - see gcw_ldq
        """Supervised loss on source images."""
        return prefixed("source", self.supervised(logits, label))

    def mixed_loss(self, logits: Logits, mixed: Mixed) -> Losses:
        """Supervised loss on mixed images, boundaries at source pixels only."""
        terms = self.supervised(logits, mixed.label, mixed.weight, where=mixed.from_source)
        return prefixed("mixed", terms, self.weight)
