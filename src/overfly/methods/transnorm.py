"""TransNorm: transferable normalization (Wang et al., 2019, NeurIPS)."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from overfly.core.records import Batch, Losses
from overfly.core.spec import NonNegative
from overfly.methods.method import Method, Networks
from overfly.ops.losses import mean_entropy
from overfly.ops.normalization import joint_forward, replace_modules


class TransferableNorm(nn.Module):
    """Statistics of each domain, one scale and shift, and more weight to channels in which the domains agree.

    In training the first half of a batch is the source's; at test time all is target.

    Args:
        norm: what it begins as.
    """

    def __init__(self, norm: _BatchNorm) -> None:
        super().__init__()
        self.norm = norm
        self.source = self._plain(norm)
        self.target = self._plain(norm)

    @staticmethod
    def _plain(norm: _BatchNorm) -> nn.BatchNorm2d:
        """The statistics of a normalization without its scale and shift."""
        plain = nn.BatchNorm2d(norm.num_features, norm.eps, norm.momentum, affine=False)
        plain.load_state_dict({key: value for key, value in norm.state_dict().items() if key not in ("weight", "bias")})
        return plain

    def attention(self, means: tuple[Tensor, Tensor], variances: tuple[Tensor, Tensor]) -> Tensor:
        """``1 + alpha`` of each channel (C,), from the statistics (C,) of source and target.

        ``alpha = C p / sum(p)`` with ``p = 1 / (1 + d)``; d is the distance of the means, each over its deviation.
        """
        source, target = (
            mean / (variance + self.norm.eps).sqrt() for mean, variance in zip(means, variances, strict=True)
        )
        near = 1 / (1 + (source - target).abs())
        return 1 + len(near) * near / near.sum()

    def forward(self, x: Tensor) -> Tensor:
        """Normalize (B, C, H, W), each half by its own statistics."""
        if not self.training:
            return torch.as_tensor(self.folded()(x))
        source, target = x.chunk(2)
        with torch.no_grad():
            source_variance, source_mean = torch.var_mean(source.float(), (0, 2, 3), correction=0)
            target_variance, target_mean = torch.var_mean(target.float(), (0, 2, 3), correction=0)
            scale = self.attention((source_mean, target_mean), (source_variance, target_variance)).to(x.dtype)
        both = torch.cat([self.source(source), self.target(target)])
        shape = (1, -1, 1, 1)
        both = both * self.norm.weight.view(shape) + self.norm.bias.view(shape)
        return both * scale.view(shape)

    @torch.no_grad()
    def folded(self) -> _BatchNorm:
        """An ordinary normalization that gives what this one gives at test time."""
        plain = copy.deepcopy(self.norm)
        means = _known(self.source.running_mean), _known(self.target.running_mean)
        variances = _known(self.source.running_var), _known(self.target.running_var)
        scale = self.attention(means, variances)
        plain.weight.mul_(scale)
        plain.bias.mul_(scale)
        plain.load_state_dict({**plain.state_dict(), **self.target.state_dict()})
        return plain.eval()


def _known(statistic: Tensor | None) -> Tensor:
    """Statistics of a normalization that keeps them."""
    assert statistic is not None  # noqa: S101  (made so above)
    return statistic


class TransNorm(Method[Networks], name="transnorm"):
    """Normalize each domain by itself, and trust channels in which the domains agree (Wang et al., 2019).

    Source and target go through the student in one pass. It is a part to put into a network, to which any loss can be
    added; here that is the criterion on the source and, if so set, entropy on the target. Channels weigh 2 in the mean,
    as published, which the next normalization takes back once its own statistics know of it: a trained network that
    begins so needs some dozens of steps to be what it was. Activations with a ceiling, such as ReLU6, do not take it
    back. Deployed is an ordinary network with the target's statistics, the channels' weights folded into scales and
    shifts.
    """

    entropy: NonNegative = 0.0
    """Weight of the entropy of the target's predictions."""

    def networks(self, student: nn.Module) -> Networks:
        """The student, every batch normalization made transferable."""
        replace_modules(student, _BatchNorm, TransferableNorm)
        return Networks(student)

    def losses(self, nets: Networks, batch: Batch) -> Losses:
        """The criterion on the source, and the entropy on the target."""
        source, target = joint_forward(nets.student, batch.source.image, batch.target)
        terms = dict(self.supervised(source, batch.source.label))
        if self.entropy:
            terms["entropy"] = self.entropy * mean_entropy(target.main, batch.valid_mask)
        return terms

    def deployed(self, nets: Networks) -> nn.Module:
        """The student with ordinary normalizations."""
        ordinary = copy.deepcopy(nets.student)
        replace_modules(ordinary, TransferableNorm, TransferableNorm.folded)
        return ordinary
