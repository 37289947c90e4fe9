"""Adaptation of a large network and a small one in one run, after DUDA (Kang et al., 2025, arXiv:2504.09814)."""

from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from overfly.core.optimizers import Optim
from overfly.core.records import IGNORE, Batch, Losses
from overfly.core.spec import NonNegativeFloat
from overfly.methods.distillation import load_teacher
from overfly.methods.method import prefixed
from overfly.methods.multiscale_self_training import BATCH_EMA, MultiscaleNetworks, MultiscaleSelfTraining
from overfly.ops.pseudo_labels import ema_update


class LargeTeacherNetworks(MultiscaleNetworks):
    """The small student and its average ``teacher``, for inference; the ``large`` student and its teacher.

    Attributes:
        inconsistency: moving average of each class's inconsistency (K,), 0 to 1: 1 minus the IoU of the small
            student's prediction with the large teacher's labels.
    """

    eval_networks: ClassVar[tuple[str, ...]] = ("teacher", "large.teacher")

    inconsistency: Tensor

    def __init__(self, student: nn.Module, large: MultiscaleNetworks) -> None:
        super().__init__(student)
        self.large = large
        self.register_buffer("inconsistency", torch.ones(len(self.thresholds)))


class LargeTeacher(MultiscaleSelfTraining, name="large_teacher"):
    """Adapt a large network to the target, and train a small one on its pseudo-labels, in one run (after DUDA, 2025).

    The large network adapts itself as `multiscale_self_training` does, with a teacher of its own. The small student
    learns from the same source and mixed images; classes in which it differs from the large teacher's labels get larger
    weights. The paper trains in two stages and with several teachers; here both networks are trained together to the
    end. Inference uses the average of the small student. Both learn at the recipe's rate.
    """

    teacher: Path
    """The large network, trained on the source: a run folder or a weights file, of the student's classes and bands."""
    inconsistency_weight: NonNegativeFloat = 1.0
    """Strength of the class weights ``1 + inconsistency_weight × inconsistency``, scaled to a mean of 1 over the
    classes; 0: equal weights."""

    def networks(self, student: nn.Module) -> LargeTeacherNetworks:
        """The small student and the large network; errors as for `load_teacher`."""
        large = load_teacher(self.teacher, student).requires_grad_(True)
        return LargeTeacherNetworks(student, super().networks(large))

    def losses(self, nets: MultiscaleNetworks, batch: Batch) -> Losses:
        """The large network's losses, and the small student's on the same images."""
        assert isinstance(nets, LargeTeacherNetworks)  # noqa: S101 - made by `networks`
        large = nets.large
        large.step = nets.step
        mixed, mask, confident = self.mix(large, batch)

        def weight(scores: Tensor) -> Tensor:
            nets.inconsistency.copy_(inconsistency(scores.argmax(1), mixed.label, nets.inconsistency))
            weights = 1 + self.inconsistency_weight * nets.inconsistency
            return (weights / weights.mean())[mixed.label.clamp_max(len(weights) - 1)]

        return {
            **prefixed("large", self.mixed_losses(large.student, batch.source, mixed, mask)),
            **self.mixed_losses(nets.student, batch.source, mixed, mask, weight),
            "confident_share": confident,
        }

    def optimizers(self, nets: MultiscaleNetworks, optim: Optim) -> list[Optimizer]:
        """One optimizer of the small student, one of the large."""
        assert isinstance(nets, LargeTeacherNetworks)  # noqa: S101 - made by `networks`
        return [*super().optimizers(nets, optim), *super().optimizers(nets.large, optim)]

    def after_step(self, nets: MultiscaleNetworks, step: int) -> None:
        """Move both teachers towards their students."""
        assert isinstance(nets, LargeTeacherNetworks)  # noqa: S101 - made by `networks`
        ema_update(nets.large.teacher, nets.large.student, self.ema)
        super().after_step(nets, step)


def inconsistency(predicted: Tensor, label: Tensor, average: Tensor) -> Tensor:
    """Moving average (K,) of 1 minus the IoU of each class between predicted ids and labels (B, H, W).

    ``average`` (K,) is the one so far, which classes keep that are in neither; ignored pixels count nowhere.
    """
    ids = torch.arange(len(average), device=label.device).view(-1, 1)
    own, other = (predicted.flatten() == ids) & (label != IGNORE).flatten(), label.flatten() == ids
    common, union = (own & other).sum(1), (own | other).sum(1)
    return torch.where(union > 0, torch.lerp(1 - common / union.clamp_min(1), average, BATCH_EMA), average)
