"""Domain-specific batch normalization (Chang et al., 2019, arXiv:1906.03950)."""

from __future__ import annotations

import copy
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from overfly.core.records import Batch, Losses
from overfly.core.spec import NonNegative, Share
from overfly.methods.method import Method, TeacherStudent, named
from overfly.models.segmenter import Segmenter
from overfly.ops.normalization import replace, together
from overfly.ops.pseudo_labels import follow, keep_above, pseudo_label, surest


class DomainNorm(nn.Module):
    """Two batch normalizations. In training the first half of a batch is the source's; at test time all is target.

    Args:
        norm: what both begin as.
    """

    def __init__(self, norm: _BatchNorm) -> None:
        super().__init__()
        self.source = copy.deepcopy(norm)
        self.target = norm

    def forward(self, x: Tensor) -> Tensor:
        """Normalize (B, C, H, W), each half by its own."""
        if not self.training:
            return torch.as_tensor(self.target(x))
        source, target = x.chunk(2)
        return torch.cat([self.source(source), self.target(target)])


class DSBN(Method[TeacherStudent], name="dsbn"):
    """Share every convolution between the domains, and no normalization (Chang et al., 2019).

    Source and target go through the student in one pass and each through its own statistics, scales and shifts; the
    target's learn from the surest pseudo-labels of every class, of a teacher that looks through the target's branch
    (the paper takes those of another method first). Heads that only training reads keep one normalization. The
    teacher's target branch is deployed, an ordinary network.
    """

    ema: Share = 0.99
    """Share of the teacher that is kept at every step."""
    share: Share = 0.5
    """Share of each class's pixels, the surest, that is learned from."""
    weight: NonNegative = 1.0
    """Weight of the pseudo-labels' terms."""

    def networks(self, student: nn.Module) -> TeacherStudent:
        """Student and teacher with two normalizations wherever there was one."""
        network = cast(Segmenter, student).network
        replace(network, _BatchNorm, DomainNorm, skip=network.training_heads)
        return TeacherStudent(student)

    def losses(self, nets: TeacherStudent, batch: Batch) -> Losses:
        """The criterion on the source, and on the target's surest pseudo-labels."""
        pseudo = pseudo_label(nets.teacher(batch.target).main, batch.nodata_mask)
        kept = keep_above(pseudo, surest(pseudo, self.share, len(nets.segmenter.classes)))
        source, target = together(nets.student, batch.source.image, batch.target)
        return {
            **named("source", self.supervised(source, batch.source.label)),
            **named("target", self.imitated(target, kept), self.weight),
        }

    def after_step(self, nets: TeacherStudent, step: int) -> None:
        """The teacher follows the student."""
        follow(nets.teacher, nets.student, self.ema, step)

    def deployed(self, nets: TeacherStudent) -> nn.Module:
        """The teacher with the target's normalizations alone."""
        ordinary = copy.deepcopy(nets.teacher)
        replace(ordinary, DomainNorm, lambda norm: norm.target)
        return ordinary
