"""Distillation: an adapted network of any architecture teaches a light one (Hinton et al., 2015, arXiv:1503.02531)."""

from pathlib import Path
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from overfly.core.errors import RecipeError
from overfly.core.records import Batch, Logits, Losses
from overfly.core.spec import NonNegativeFloat, PositiveFloat
from overfly.methods.method import Method, Networks, prefixed
from overfly.models.segmenter import Segmenter
from overfly.ops.losses import soft_label_loss
from overfly.ops.normalization import joint_forward


def load_teacher(
    path: Path, student: nn.Module, *, training_heads: bool | None = None, setting: str = "method.teacher"
) -> Segmenter:
    """Load the trained network of a run folder or weights file; ``training_heads`` as for `Segmenter.load`.

    Errors name the ``setting`` with its path.

    Raises `RecipeError`: it does not exist, or has other classes, bands or value range than the student.
    """
    file = path / "checkpoints" / "best.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise RecipeError(f"{setting}: {file} does not exist; give a finished run or a weights file")
    own, teacher = cast(Segmenter, student), Segmenter.load(file, training_heads)
    if (own.classes.names, own.bands, own.max_value) != (teacher.classes.names, teacher.bands, teacher.max_value):
        raise RecipeError(
            f"{setting}: {path} has {teacher.bands} bands up to {teacher.max_value:g} and the classes "
            f"{', '.join(teacher.classes.names)}, the student {own.bands} up to {own.max_value:g} and "
            f"{', '.join(own.classes.names)}; give a teacher of the same classes, bands and value range"
        )
    return teacher


class DistillNetworks(Networks):
    """A student, and a frozen teacher in evaluation mode."""

    eval_networks = ("teacher",)

    def __init__(self, student: nn.Module, teacher: Segmenter) -> None:
        super().__init__(student)
        self.teacher = teacher.requires_grad_(False).eval()


class Distill(Method[DistillNetworks], name="distill"):
    """Train the student on a trained network's soft labels of target images (Hinton et al., 2015).

    Where the recipe has a source, the student is trained on its labels too, source and target in one forward pass.
    """

    needs_source: ClassVar[bool] = False
    uses_optional_source: ClassVar[bool] = True

    teacher: Path
    """The trained network: a run folder or a weights file, of the student's classes and bands."""
    temperature: PositiveFloat = 2.0
    """Temperature of the softmax: higher raises the influence of less probable classes."""
    weight: NonNegativeFloat = 1.0
    """Weight of the soft-label loss."""
    source_weight: NonNegativeFloat = 1.0
    """Weight of the supervised loss on the source."""

    def networks(self, student: nn.Module) -> DistillNetworks:
        """The student and its teacher.

        Raises `RecipeError`: the teacher does not exist, or has other classes, bands or value range than the student,
        and `WeightsError`: the teacher's file is damaged.
        """
        return DistillNetworks(student, load_teacher(self.teacher, student, training_heads=False))

    def losses(self, nets: DistillNetworks, batch: Batch) -> Losses:
        """Soft-label loss on the target; supervised loss on the source if there is one."""
        with torch.no_grad():
            soft = nets.teacher.scores(batch.target)
        if not len(batch.source.image):
            return self.soft_terms(nets.student(batch.target), soft, batch.valid_mask)
        source, target = joint_forward(nets.student, batch.source.image, batch.target)
        return {
            **prefixed("source", self.supervised(source, batch.source.label), self.source_weight),
            **self.soft_terms(target, soft, batch.valid_mask),
        }

    def soft_terms(self, logits: Logits, soft: Tensor, valid_mask: Tensor | None) -> dict[str, Tensor]:
        """Soft-label loss of the main scores, and of auxiliary heads with the criterion's weight."""
        terms = {"soft": self.weight * soft_label_loss(logits.main, soft, self.temperature, valid_mask)}
        if logits.aux and self.criterion.aux:
            aux = [soft_label_loss(scores, soft, self.temperature, valid_mask) for scores in logits.aux]
            terms["soft_aux"] = self.weight * self.criterion.aux * torch.stack(aux).sum()
        return terms
