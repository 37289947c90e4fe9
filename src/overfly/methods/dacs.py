"""DACS: domain adaptation by mixing classes across domains (Tranheden et al., 2021, arXiv:2007.08702)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from overfly.core.records import IGNORE, Batch, Labeled, Logits, Losses
from overfly.core.spec import NonNegative, Share, Whole
from overfly.methods.method import Method, TeacherStudent, named
from overfly.ops.color import ColorJitter, GaussianBlur, Strong, recolored
from overfly.ops.mixing import class_mask, paste
from overfly.ops.normalization import together
from overfly.ops.pseudo_labels import Pseudo, follow, local_quality, pseudo_label, share_above
from overfly.ops.weighting import class_shares, rare_class_weights

GCW_KEEP = 0.9
"""Share of the old weights that gradual class weights keep at every step (Li et al., 2022)."""
GCW_TEMPERATURE = 0.1
"""Temperature of gradual class weights (Li et al., 2022)."""


class MixNetworks(TeacherStudent):
    """Student and teacher, the steps that are done, and the gradual class weights."""

    steps: Tensor
    weights: Tensor

    def __init__(self, student: nn.Module) -> None:
        super().__init__(student)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("weights", torch.ones(len(self.segmenter.classes)))


class Mix(NamedTuple):
    """Mixed images, and what is known of them.

    Attributes:
        image: (B, C, H, W), source where ``cut`` is true, else target, strongly recolored.
        label: source labels and the teacher's (B, H, W).
        weight: 1 on source pixels, the quality of the pseudo-labels elsewhere (B, H, W).
        cut: True on source pixels (B, H, W).
        pseudo: the teacher's labels of the whole target images (B, H, W).
        quality: their weight, (B, 1, 1) or (B, H, W).
    """

    image: Tensor
    label: Tensor
    weight: Tensor
    cut: Tensor
    pseudo: Tensor
    quality: Tensor


class DACS(Method[MixNetworks], name="dacs"):
    """Paste half of the source's classes onto target images, learn from both (Tranheden et al., 2021).

    Source and mixed images go through the student in one pass, so that batch normalization sees one batch. Boundaries
    are learned from source pixels alone. The teacher, with averaged statistics too, is what is deployed.
    """

    ema: Share = 0.99
    """Share of the teacher that is kept at every step."""
    confidence: Share = 0.968
    """Probability above which a pseudo-label counts as sure; an image weighs its share of sure pixels."""
    share: Share = 0.5
    """Share of each source image's classes that are pasted, rounded up."""
    strong: Strong = (ColorJitter(p=0.8), GaussianBlur(p=0.5, low=0.15, high=1.15))
    """What is done to the colors of mixed images."""
    weight: NonNegative = 1.0
    """Weight of the mixed images' terms."""
    warmup: Whole = 0
    """Steps on the source alone before the first pseudo-label; 0 where ``start`` is a trained network."""
    gcw: bool = False
    """Gradual class weights: source classes that were rare of late weigh more (Li et al., 2022)."""
    ldq: bool = False
    """Local quality: a pseudo-label weighs the share of sure ones around it, not in its image (Li et al., 2022)."""

    def networks(self, student: nn.Module) -> MixNetworks:
        """The student and its teacher."""
        return MixNetworks(student)

    def losses(self, nets: MixNetworks, batch: Batch) -> Losses:
        """The criterion on source images and on mixed ones."""
        if nets.steps < self.warmup:
            return self.on_source(nets, nets.student(batch.source.image), batch.source.label)
        mix = self.mix(nets, batch)
        source, mixed = together(nets.student, batch.source.image, mix.image)
        return {**self.on_source(nets, source, batch.source.label), **self.on_mixed(mixed, mix)}

    def mix(self, nets: MixNetworks, batch: Batch) -> Mix:
        """Let the teacher label the target, and paste half of the source's classes onto it."""
        pseudo = pseudo_label(nets.teacher(batch.target).main, batch.nodata_mask)
        quality = self.quality(pseudo)
        cut = class_mask(batch.source.label, self.share)
        mixed = paste(cut, batch.source, Labeled(batch.target, pseudo.label))
        image = recolored(mixed.image, self.strong, nets.segmenter.max_value)
        weight = torch.where(cut, torch.ones_like(quality), quality)
        return Mix(image, mixed.label, weight, cut, pseudo.label, quality)

    def quality(self, pseudo: Pseudo) -> Tensor:
        """What pseudo-labels weigh: their image's share of sure pixels, or that around each of them."""
        if self.ldq:
            return local_quality(pseudo.probability)
        return share_above(pseudo, self.confidence)

    def on_source(self, nets: MixNetworks, logits: Logits, label: Tensor) -> dict[str, Tensor]:
        """The criterion on source images, rare classes weighing more if so set.

        The weights of each image follow what it shows, those of late their mean, and a pixel of a rare class counts
        more in the sum, not in the count, as in the published code.
        """
        if not self.gcw:
            return named("source", self.supervised(logits, label))
        shares = torch.stack([class_shares(each, len(nets.weights)) for each in label])
        found = rare_class_weights(shares, GCW_TEMPERATURE).mean(0)
        nets.weights.lerp_(found.to(nets.weights), 1 - GCW_KEEP)
        return named("source", self.supervised(logits, label, nets.weights[label.masked_fill(label == IGNORE, 0)]))

    def on_mixed(self, logits: Logits, mix: Mix) -> dict[str, Tensor]:
        """The criterion on mixed images, boundaries on source pixels alone."""
        return named("mixed", self.supervised(logits, mix.label, mix.weight, where=mix.cut), self.weight)

    def after_step(self, nets: MixNetworks, step: int) -> None:
        """The teacher follows the student."""
        follow(nets.teacher, nets.student, self.ema, step)
        nets.steps += 1

    def deployed(self, nets: MixNetworks) -> nn.Module:
        """The teacher."""
        return nets.teacher
