"""DAFormer (Hoyer et al., CVPR 2022, arXiv:2111.14887), MIC (Hoyer et al., CVPR 2023, arXiv:2212.01322)."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from overfly.core.records import IGNORE, Batch, Losses
from overfly.core.spec import NonNegativeFloat, NonNegativeInt, Pixels, Share
from overfly.methods.dacs import DACS
from overfly.methods.method import TeacherStudent, prefixed
from overfly.ops.color import augment_colors
from overfly.ops.mixing import block_mask, fill_mean_color
from overfly.ops.normalization import joint_forward, untracked_statistics


class AnchoredNetworks(TeacherStudent):
    """Student, teacher, and a frozen copy of the initial student."""

    eval_networks = ("teacher", "anchor")

    def __init__(self, student: nn.Module) -> None:
        super().__init__(student)
        self.anchor = copy.deepcopy(student).requires_grad_(False).eval()


class DAFormer(DACS, name="daformer"):
    """DACS plus a feature distance to the initial encoder (Hoyer et al., 2022, section 3.3).

    The paper's rare-class sampling is a recipe's ``sampling: rare``, and its learning-rate warm-up ``schedule.warmup``.
    Features are those that the network's class layer reads. The distance needs a recipe that starts from pretrained
    weights; it is above 0 from the first step on, since the anchor normalizes by running statistics and the student by
    those of the batch.
    """

    ema: Share = 0.999
    """Decay of the teacher's moving average."""
    warmup: NonNegativeInt = 500
    """Steps on the source alone before the first pseudo-labels."""
    feature_weight: NonNegativeFloat = 0.005
    """Weight of the feature distance on source images."""
    feature_classes: tuple[NonNegativeInt, ...] = ()
    """Ids of the classes whose features count (in the paper the thing classes); empty: all."""
    feature_min_share: Share = 0.75
    """Smallest share of a feature cell that one class must fill for the cell to count."""

    def networks(self, student: nn.Module) -> AnchoredNetworks:
        return AnchoredNetworks(student)

    def losses(self, nets: TeacherStudent, batch: Batch) -> Losses:
        """The losses of DACS; feature distance on the source."""
        assert isinstance(nets, AnchoredNetworks)  # noqa: S101 - made by `networks`
        image, label = batch.source
        mixed = self.mix(nets, batch) if nets.step >= self.warmup else None
        source, *rest = joint_forward(nets.student, image, *([mixed.image] if mixed else []))
        terms = dict(self.source_loss(nets, source, label))
        if mixed:
            terms |= self.mixed_loss(rest[0], mixed)
        if self.feature_weight and source.features is not None:
            with torch.no_grad():
                anchor = nets.anchor(image).features
            size = (anchor.shape[2], anchor.shape[3])
            cells = majority(label, size, self.feature_min_share, len(nets.segmenter.classes))
            counted = cells != IGNORE
            if self.feature_classes:
                counted = torch.stack([cells == index for index in self.feature_classes]).any(0)
            terms["feature_distance"] = self.feature_weight * feature_distance(source.features, anchor, counted)
        return terms


def majority(label: Tensor, size: tuple[int, int], share: float, classes: int) -> Tensor:
    """Label at lower resolution: the most frequent class of each cell, `IGNORE` where its share is too small.

    Args:
        label: class ids (B, H, W) or `IGNORE`.
        size: (h, w) of the result.
        share: smallest share of a cell that its class must fill, 0 to 1.
        classes: number of classes K.

    Returns:
        (B, h, w), int64.
    """
    one_hot = label.unsqueeze(1) == torch.arange(classes, device=label.device).view(1, -1, 1, 1)
    filled, best = F.adaptive_avg_pool2d(one_hot.float(), size).max(1)
    return best.masked_fill(filled < max(share, 1e-6), IGNORE)


def feature_distance(features: Tensor, anchor: Tensor, where: Tensor) -> Tensor:
    """Mean Euclidean distance of feature vectors (B, F, h, w) where ``where`` (B, h, w) is true; 0 if nowhere.

    ``anchor`` holds the features of the frozen network, of the same shape.
    """
    square = (features.float() - anchor.detach().float()).square().sum(1)
    distance = (square + 1e-12).sqrt()  # finite gradient where both are equal
    counted = where.to(distance.dtype)
    return (distance * counted).sum() / torch.clamp(counted.sum(), min=1)


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
