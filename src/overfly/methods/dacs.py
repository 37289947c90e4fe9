"""DACS (Tranheden et al., WACV 2021, arXiv:2007.08702), and the methods that extend it.

GCW and LDQ (Li et al., 2022, Remote Sensing 14:4942); DAFormer (Hoyer et al., CVPR 2022, arXiv:2111.14887); MIC (Hoyer
et al., CVPR 2023, arXiv:2212.01322).
"""

import copy
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from overfly.core.records import IGNORE, Batch, Labeled, Logits, Losses
from overfly.core.spec import NonNegativeFloat, NonNegativeInt, Pixels, PositiveFloat, Share
from overfly.methods.method import SelfTraining, TeacherStudent, prefixed
from overfly.ops.color import ColorAugments, ColorJitter, GaussianBlur, augment_colors
from overfly.ops.losses import masked_mean
from overfly.ops.normalization import joint_forward, untracked_statistics
from overfly.ops.pseudo_labels import (
    PseudoLabels,
    block_mask,
    class_mask,
    class_shares,
    confident_share,
    fill_mean_color,
    paste,
    pseudo_label,
)


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
    uses the teacher. The log states the share of confident pixels (``confident_share``): if it is near 0, training
    learns from the source alone.
    """

    confidence: Share = 0.968
    """Probability above which a pseudo-label is confident; the share of confident pixels weighs an image's loss."""
    class_confidence: tuple[Share, ...] = ()
    """That probability for each class, in the order of the ids; empty: `confidence` for all."""
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
        return confident_share(pseudo, self.threshold(pseudo.label))

    def threshold(self, label: Tensor) -> Tensor | float:
        """Probability from which pseudo-labels (B, H, W) are confident, for each pixel or for all."""
        if not self.class_confidence:
            return self.confidence
        thresholds = torch.tensor([*self.class_confidence, 1.0]).to(label.device, non_blocking=True)
        return thresholds[label.clamp_max(len(self.class_confidence))]

    def source_loss(self, nets: TeacherStudent, logits: Logits, label: Tensor) -> Losses:  # noqa: ARG002 - see gcw_ldq
        """Supervised loss on source images."""
        return prefixed("source", self.supervised(logits, label))

    def mixed_loss(self, logits: Logits, mixed: Mixed) -> Losses:
        """Supervised loss on mixed images, boundaries at source pixels only."""
        terms = self.supervised(logits, mixed.label, mixed.weight, where=mixed.from_source)
        return {**prefixed("mixed", terms, self.weight), "confident_share": mixed.pseudo_weight.mean()}


class ClassWeightNetworks(TeacherStudent):
    """Student, teacher, and the gradual class weights (K,)."""

    class_weights: Tensor

    def __init__(self, student: nn.Module) -> None:
        super().__init__(student)
        self.register_buffer("class_weights", torch.ones(len(self.segmenter.classes)))


class GCWLDQ(DACS, name="gcw_ldq"):
    """DACS with gradual class weights (GCW) on the source and local dynamic quality (LDQ) of pseudo-labels.

    Source classes that were rare in recent batches get larger weights. A pseudo-label's weight is the share of
    confident pixels around it, not in its whole image.
    """

    confidence: Share = 0.7
    """Probability from which a pseudo-label is confident."""
    class_weight_ema: Share = 0.9
    """Decay of the class weights' moving average."""
    temperature: PositiveFloat = 0.1
    """Temperature of the class weights: low raises only the rarest classes, high makes all weights equal."""

    def networks(self, student: nn.Module) -> ClassWeightNetworks:
        return ClassWeightNetworks(student)

    def pseudo_weight(self, pseudo: PseudoLabels) -> Tensor:
        """Loss weight of pseudo-labels (B, H, W): their local quality."""
        return local_quality(pseudo.probability, self.threshold(pseudo.label))

    def source_loss(self, nets: TeacherStudent, logits: Logits, label: Tensor) -> Losses:
        """Supervised loss on source images, weighted by class.

        As in the published code, the weights are averaged over the images of a batch, and they scale the sum of the
        loss, not the count of its pixels.
        """
        assert isinstance(nets, ClassWeightNetworks)  # noqa: S101 - made by `networks`
        weights = rare_class_weights(class_shares(label, len(nets.class_weights)), self.temperature).mean(0)
        nets.class_weights.lerp_(weights.to(nets.class_weights), 1 - self.class_weight_ema)
        pixel_weights = nets.class_weights[label.masked_fill(label == IGNORE, 0)]
        return prefixed("source", self.supervised(logits, label, pixel_weights))


def rare_class_weights(shares: Tensor, temperature: float) -> Tensor:
    """Weights (B, K) of classes, larger for rarer ones: ``K softmax((1 - share) / temperature)``, with a mean of 1."""
    return shares.shape[-1] * ((1 - shares) / temperature).softmax(-1)


def local_quality(probability: Tensor, threshold: Tensor | float, size: int = 7) -> Tensor:
    """Share of confident pixels in a square of ``size`` pixels, odd, around each pixel (B, H, W), inside the image.

    A pixel is confident if the probability of its most probable class (B, H, W) is at least ``threshold``, which is one
    for each pixel (B, H, W) or for all.
    """
    confident = (probability >= threshold).float()[:, None]
    return F.avg_pool2d(confident, size, stride=1, padding=size // 2, count_include_pad=False)[:, 0]


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
    """Label (B, h, w) of ``size``: the most frequent class of each cell, `IGNORE` where it fills less than ``share``.

    ``label`` holds ids (B, H, W) of ``classes`` classes, or `IGNORE`.
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
    return masked_mean(distance, where)


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
