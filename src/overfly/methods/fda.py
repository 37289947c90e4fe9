"""Source images in the style of the target: FDA (Yang and Soatto, CVPR 2020, arXiv:2004.05498), color transfer."""

from typing import Literal

import torch
from torch import Tensor, nn

from overfly.core.records import Batch, Losses
from overfly.core.spec import NonNegativeFloat, NonNegativeInt
from overfly.methods.method import Method, Networks
from overfly.ops.color import color_moments, low_amplitudes, match_colors, scale_low_frequencies
from overfly.ops.losses import charbonnier_entropy
from overfly.ops.normalization import joint_forward

Style = Literal["domain", "image"]
"""Statistics of all batches so far of each domain, or those of one source image and one target image."""


class StyleNetworks(Networks):
    """A student, and the mean statistics (C, …) of source and target over all batches so far."""

    source_style: Tensor
    target_style: Tensor

    def __init__(self, student: nn.Module, *shape: int) -> None:
        super().__init__(student)
        for name in ("source_style", "target_style"):
            self.register_buffer(name, torch.zeros(self.segmenter.bands, *shape))

    def styles(self, source: Tensor, target: Tensor, style: Style) -> tuple[Tensor, Tensor]:
        """Add statistics of a batch (B, C, …) to the means; return the means, or those given for ``image``."""
        for mean, value in ((self.source_style, source), (self.target_style, target)):
            mean.lerp_(value.mean(0), 1 / (self.step + 1))
        return (self.source_style, self.target_style) if style == "domain" else (source, target)


class FDA(Method[StyleNetworks], name="fda"):
    """Train on source images with the low-frequency amplitudes of target images (Yang and Soatto, 2020).

    Source images keep their own phases, in the sensor's range. The paper swaps amplitudes of whole images; a crop may
    show one class, whose color would be swapped for the domain's, so here amplitudes are multiplied by the ratio of the
    domains' mean amplitudes. The paper averages networks of several betas; here one reach trains one network.
    """

    cycles: NonNegativeInt = 5
    """Highest frequency whose amplitudes change, in cycles per crop either way; 0: the mean color alone. The paper's
    beta of 0.01 to 0.09 is 5 to 46 cycles of its images, 512 pixels high."""
    style: Style = "domain"
    """Amplitudes of all images of a domain, or (``image``) those of one target image for each source image."""
    entropy: NonNegativeFloat = 0.005
    """Weight of the robust entropy of the target's predictions; 0 leaves target images out of the forward pass."""
    power: NonNegativeFloat = 2.0
    """Exponent of that entropy (eta): higher reduces the influence of confident pixels."""

    def networks(self, student: nn.Module) -> StyleNetworks:
        return StyleNetworks(student, 2 * self.cycles + 1, 2 * self.cycles + 1)

    def losses(self, nets: StyleNetworks, batch: Batch) -> Losses:
        """Supervised loss on restyled source images; robust entropy on the target."""
        image, label = batch.source
        own, other = (low_amplitudes(images, self.cycles) for images in (image, batch.target))
        own, other = nets.styles(own, other, self.style)
        restyled = scale_low_frequencies(image, other / own.clamp_min(1e-6)).clamp(0, nets.segmenter.max_value)
        if not self.entropy:
            return self.supervised(nets.student(restyled), label)
        source, target = joint_forward(nets.student, restyled, batch.target)
        entropy = self.entropy * charbonnier_entropy(target.main, self.power)
        return {**self.supervised(source, label), "entropy": entropy}


class ColorTransfer(Method[StyleNetworks], name="color_transfer"):
    """Train on source images with each band's mean and standard deviation of target images (Reinhard et al., 2001).

    It is done in the sensor's bands, not in an opponent color space, so that it works with any number of bands.
    """

    style: Style = "domain"
    """Match the source to the target, or (``image``) each source image to one target image, which gives a crop of one
    class the other domain's color."""

    def networks(self, student: nn.Module) -> StyleNetworks:
        return StyleNetworks(student, 2)

    def losses(self, nets: StyleNetworks, batch: Batch) -> Losses:
        """Supervised loss on recolored source images."""
        image, label = batch.source
        own, other = nets.styles(color_moments(image), color_moments(batch.target), self.style)
        return self.supervised(nets.student(match_colors(image, own, other).clamp(0, nets.segmenter.max_value)), label)
