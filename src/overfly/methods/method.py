"""What a method must say: the networks it needs, and what to minimize."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import ClassVar, Generic, Self, TypeVar, cast

from torch import Tensor, nn
from torch.optim import Optimizer

from overfly.core.optimizers import Optim
from overfly.core.records import Batch, Logits, Losses
from overfly.core.spec import Choice
from overfly.models.segmenter import Segmenter
from overfly.ops.criterion import Criterion, CrossEntropy


class Networks(nn.Module):
    """All the networks of a method: everything that training changes and a checkpoint holds."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.student = student

    @property
    def segmenter(self) -> Segmenter:
        """The student, with its classes and its sensor's range."""
        return cast(Segmenter, self.student)


class TeacherStudent(Networks):
    """A student and a teacher that follows it; the teacher is always in evaluation mode and never has gradients."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__(student)
        self.teacher = copy.deepcopy(student).requires_grad_(requires_grad=False).eval()

    def train(self, mode: bool = True) -> Self:
        """Set the student's mode; the teacher stays as it is."""
        super().train(mode)
        self.teacher.eval()
        return self


N = TypeVar("N", bound=Networks)


class Method(Choice, ABC, Generic[N]):
    """A way to train or adapt: a value (its settings) that says which networks it needs and what to minimize.

    A method returns named losses. It never calls ``backward``, never logs, and never knows a dataset.
    """

    needs_source: ClassVar[bool] = True
    """Whether a step reads labeled images of the source."""
    needs_target: ClassVar[bool] = True
    """Whether a step reads unlabeled images of the target."""
    takes_source: ClassVar[bool] = False
    """Whether a step also reads labeled images of the source where the recipe has one."""
    needs_start: ClassVar[bool] = False
    """Whether it only changes a network that is trained already."""

    trains: ClassVar[bool] = True
    """Whether anything is minimized."""

    criterion: Criterion = CrossEntropy()
    """The supervised loss on labeled images."""

    @property
    def leaves_weights_out(self) -> bool:
        """Whether some step gives some trainable weight no gradient; several processes must know."""
        return self.criterion.aux == 0 or self.criterion.boundary == 0

    @abstractmethod
    def networks(self, student: nn.Module) -> N:
        """Surround the student with the other networks that the method needs."""

    @abstractmethod
    def losses(self, nets: N, batch: Batch) -> Losses:
        """One step of the paper's algorithm: named terms whose sum is minimized.

        Random choices come from torch's global generator, which the loop seeds by (seed, step, rank).
        """

    def after_step(self, nets: N, step: int) -> None:
        """What follows the optimizer, such as the teacher's update. ``step`` counts from 0."""

    def optimizers(self, nets: N, optim: Optim) -> list[Optimizer]:
        """The optimizers of a step; by default one, of the student. None: nothing is minimized."""
        return [optim.optimizer(nets.student, getattr(nets.student, "heads", ()))]

    def deployed(self, nets: N) -> nn.Module:
        """The network that is validated, saved and shipped; by default the student."""
        return nets.student

    def supervised(
        self, logits: Logits, label: Tensor, weight: Tensor | None = None, *, where: Tensor | None = None
    ) -> Losses:
        """The criterion's terms for logits at the label's size.

        Args:
            logits: class scores (B, K, H, W) and those of the training heads.
            label: class ids (B, H, W), 255 where there is none.
            weight: of each pixel, (B, H, W) or (B, 1, 1), 0 to 1.
            where: True at pixels whose boundaries may be trusted (B, H, W): in mixed images the source's.
        """
        return self.criterion.terms(logits, label, weight, where=where)

    def imitated(self, logits: Logits, label: Tensor, weight: Tensor | None = None) -> Losses:
        """The criterion's terms for pseudo-labels: no boundary of a pseudo-label is ever learned."""
        return self.criterion.model_copy(update={"boundary": 0.0}).terms(logits, label, weight)


def named(prefix: str, terms: Losses, weight: float = 1.0) -> dict[str, Tensor]:
    """Terms whose names begin with what they are of, times a weight."""
    return {f"{prefix}_{name}": weight * term for name, term in terms.items()}
