"""DSBN: domain-specific batch normalization (Chang et al., CVPR 2019, arXiv:1906.03950)."""

from __future__ import annotations

import copy
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from overfly.core.records import Batch, Losses
from overfly.core.spec import NonNegativeFloat, Share
from overfly.methods.method import SelfTraining, TeacherStudent, prefixed
from overfly.models.segmenter import Segmenter
from overfly.ops.normalization import joint_forward, replace_modules
from overfly.ops.pseudo_labels import class_thresholds, filter_by_threshold, pseudo_label


class DomainNorm(nn.Module):
    """A copy of ``norm`` per domain: in training the first half of a batch is source; at test time all is target."""

    def __init__(self, norm: _BatchNorm) -> None:
        super().__init__()
        self.source = copy.deepcopy(norm)
        self.target = norm

    def forward(self, x: Tensor) -> Tensor:
        """Normalize (B, C, H, W), in training each half by its own branch."""
        if not self.training:
            return torch.as_tensor(self.target(x))
        source, target = x.chunk(2)
        return torch.cat([self.source(source), self.target(target)])


class DSBN(SelfTraining[TeacherStudent], name="dsbn"):
    """Share convolutions between the domains, with separate batch normalizations (Chang et al., 2019).

    Source and target share one forward pass, each with its own statistics, scales and shifts. The target branch trains
    on the most confident pseudo-labels of each class, from a teacher that uses the target branch (the paper takes the
    first pseudo-labels from another method). Training heads keep one normalization. Inference uses the teacher with its
    target branch, as an ordinary network.
    """

    share: Share = 0.5
    """Share of each class's pixels that is kept."""
    weight: NonNegativeFloat = 1.0
    """Weight of the losses on pseudo-labels."""

    def networks(self, student: nn.Module) -> TeacherStudent:
        """Student and teacher, every batch normalization replaced by one per domain."""
        network = cast(Segmenter, student).network
        replace_modules(network, _BatchNorm, DomainNorm, skip=network.training_heads)
        return TeacherStudent(student)

    def losses(self, nets: TeacherStudent, batch: Batch) -> Losses:
        """Supervised loss on the source; pseudo-label loss on the target."""
        pseudo = pseudo_label(nets.teacher(batch.target).main, batch.nodata_mask)
        label = filter_by_threshold(pseudo, class_thresholds(pseudo, self.share, len(nets.segmenter.classes)))
        source, target = joint_forward(nets.student, batch.source.image, batch.target)
        return {
            **prefixed("source", self.supervised(source, batch.source.label)),
            **prefixed("target", self.pseudo_supervised(target, label), self.weight),
        }

    def inference_network(self, nets: TeacherStudent) -> nn.Module:
        """The teacher with the target's normalizations alone."""
        ordinary = copy.deepcopy(nets.teacher)
        replace_modules(ordinary, DomainNorm, lambda norm: norm.target)
        return ordinary
