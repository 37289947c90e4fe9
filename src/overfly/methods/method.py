"""What a method must say: the networks it needs, and what to minimize."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import ClassVar, Generic, Self, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from overfly.core.optimizers import Optim
from overfly.core.records import Batch, Logits, Losses
from overfly.core.spec import Choice, Share
from overfly.models.segmenter import Segmenter
from overfly.ops.criterion import Criterion, CrossEntropy
from overfly.ops.pseudo_labels import ema_update


class Networks(nn.Module):
    """All networks of a method: everything that training changes and a checkpoint holds.

    Attributes:
        student: the network that is trained.
        step: optimizer steps done so far; a Python integer, so that reading it never waits for the device.
    """

    step: int = 0

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.student = student

    @property
    def segmenter(self) -> Segmenter:
        """The student, with its classes and the value range of its sensor."""
        return cast(Segmenter, self.student)

    def get_extra_state(self) -> Tensor:
        """The step, for the state dict."""
        return torch.tensor(self.step)

    def set_extra_state(self, state: Tensor) -> None:
        """Restore the step from a state dict."""
        self.step = int(state)


class TeacherStudent(Networks):
    """A student and its teacher, an exponential moving average in evaluation mode without gradients."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__(student)
        self.teacher = copy.deepcopy(student).requires_grad_(requires_grad=False).eval()

    def train(self, mode: bool = True) -> Self:
        """Set the student's mode; the teacher stays in evaluation mode."""
        super().train(mode)
        self.teacher.eval()
        return self


N = TypeVar("N", bound=Networks)
T = TypeVar("T", bound=TeacherStudent)


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
        """Update what is not trained by gradients, after the optimizers' step ``step`` (from 0); count the step."""
        nets.step = step + 1

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

    def pseudo_supervised(self, logits: Logits, label: Tensor, weight: Tensor | None = None) -> Losses:
        """The criterion's terms for pseudo-labels: no boundary of a pseudo-label is ever learned."""
        return self.criterion.model_copy(update={"boundary": 0.0}).terms(logits, label, weight)


class SelfTraining(Method[T], Generic[T]):
    """A method whose teacher, the moving average of the student, labels the target; the teacher is deployed."""

    ema_warmup: ClassVar[bool] = True
    """Whether the average starts as a plain mean of the first students (for a student that starts untrained)."""

    ema: Share = 0.99
    """Decay of the teacher's moving average: the share of the teacher that every step keeps."""

    def after_step(self, nets: T, step: int) -> None:
        """Move the teacher towards the student."""
        ema_update(nets.teacher, nets.student, self.ema, step if self.ema_warmup else None)
        super().after_step(nets, step)

    def deployed(self, nets: T) -> nn.Module:
        """The teacher."""
        return nets.teacher


def prefixed(prefix: str, terms: Losses, weight: float = 1.0) -> dict[str, Tensor]:
    """Terms whose names begin with what they are of, times a weight."""
    return {f"{prefix}_{name}": weight * term for name, term in terms.items()}
