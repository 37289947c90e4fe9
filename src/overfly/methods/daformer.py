"""DAFormer's training, for convolutional networks too (Hoyer et al., 2022, arXiv:2111.14887)."""

from __future__ import annotations

import copy
from typing import Self, cast

import torch
from torch import nn

from overfly.core.records import Batch, Losses
from overfly.core.spec import NonNegative, Share, Whole
from overfly.methods.dacs import DACS, MixNetworks
from overfly.ops.distillation import feature_distance, majority
from overfly.ops.normalization import together


class AnchoredNetworks(MixNetworks):
    """Student and teacher, and the network that both began as, which never changes."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__(student)
        self.anchor = copy.deepcopy(student).requires_grad_(requires_grad=False).eval()

    def train(self, mode: bool = True) -> Self:
        """Set the student's mode; teacher and anchor stay as they are."""
        super().train(mode)
        self.anchor.eval()
        return self


class DAFormer(DACS, name="daformer"):
    """DACS, a warm-up, and features that stay near those of the starting encoder (Hoyer et al., 2022).

    Of the paper's other ingredients, rare-class sampling is a recipe's ``sampling: rare`` and the warm-up of the
    learning rate its ``schedule.warmup``. The distance only means something where training begins from weights.
    It is taken at the map that the network gives its class layer, the anchor normalized by its running statistics and
    the student by the batch's, so that it is not 0 at the first step.
    """

    ema: Share = 0.999
    """Share of the teacher that is kept at every step."""
    warmup: Whole = 500
    """Steps on the source alone before the first pseudo-label."""
    features: NonNegative = 0.005
    """Weight of the distance of source features to those of the starting encoder."""
    things: tuple[Whole, ...] = ()
    """Ids of the classes on which the distance counts (in the paper things, not stuff); left out, all."""
    filled: Share = 0.75
    """How much of a feature's cell one class must fill for the cell to count."""

    def networks(self, student: nn.Module) -> AnchoredNetworks:
        """Student, teacher, and the network that both began as."""
        return AnchoredNetworks(student)

    def losses(self, nets: MixNetworks, batch: Batch) -> Losses:
        """DACS, and the feature distance on the source."""
        image, label = batch.source
        warm = bool(nets.steps >= self.warmup)
        mix = self.mix(nets, batch) if warm else None
        source, *mixed = together(nets.student, image, *([mix.image] if mix else []))
        terms = self.on_source(nets, source, label)
        if mix:
            terms |= self.on_mixed(mixed[0], mix)
        if self.features and source.features is not None:
            with torch.no_grad():
                anchor = cast(AnchoredNetworks, nets).anchor(image).features
            cells = majority(label, (anchor.shape[2], anchor.shape[3]), self.filled, len(nets.weights))
            chosen = torch.tensor(self.things or range(len(nets.weights)), device=cells.device)
            distance = feature_distance(source.features, anchor, torch.isin(cells, chosen))
            terms["feature_distance"] = self.features * distance
        return terms
