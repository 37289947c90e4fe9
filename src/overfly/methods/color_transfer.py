"""Color transfer: source images with the color statistics of target images (after Reinhard et al., 2001)."""

from __future__ import annotations

from overfly.core.records import Batch, Losses
from overfly.methods.method import Method, Networks
from overfly.ops.color import match_colors


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
