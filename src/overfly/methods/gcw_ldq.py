"""GCW and LDQ: class weights and local label quality for DACS (Li et al., 2022, Remote Sensing 14:4942)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from overfly.core.records import IGNORE, Logits, Losses
from overfly.core.spec import PositiveFloat, Share
from overfly.methods.dacs import DACS
from overfly.methods.method import TeacherStudent, prefixed
from overfly.ops.pseudo_labels import PseudoLabels


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

    class_weight_ema: Share = 0.9
    """Decay of the class weights' moving average."""
    temperature: PositiveFloat = 0.1
    """Temperature of the class weights: low raises only the rarest classes, high makes all weights equal."""

    def networks(self, student: nn.Module) -> ClassWeightNetworks:
        return ClassWeightNetworks(student)

    def pseudo_weight(self, pseudo: PseudoLabels) -> Tensor:
        """Loss weight of pseudo-labels (B, H, W): their local quality."""
        return local_quality(pseudo.probability)

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


def class_shares(label: Tensor, classes: int) -> Tensor:
    """Share of each class among the labeled pixels of each image (B, K); 1 / K each in an image without labels.

    Args:
        label: class ids (B, H, W) or `IGNORE`.
        classes: number of classes K.
    """
    index = label.masked_fill(label == IGNORE, classes).flatten(1)
    counts = torch.zeros(len(label), classes + 1, device=label.device)
    counts = counts.scatter_add(1, index, torch.ones_like(index, dtype=counts.dtype))[:, :classes]
    total = counts.sum(1, keepdim=True)
    return torch.where(total > 0, counts / total, 1 / classes)


def rare_class_weights(shares: Tensor, temperature: float) -> Tensor:
    """Weights (B, K) of classes, larger for rarer ones: ``K softmax((1 - share) / temperature)``, with a mean of 1."""
    return shares.shape[-1] * ((1 - shares) / temperature).softmax(-1)


def local_quality(probability: Tensor, threshold: float = 0.7, size: int = 7) -> Tensor:
    """Share of confident pixels in a square around each pixel (B, H, W).

    Args:
        probability: probability of the most probable class (B, H, W).
        threshold: probability from which a pixel is confident.
        size: side of the square in pixels, odd; pixels outside the image are left out.
    """
    confident = (probability >= threshold).float()[:, None]
    return F.avg_pool2d(confident, size, stride=1, padding=size // 2, count_include_pad=False)[:, 0]
