"""Our own adaptation, for batch-normalized real-time networks and imagery seen from above."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from overfly.core.records import IGNORE, Batch, Labeled, Losses
from overfly.core.spec import Count, NonNegative, Pixels, Positive, Share
from overfly.methods.cbst import ThresholdNetworks
from overfly.methods.method import Method, named
from overfly.ops.augmentation import augment
from overfly.ops.color import GaussianBlur, Illumination, Strong, recolored
from overfly.ops.criterion import Criterion, CrossEntropy
from overfly.ops.geometry import Dihedral
from overfly.ops.masking import block_mask, cover
from overfly.ops.mixing import class_mask, paste
from overfly.ops.normalization import keeping_statistics, together
from overfly.ops.pseudo_labels import follow, keep_above, moved, rising, said_of, surest

LIGHT: Strong = (Illumination(p=0.8), GaussianBlur(p=0.5, low=0.15, high=1.15))
"""Another light rather than another hue, which tells classes apart from above: for `Overfly.strong`."""
MEMORY = 0.95
"""Share of the old thresholds and class shares that is kept at every step."""


class OverflyNetworks(ThresholdNetworks):
    """Student and teacher, steps done, how sure a label of each class must be, and how often the teacher says each."""

    shares: Tensor

    def __init__(self, student: nn.Module) -> None:
        super().__init__(student)
        classes = len(self.segmenter.classes)
        self.register_buffer("shares", torch.full((classes,), 1 / classes))


class Overfly(Method[OverflyNetworks], name="overfly"):
    """A teacher labels the target at several ground resolutions; the student learns from that and from the source.

    The teacher, a moving average of weights and statistics in evaluation mode, sees each target image at every one of
    `scales`, turned by a random quarter or mirrored, and averages: what a network says at the wrong resolution is its
    commonest error from place to place. Classes that it says too often are made dearer (`debias`; Wang et al., 2022,
    DebiasPL), and of every class the surest share is learned from, first a little and then more (Zou et al., 2018,
    CBST), on images into which half of a source image's classes are pasted (Olsson et al., 2021, ClassMix), colors
    unchanged. Source and mixed images go through the student in one pass and share its batch statistics. Boundaries
    are learned from source pixels alone, and weigh less than in training from scratch. The teacher is what is deployed.
    Whether pasting helps or harms depends on the two places; `overfly adapt` between two folders trains both and
    chooses without labels.
    """

    needs_start: ClassVar[bool] = True

    criterion: Criterion = CrossEntropy(boundary=1.0)
    """The supervised loss."""
    ema: Share = 0.99
    """Share of the teacher that is kept at every step."""
    scales: Annotated[tuple[Positive, ...], Field(min_length=1)] = (0.67, 1.0, 1.5)
    """Sizes at which the teacher sees each target image: 1.5 shows things half as large again. The square of each is
    what it costs. Nobody knows beforehand which of the two places has the larger things, so both ways by default."""
    debias: NonNegative = 0.5
    """How much dearer a class is that the teacher says often: its probabilities are divided by its share to this power;
    0: not at all."""
    keep: Share = 0.8
    """Share of each class's pixels, the surest, that is learned from; by thresholds that are moving averages over
    batches, so it is more of a class that few batches show."""
    begin: Share | None = 0.2
    """That share at the first step, when what a class is confused with is still among its less sure pixels; from there
    it goes to `keep` in a line. None: `keep` from the first step on."""
    rise: Count = 400
    """Steps that `begin` takes to become `keep`."""
    mix: Share = 0.5
    """Share of each source image's classes that are pasted onto the target, rounded up; 0: none are."""
    strong: Strong = ()
    """What is done to the colors of what the student sees of the target: nothing, since it cost 3.6 points from drawn
    town to country where things are pasted; where nothing is, another light (illumination and gaussian_blur) helps."""
    masked: Share = 0.0
    """Share of squares of the target's part that are covered (Hoyer et al., 2023, MIC)."""
    block: Pixels = 16
    """Side of these squares in pixels."""
    weight: NonNegative = 1.0
    """Weight of the mixed images' terms."""
    mean: Literal["all", "labeled"] = "labeled"
    """What these terms are a mean over: all pixels, so that few sure ones weigh little, or the labeled ones alone."""
    statistics: Literal["kept", "joint"] = "joint"
    """Batch normalization of the student: the statistics that it began with, or those of source and mixed images."""

    def networks(self, student: nn.Module) -> OverflyNetworks:
        """The student and its teacher."""
        return OverflyNetworks(student)

    def losses(self, nets: OverflyNetworks, batch: Batch) -> Losses:
        """The criterion on source images, and on target images with a part of the source pasted."""
        source, max_value = batch.source, nets.segmenter.max_value
        nodata_mask = torch.zeros_like(batch.target[:, 0], dtype=torch.int64)
        if batch.nodata_mask is not None:
            nodata_mask.masked_fill_(batch.nodata_mask, IGNORE)
        target, nodata_mask = augment(
            Labeled(batch.target, nodata_mask), (Dihedral(),), max_value=max_value, generator=torch.default_generator
        )
        label = self.labels(nets, target, None if batch.nodata_mask is None else nodata_mask == IGNORE)
        cut = class_mask(source.label, self.mix) if self.mix else torch.zeros_like(source.label, dtype=torch.bool)
        mixed = paste(cut, source, Labeled(target, label))
        view = recolored(mixed.image, self.strong, max_value)
        if self.masked:
            view = cover(view, block_mask(view, self.block, self.masked) & ~cut[:, None])
        with keeping_statistics(nets.student, active=self.statistics == "kept"):
            of_source, of_mixed = together(nets.student, source.image, view)
        counts = (mixed.label != IGNORE).float().mean() if self.mean == "all" else 1.0
        return {
            **named("source", self.supervised(of_source, source.label)),
            **named("mixed", self.supervised(of_mixed, mixed.label, where=cut), self.weight * float(counts)),
        }

    @torch.no_grad()
    def labels(self, nets: OverflyNetworks, target: Tensor, nodata_mask: Tensor | None = None) -> Tensor:
        """The teacher's labels of target images (B, H, W), `IGNORE` where it is not among the surest of their class.

        Nor are there any where nothing was measured (``nodata_mask``).
        """
        pseudo = said_of(
            nets.teacher,
            target,
            scales=self.scales,
            shares=nets.shares,
            power=self.debias,
            keep=MEMORY,
            nodata_mask=nodata_mask,
        )
        found = surest(pseudo, self.share_at(int(nets.steps)), len(nets.shares))
        nets.thresholds.copy_(moved(nets.thresholds, found, MEMORY))
        return keep_above(pseudo, nets.thresholds)

    def share_at(self, step: int) -> float:
        """Share of each class's pixels that is learned from at a step."""
        first = self.keep if self.begin is None else self.begin
        return rising(first, self.keep, self.rise, step)

    def after_step(self, nets: OverflyNetworks, step: int) -> None:  # noqa: ARG002 - the teacher is never young
        """The teacher, trained already, follows the student slowly from the first step on."""
        follow(nets.teacher, nets.student, self.ema)
        nets.steps += 1

    def deployed(self, nets: OverflyNetworks) -> nn.Module:
        """The teacher."""
        return nets.teacher
