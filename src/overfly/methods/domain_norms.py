"""Normalization per domain: DSBN (Chang et al., CVPR 2019, arXiv:1906.03950), TransNorm (Wang et al., NeurIPS 2019)."""

import copy
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from overfly.core.records import Batch, Losses
from overfly.core.spec import NonNegativeFloat, Share
from overfly.methods.method import Method, Networks, SelfTraining, TeacherStudent, prefixed
from overfly.models.segmenter import Segmenter
from overfly.ops.losses import mean_entropy
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
            **self.target_loss(target, label, self.weight),
        }

    def inference_network(self, nets: TeacherStudent) -> nn.Module:
        """The teacher with the target's normalizations alone."""
        ordinary = copy.deepcopy(nets.teacher)
        replace_modules(ordinary, DomainNorm, lambda norm: norm.target)
        return ordinary


class TransferableNorm(nn.Module):
    """Batch normalization with statistics per domain, shared scale and shift, and weights of transferable channels.

    In training the first half of a batch is source; at test time all is target. ``norm`` is the initial value.
    """

    def __init__(self, norm: _BatchNorm) -> None:
        super().__init__()
        self.norm = norm
        self.source = self._without_affine(norm)
        self.target = self._without_affine(norm)

    @staticmethod
    def _without_affine(norm: _BatchNorm) -> nn.BatchNorm2d:
        """The statistics of a normalization without its scale and shift."""
        plain = nn.BatchNorm2d(norm.num_features, norm.eps, norm.momentum, affine=False)
        plain.load_state_dict({key: value for key, value in norm.state_dict().items() if key not in ("weight", "bias")})
        return plain

    def channel_weight(self, means: tuple[Tensor, Tensor], variances: tuple[Tensor, Tensor]) -> Tensor:
        """Weight ``(1 + alpha) / 2`` of each channel (C,), 1 in the mean, from the statistics (C,) of both domains.

        ``alpha = C p / sum(p)`` with ``p = 1 / (1 + d)``, where d is the distance of the means, each over its standard
        deviation. For equal domains all weights are 1.
        """
        source, target = (
            mean / (variance + self.norm.eps).sqrt() for mean, variance in zip(means, variances, strict=True)
        )
        p = 1 / (1 + (source - target).abs())
        return (1 + len(p) * p / p.sum()) / 2

    def forward(self, x: Tensor) -> Tensor:
        """Normalize (B, C, H, W), in training each half by its own statistics."""
        if not self.training:
            return torch.as_tensor(self.folded()(x))
        source, target = x.chunk(2)
        with torch.no_grad():
            source_variance, source_mean = torch.var_mean(source.float(), (0, 2, 3), correction=0)
            target_variance, target_mean = torch.var_mean(target.float(), (0, 2, 3), correction=0)
            weight = self.channel_weight((source_mean, target_mean), (source_variance, target_variance)).to(x.dtype)
        both = torch.cat([self.source(source), self.target(target)])
        shape = (1, -1, 1, 1)
        both = both * self.norm.weight.view(shape) + self.norm.bias.view(shape)
        return both * weight.view(shape)

    @torch.no_grad()
    def folded(self) -> _BatchNorm:
        """An ordinary batch normalization of equal output at test time."""
        plain = copy.deepcopy(self.norm)
        source, target = self.source, self.target
        means, variances = (source.running_mean, target.running_mean), (source.running_var, target.running_var)
        weight = self.channel_weight(means, variances)  # type: ignore[arg-type]  # both track statistics
        plain.weight.mul_(weight)
        plain.bias.mul_(weight)
        plain.load_state_dict({**plain.state_dict(), **target.state_dict()})
        return plain.eval()


class TransNorm(Method[Networks], name="transnorm"):
    """Normalize each domain by its own statistics, weigh channels by how similar they are (Wang et al., 2019).

    Source and target share one forward pass. The losses are the supervised loss on the source and, optionally, entropy
    on the target. The published weights of channels, ``1 + alpha``, have a mean of 2; here it is 1, so that a trained
    network keeps its scores where the domains are equal: no normalization follows PIDNet's sigmoid gates and class
    layers, whose inputs a mean of 2 doubles. The inference network is ordinary, with the target's statistics.
    """

    entropy: NonNegativeFloat = 0.0
    """Weight of the entropy of the target's predictions."""

    def networks(self, student: nn.Module) -> Networks:
        replace_modules(student, _BatchNorm, TransferableNorm)
        return Networks(student)

    def losses(self, nets: Networks, batch: Batch) -> Losses:
        """Supervised loss on the source; entropy on the target."""
        source, target = joint_forward(nets.student, batch.source.image, batch.target)
        terms = dict(self.supervised(source, batch.source.label))
        if self.entropy:
            terms["entropy"] = self.entropy * mean_entropy(target.main, batch.valid_mask)
        return terms

    def inference_network(self, nets: Networks) -> nn.Module:
        """The student with ordinary batch normalizations."""
        ordinary = copy.deepcopy(nets.student)
        replace_modules(ordinary, TransferableNorm, TransferableNorm.folded)
        return ordinary
