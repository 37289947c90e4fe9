"""MIC: masked image consistency (Hoyer et al., 2023, arXiv:2212.01322)."""

from __future__ import annotations

from overfly.core.records import Batch, Losses
from overfly.core.spec import NonNegative, Pixels, Share
from overfly.methods.dacs import DACS, MixNetworks
from overfly.methods.method import named
from overfly.ops.color import recolored
from overfly.ops.masking import block_mask, cover
from overfly.ops.normalization import together, untracked_statistics


class MIC(DACS, name="mic"):
    """DACS, and target images with random squares covered must get the labels of the whole ones (Hoyer et al., 2023).

    Source and mixed images go through the student in one pass. Covered ones go after it and leave its running
    statistics alone: the network that is shipped never sees an image in which most is flat.
    """

    ema: Share = 0.999
    """Share of the teacher that is kept at every step."""
    block: Pixels = 64
    """Side of the covered squares in pixels; the paper takes 64 for crops of 1024, 32 at half that resolution."""
    ratio: Share = 0.7
    """Share of the squares that are covered."""
    masked: NonNegative = 1.0
    """Weight of the covered images' terms."""

    def losses(self, nets: MixNetworks, batch: Batch) -> Losses:
        """DACS, and the teacher's labels on covered target images."""
        image, label = batch.source
        if nets.steps < self.warmup:
            return self.on_source(nets, nets.student(image), label)
        mix = self.mix(nets, batch)
        view = recolored(batch.target, self.strong, nets.segmenter.max_value)
        covered = cover(view, block_mask(view, self.block, self.ratio))
        source, mixed = together(nets.student, image, mix.image)
        with untracked_statistics(nets.student):
            masked = nets.student(covered)
        return {
            **self.on_source(nets, source, label),
            **self.on_mixed(mixed, mix),
            **named("masked", self.imitated(masked, mix.pseudo, mix.quality), self.masked),
        }
