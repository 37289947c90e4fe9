"""Self-training from a trained network alone, where the source's imagery cannot be had."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from overfly.core.records import Batch, Losses
from overfly.core.spec import NonNegative, Positive, Share
from overfly.methods.method import Method, named
from overfly.methods.multiscale_self_training import LIGHT, MEMORY, OverflyNetworks
from overfly.ops.color import Strong, recolored
from overfly.ops.freezing import freeze_unreached
from overfly.ops.information import diversity
from overfly.ops.losses import mean_entropy
from overfly.ops.normalization import keeping_statistics
from overfly.ops.pseudo_labels import follow, keep_above, moved, said_of, surest


class SourceFree(Method[OverflyNetworks], name="source_free"):
    """Strong views of target images must get the teacher's surest labels of every class, without any source image.

    A mean teacher (Tarvainen and Valpola, 2017, arXiv:1703.01780) with class-balanced pseudo-labels (Zou et al., 2018)
    and information maximization (Liang et al., 2020, arXiv:2002.08546): each prediction sure, and all together varied,
    so that training does not end in one class. As in our own method, the teacher looks at several sizes, and classes
    that it says too often are made dearer; with nothing else to learn from, a student is what its labels are. Batch
    normalization keeps the source's statistics, which nothing else remembers. A head for boundaries stays as it was:
    there are no true ones to learn from. The teacher is what is deployed.
    """

    needs_source: ClassVar[bool] = False
    needs_start: ClassVar[bool] = True

    ema: Share = 0.99
    """Share of the teacher that is kept at every step."""
    share: Share = 0.5
    """Share of each class's pixels, the surest, that is learned from."""
    keep: Share = 0.9
    """Share of the old thresholds that is kept at every step."""
    scales: Annotated[tuple[Positive, ...], Field(min_length=1)] = (0.67, 1.0, 1.5)
    """Sizes at which the teacher sees each image, turned by a random quarter or mirrored; the square of each is what it
    costs."""
    debias: NonNegative = 0.5
    """How much dearer a class is that the teacher says often: its probabilities are divided by its share to this power;
    0: not at all."""
    strong: Strong = LIGHT
    """What is done to the colors of the student's views: another light rather than another hue, which tells classes
    apart."""
    statistics: Literal["kept", "own"] = "kept"
    """Batch normalization of the student: the statistics that it began with, or those of target batches."""
    information: NonNegative = 0.1
    """Weight of information maximization: mean entropy less the entropy of the mean prediction, plus 1."""

    def networks(self, student: nn.Module) -> OverflyNetworks:
        """The student, its boundary head frozen, and its teacher."""
        nets = OverflyNetworks(student)
        freeze_unreached(
            student, nets.segmenter.bands, lambda logits: (logits.main, *(logits.aux if self.criterion.aux else ()))
        )
        return nets

    def losses(self, nets: OverflyNetworks, batch: Batch) -> Losses:
        """The criterion on strong views with kept pseudo-labels, and information maximization."""
        label = self.labels(nets, batch.target, batch.nodata_mask)
        with keeping_statistics(nets.student, active=self.statistics == "kept"):
            logits = nets.student(recolored(batch.target, self.strong, nets.segmenter.max_value))
        valid_mask = batch.valid_mask
        information = mean_entropy(logits.main, valid_mask) - diversity(logits.main, valid_mask) + 1
        return {
            **named("target", self.imitated(logits, label)),
            "information": self.information * information,
        }

    @torch.no_grad()
    def labels(self, nets: OverflyNetworks, target: Tensor, nodata_mask: Tensor | None = None) -> Tensor:
        """The teacher's labels (B, H, W), `IGNORE` where it is not among the surest of their class or has no data."""
        pseudo = said_of(
            nets.teacher,
            target,
            scales=self.scales,
            shares=nets.shares,
            power=self.debias,
            keep=MEMORY,
            nodata_mask=nodata_mask,
        )
        found = surest(pseudo, self.share, len(nets.thresholds))
        nets.thresholds.copy_(moved(nets.thresholds, found, self.keep))
        return keep_above(pseudo, nets.thresholds)

    def after_step(self, nets: OverflyNetworks, step: int) -> None:  # noqa: ARG002 - the teacher is never young
        """The teacher, trained already, follows the student from the first step on."""
        follow(nets.teacher, nets.student, self.ema)
        nets.steps += 1

    def deployed(self, nets: OverflyNetworks) -> nn.Module:
        """The teacher."""
        return nets.teacher
