"""A large adapted network teaches the one that is trained (after Hinton et al., 2015, arXiv:1503.02531)."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from overfly.core.errors import RecipeError
from overfly.core.records import Batch, Logits, Losses
from overfly.core.spec import NonNegative, Positive
from overfly.methods.method import Method, Networks, prefixed
from overfly.models.segmenter import Segmenter
from overfly.ops.losses import soft_label_loss
from overfly.ops.normalization import joint_forward


class TaughtNetworks(Networks):
    """A student, and a teacher that never changes."""

    def __init__(self, student: nn.Module, teacher: Segmenter) -> None:
        super().__init__(student)
        self.teacher = teacher.requires_grad_(requires_grad=False).eval()

    def train(self, mode: bool = True) -> Self:
        """Set the student's mode; the teacher stays as it is."""
        super().train(mode)
        self.teacher.eval()
        return self


class Distill(Method[TaughtNetworks], name="distill"):
    """A trained network of any architecture gives soft labels to target images; the student learns them (Hinton, 2015).

    Where the recipe has a source, its labels are learned too, source and target in one pass.
    """

    needs_source: ClassVar[bool] = False
    takes_source: ClassVar[bool] = True

    teacher: Path
    """The trained network: a run folder or a Segmenter's file, with the student's classes and bands."""
    temperature: Positive = 2.0
    """What scores are divided by: the higher, the more the less probable classes count."""
    weight: NonNegative = 1.0
    """Weight of the soft labels."""
    source: NonNegative = 1.0
    """Weight of the source's labels."""

    def networks(self, student: nn.Module) -> TaughtNetworks:
        """The student and its teacher.

        Raises:
            RecipeError: there is no trained teacher, or it does not fit the student.
            WeightsError: its file is damaged.
        """
        path = self.teacher
        if path.is_dir():
            path = path / "checkpoints" / "best.safetensors"
        if not path.is_file():
            raise RecipeError(
                f"method.teacher: there is no trained network at {self.teacher}; give the folder of a finished run or "
                "a Segmenter's file"
            )
        nets = TaughtNetworks(student, Segmenter.load(path, training_heads=False))
        own, given = nets.segmenter, nets.teacher
        if (own.classes.names, own.bands, own.max_value) != (given.classes.names, given.bands, given.max_value):
            raise RecipeError(
                f"method.teacher: {self.teacher} knows {given.bands} bands up to {given.max_value:g} and the classes "
                f"{', '.join(given.classes.names)}, the student {own.bands} up to {own.max_value:g} and "
                f"{', '.join(own.classes.names)}; give a teacher of the same classes, bands and range of values"
            )
        return nets

    def losses(self, nets: TaughtNetworks, batch: Batch) -> Losses:
        """The teacher's soft labels on the target, and the criterion on the source if there is one."""
        with torch.no_grad():
            given = nets.teacher.scores(batch.target)
        if not len(batch.source.image):
            return self.on_target(nets.student(batch.target), given, batch.valid_mask)
        source, target = joint_forward(nets.student, batch.source.image, batch.target)
        return {
            **prefixed("source", self.supervised(source, batch.source.label), self.source),
            **self.on_target(target, given, batch.valid_mask),
        }

    def on_target(self, logits: Logits, given: Tensor, valid_mask: Tensor | None) -> dict[str, Tensor]:
        """Soft labels for the class scores, and for those of auxiliary heads by the criterion's weight."""
        terms = {"soft": self.weight * soft_label_loss(logits.main, given, self.temperature, valid_mask)}
        if logits.aux and self.criterion.aux:
            each = [soft_label_loss(scores, given, self.temperature, valid_mask) for scores in logits.aux]
            terms["soft_aux"] = self.weight * self.criterion.aux * torch.stack(each).sum()
        return terms
