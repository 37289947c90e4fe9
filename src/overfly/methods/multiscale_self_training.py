"""Multi-scale class-balanced self-training, for batch-normalized real-time networks and overhead imagery."""

from collections.abc import Callable
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from overfly.core.records import IGNORE, Batch, Labeled, Losses
from overfly.core.spec import NonNegativeFloat, PositiveFloat, PositiveInt, Share
from overfly.methods.method import SelfTraining, prefixed
from overfly.methods.self_training import ThresholdNetworks
from overfly.ops import pseudo_labels as labeling
from overfly.ops.augmentation import augment
from overfly.ops.color import ColorAugments, GaussianBlur, Illumination, augment_colors
from overfly.ops.criterion import Criterion, CrossEntropy
from overfly.ops.geometry import Dihedral, HorizontalFlip
from overfly.ops.normalization import frozen_statistics, joint_forward

ILLUMINATION: ColorAugments = (Illumination(p=0.8), GaussianBlur(p=0.5, low=0.15, high=1.15))
"""Changes of illumination and sharpness that keep hues, which tell classes apart in overhead imagery."""
BATCH_EMA = 0.95
"""Decay of the moving averages of thresholds and class shares over batches."""
REFERENCE_STEPS = 20
"""Steps whose predictions are the reference of class shares without a source: about the memory of `BATCH_EMA`."""


class MultiscaleNetworks(ThresholdNetworks):
    """Student, teacher, class thresholds, and the class shares of the teacher's predictions.

    Attributes:
        class_prior: moving average of the teacher's mean class probabilities (K,), sums to 1; 0 if not known yet.
        reference: class shares that the correction aims at (K,), the same.
    """

    class_prior: Tensor
    reference: Tensor

    def __init__(self, student: nn.Module) -> None:
        super().__init__(student)
        for name in ("class_prior", "reference"):
            self.register_buffer(name, torch.zeros(len(self.segmenter.classes)))


class MultiscaleTeacher(SelfTraining[MultiscaleNetworks]):
    """A trained teacher that labels the target at several scales."""

    needs_start: ClassVar[bool] = True

    scales: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = (0.67, 1.0, 1.5)
    """Scales at which the teacher predicts each target image, each under a random quarter turn or flip; the predictions
    are averaged. The cost of a scale is its square. Enlarging and reducing cover a target of either resolution."""
    scales_per_step: PositiveInt | None = None
    """Number of `scales` that a step uses, in turn; none: all, whose predictions are averaged. One takes 0.76 to 0.83
    times as long and cost 0.2 points of mIoU on the synthetic pair (docs/results/costs.md)."""
    turns: bool = True
    """Whether target images are turned by quarters and flipped; false for images with a fixed top, such as those of
    streets, which are flipped horizontally only."""
    class_prior_power: NonNegativeFloat = 0.5
    """Strength of the class-prior correction: predicted probabilities are divided by the predicted share of their
    class, relative to its share in `reference`, to this power; 0: no correction."""
    reference: Literal["equal", "source"] = "equal"
    """Class shares that the correction aims at: equal ones, which suits classes of similar frequency; or those of the
    source's labels (without a source: of the first predictions), which suits rare classes: equal shares make them grow
    until roads are bicyclists (docs/results/choice.md)."""

    def networks(self, student: nn.Module) -> MultiscaleNetworks:
        nets = MultiscaleNetworks(student)
        if self.reference == "equal":
            for shares in (nets.class_prior, nets.reference):
                shares.fill_(1 / len(shares))
        return nets

    def step_scales(self, step: int) -> tuple[float, ...]:
        """Scales of step ``step`` (from 0)."""
        count = min(self.scales_per_step or len(self.scales), len(self.scales))
        return tuple(self.scales[(step * count + index) % len(self.scales)] for index in range(count))

    @torch.no_grad()
    def label_target(
        self, nets: MultiscaleNetworks, target: Tensor, nodata_mask: Tensor | None, *, share: float,
        threshold_ema: float,
    ) -> Tensor:  # fmt: skip
        """Pseudo-labels (B, H, W) of the most confident ``share`` of each class's pixels; `IGNORE` elsewhere.

        Updates the predicted class shares and, with decay ``threshold_ema``, the thresholds. ``nodata_mask`` is true
        where the images (B, C, H, W) have no data.
        """
        pseudo, class_prior = labeling.multiscale_pseudo_labels(
            nets.teacher, target, nets.class_prior, nets.reference,
            scales=self.step_scales(nets.step), power=self.class_prior_power, decay=BATCH_EMA, turns=self.turns,
            nodata_mask=nodata_mask,
        )  # fmt: skip
        nets.class_prior.copy_(class_prior)
        if self.reference == "source" and not self.needs_source and nets.step < REFERENCE_STEPS:
            nets.reference.copy_(class_prior)
        thresholds = labeling.class_thresholds(pseudo, share, len(nets.thresholds))
        nets.thresholds.copy_(labeling.ema_thresholds(nets.thresholds, thresholds, threshold_ema))
        return labeling.filter_by_threshold(pseudo, nets.thresholds)


class MultiscaleSelfTraining(MultiscaleTeacher, name="multiscale_self_training"):
    """Self-training with multi-scale, prior-corrected, class-balanced pseudo-labels and pasted source classes.

    The mean teacher (Tarvainen and Valpola, 2017) predicts each target image at several `scales`, since a wrong ground
    resolution is the most common error between regions. The class shares of its predictions are corrected (after Wang
    et al., 2022, DebiasPL, towards equal ones; Berthelot et al., 2020, ReMixMatch, towards the source's), the most
    confident share of each class is kept (Zou et al., 2018, CBST), and half of a source image's classes are pasted onto
    the target image (Olsson et al., 2021, ClassMix). Source and mixed images share one forward pass. Boundaries are
    trained at source pixels only. Inference uses the teacher. Which shares, and whether pasting helps, depends on
    source and target: `overfly adapt` between two folders trains variants and selects without labels.
    """

    criterion: Criterion = CrossEntropy(boundary=1.0)
    """Supervised loss."""
    initial_share: Share = 0.2
    """Share of each class's pixels that is kept at the first step; a small one leaves out confused classes early on."""
    share: Share = 0.8
    """Share of each class's pixels that is kept after the ramp. Thresholds are moving averages over batches, so more
    than this share is kept of a class that few batches show."""
    ramp_steps: PositiveInt = 400
    """Steps over which the share changes linearly from `initial_share` to `share`."""
    mix_share: Share = 0.5
    """Share of each source image's classes that is pasted onto a target image, rounded up; 0: nothing is pasted."""
    strong_augment: ColorAugments = ()
    """Color augmentations of the mixed images. None by default: with pasting they cost 3.6 points of mIoU on the
    synthetic world; without pasting, illumination and gaussian_blur help."""
    weight: NonNegativeFloat = 1.0
    """Weight of the losses on mixed images."""
    statistics: Literal["frozen", "joint"] = "joint"
    """Batch-normalization statistics of the student: those of the starting network, or those of source and mixed
    images together."""

    def losses(self, nets: MultiscaleNetworks, batch: Batch) -> Losses:
        """Supervised loss on source images and on mixed images."""
        mixed, mask, confident = self.mix(nets, batch)
        return {**self.mixed_losses(nets.student, batch.source, mixed, mask), "confident_share": confident}

    @torch.no_grad()
    def mix(self, nets: MultiscaleNetworks, batch: Batch) -> tuple[Labeled, Tensor, Tensor]:
        """Target images with pseudo-labels and pasted source classes, where these are (B, H, W), and the labeled share.

        Images are color-augmented; the share is that of the pixels of the target with a pseudo-label.
        """
        source = batch.source
        if self.reference == "source":
            shares = labeling.class_shares(source.label, len(nets.reference)).mean(0)
            nets.reference.copy_(labeling.moving_average(nets.reference, shares, BATCH_EMA))
        target, nodata_mask = self.augment_target(nets, batch)
        label = self.pseudo_labels(nets, target, nodata_mask)
        mask = (
            labeling.class_mask(source.label, self.mix_share)
            if self.mix_share
            else torch.zeros_like(label, dtype=torch.bool)
        )
        mixed = labeling.paste(mask, source, Labeled(target, label))
        view = augment_colors(mixed.image, self.strong_augment, nets.segmenter.max_value)
        return Labeled(view, mixed.label), mask, (label != IGNORE).float().mean()

    def mixed_losses(
        self, student: nn.Module, source: Labeled, mixed: Labeled, mask: Tensor,
        weight: Callable[[Tensor], Tensor] | None = None,
    ) -> Losses:  # fmt: skip
        """Supervised loss of a student on source images and on mixed ones, boundaries where ``mask`` is true.

        ``weight`` returns the weight of each pixel (B, H, W) for the scores (B, K, H, W) of mixed images.
        """
        with frozen_statistics(student, active=self.statistics == "frozen"):
            source_logits, mixed_logits = joint_forward(student, source.image, mixed.image)
        weights = None if weight is None else weight(mixed_logits.main.detach())
        return {
            **prefixed("source", self.supervised(source_logits, source.label)),
            **prefixed("mixed", self.supervised(mixed_logits, mixed.label, weight=weights, where=mask), self.weight),
        }

    def augment_target(self, nets: MultiscaleNetworks, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Target images (B, C, H, W), flipped and, with `turns`, turned at random; their no-data mask (B, H, W)."""
        nodata = torch.zeros_like(batch.target[:, 0], dtype=torch.int64)
        if batch.nodata_mask is not None:
            nodata.masked_fill_(batch.nodata_mask, IGNORE)
        max_value, generator = nets.segmenter.max_value, torch.default_generator
        kind = Dihedral() if self.turns else HorizontalFlip()
        augmented = augment(Labeled(batch.target, nodata), (kind,), max_value=max_value, generator=generator)
        return augmented.image, None if batch.nodata_mask is None else augmented.label == IGNORE

    def pseudo_labels(self, nets: MultiscaleNetworks, target: Tensor, nodata_mask: Tensor | None = None) -> Tensor:
        """Pseudo-labels of target images (B, H, W), `IGNORE` where not confident or without data."""
        share = labeling.linear_ramp(self.initial_share, self.share, self.ramp_steps, nets.step)
        return self.label_target(nets, target, nodata_mask, share=share, threshold_ema=BATCH_EMA)
