"""Source images in the style of the target: FDA (Yang and Soatto, CVPR 2020, arXiv:2004.05498), color transfer."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from overfly.core.records import Batch, Losses
from overfly.core.spec import NonNegativeFloat
from overfly.methods.method import Method, Networks
from overfly.ops.color import match_colors, swap_low_frequencies
from overfly.ops.losses import charbonnier_entropy
from overfly.ops.normalization import joint_forward


class FDA(Method[Networks], name="fda"):
    """Train on source images with the low-frequency amplitudes of target images (Yang and Soatto, 2020).

    Each source image takes the amplitudes of one target image and keeps its own phases, in the sensor's range. The
    paper averages networks of several betas; here one beta trains one network.
    """

    beta: Annotated[float, Field(ge=0, le=0.5)] = 0.01
    """Half the side of the swapped square of the spectrum, as a share of the image's side; the paper takes 0.01 to
    0.09. Below one cycle per image (0.01 of 64 pixels) only the mean color is swapped."""
    entropy: NonNegativeFloat = 0.005
    """Weight of the robust entropy of the target's predictions; 0 leaves target images out of the forward pass."""
    power: NonNegativeFloat = 2.0
    """Exponent of that entropy (eta): higher reduces the influence of confident pixels."""

    def losses(self, nets: Networks, batch: Batch) -> Losses:
        """Supervised loss on restyled source images; robust entropy on the target."""
        image, label = batch.source
        restyled = swap_low_frequencies(image, batch.target, self.beta).clamp(0, nets.segmenter.max_value)
        if not self.entropy:
            return self.supervised(nets.student(restyled), label)
        source, target = joint_forward(nets.student, restyled, batch.target)
        return {
            **self.supervised(source, label),
            "entropy": self.entropy * charbonnier_entropy(target.main, self.power),
        }


class ColorTransfer(Method[Networks], name="color_transfer"):
    """Train on source images with each band's mean and standard deviation of target images (Reinhard et al., 2001).

    It is done in the sensor's bands, not in an opponent color space, so that it works with any number of bands.
    """

    per_image: bool = False
    """Match each source image to one target image; otherwise the source batch to the target batch."""

    def losses(self, nets: Networks, batch: Batch) -> Losses:
        """Supervised loss on recolored source images."""
        image, label = batch.source
        recolored = match_colors(image, batch.target, per_image=self.per_image).clamp(0, nets.segmenter.max_value)
        return self.supervised(nets.student(recolored), label)
