"""The interface of a method, and the networks that methods train."""

import copy
from abc import ABC, abstractmethod
from typing import ClassVar, Generic, Self, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from overfly.core.optimizers import Optim
from overfly.core.records import IGNORE, Batch, Logits, Losses
from overfly.core.spec import Choice, Share
from overfly.models.segmenter import Segmenter
from overfly.ops.criterion import Criterion, CrossEntropy
from overfly.ops.pseudo_labels import ema_update


class Networks(nn.Module):
    """All networks of a method, as trained and saved in a checkpoint.

    Attributes:
        student: the network that is trained.
        step: optimizer steps done so far; a Python integer, which is read without device synchronization.
        trained: True if training starts from a trained network.
    """

    eval_networks: ClassVar[tuple[str, ...]] = ()
    """Names of the networks that are in evaluation mode while the student trains."""

    step: int = 0
    trained: bool = False

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.student = student

    @property
    def segmenter(self) -> Segmenter:
        """The student, with its classes and the value range of its sensor."""
        return cast(Segmenter, self.student)

    def train(self, mode: bool = True) -> Self:
        """Set the mode; the networks named by `eval_networks` stay in evaluation mode."""
        super().train(mode)
        for name in self.eval_networks:
            self.get_submodule(name).eval()
        return self

    def get_extra_state(self) -> Tensor:
        """The step, for the state dict."""
        return torch.tensor(self.step)

    def set_extra_state(self, state: Tensor) -> None:
        """Restore the step from a state dict."""
        self.step = int(state)


class TeacherStudent(Networks):
    """A student and its teacher, an exponential moving average in evaluation mode without gradients."""

    eval_networks: ClassVar[tuple[str, ...]] = ("teacher",)

    def __init__(self, student: nn.Module) -> None:
        super().__init__(student)
        self.teacher = copy.deepcopy(student).requires_grad_(False).eval()


N = TypeVar("N", bound=Networks)
T = TypeVar("T", bound=TeacherStudent)


class Method(Choice, ABC, Generic[N]):
    """A training or adaptation method: its settings, the networks that it needs, and its losses.

    A method returns named losses. It never calls ``backward``, never logs, and depends on no dataset.
    """

    needs_source: ClassVar[bool] = True
    """True if a step reads labeled images of the source."""
    needs_target: ClassVar[bool] = True
    """True if a step reads unlabeled images of the target."""
    uses_optional_source: ClassVar[bool] = False
    """True if a step reads labeled images of the source if the recipe has one."""
    needs_start: ClassVar[bool] = False
    """True if the student must be a trained network."""
    trains: ClassVar[bool] = True
    """True if a loss is minimized."""
    source_statistics: ClassVar[bool] = False
    """True if batch-normalization statistics are estimated again on the source when training ends."""

    criterion: Criterion = CrossEntropy()
    """Supervised loss on labeled images."""

    @property
    def has_unused_parameters(self) -> bool:
        """True if some trainable weights get no gradient in some step; see ``find_unused_parameters`` of PyTorch."""
        return self.criterion.aux == 0 or self.criterion.boundary == 0

    def networks(self, student: nn.Module) -> N:
        """Create the networks of the method, by default the student alone."""
        return cast(N, Networks(student))

    @abstractmethod
    def losses(self, nets: N, batch: Batch) -> Losses:
        """One step of the paper's algorithm: named terms whose sum is minimized.

        Random choices come from torch's global generator, which the trainer seeds by (seed, step, rank).
        """

    def after_step(self, nets: N, step: int) -> None:
        """Update averages such as the teacher after optimizer step ``step`` (from 0), and count the step."""
        nets.step = step + 1

    def optimizers(self, nets: N, optim: Optim) -> list[Optimizer]:
        """Create the optimizers, by default one of the student; empty if no loss is minimized."""
        return [optim.optimizer(nets.student, getattr(nets.student, "heads", ()))]

    def inference_network(self, nets: N) -> nn.Module:
        """The network that is validated, saved and exported; by default the student."""
        return nets.student

    def supervised(
        self, logits: Logits, label: Tensor, weight: Tensor | None = None, *, where: Tensor | None = None
    ) -> Losses:
        """Supervised loss terms for logits at the label's size; the arguments are those of `Criterion.terms`."""
        return self.criterion.terms(logits, label, weight, where=where)

    def pseudo_supervised(self, logits: Logits, label: Tensor, weight: Tensor | None = None) -> Losses:
        """Supervised loss terms for pseudo-labels, without the boundary head."""
        return self.criterion.model_copy(update={"boundary": 0.0}).terms(logits, label, weight)


class SelfTraining(Method[T], Generic[T]):
    """A method whose teacher, the moving average of the student, labels the target; inference uses the teacher."""

    ema: Share = 0.99
    """Decay of the teacher's moving average: the share of the teacher that every step keeps."""
    ema_warmup: bool | None = None
    """Whether the average starts as the plain mean of the students so far (``min(ema, 1 - 1 / (step + 1))``): after the
    first step the teacher is the student, and what the start knew is gone. none: only for an untrained network, that
    is without ``start``."""

    def networks(self, student: nn.Module) -> T:
        """The student and its teacher; override where the method needs more."""
        return cast(T, TeacherStudent(student))

    def after_step(self, nets: T, step: int) -> None:
        """Move the teacher towards the student."""
        untrained = not (nets.trained or self.needs_start)
        warmup = untrained if self.ema_warmup is None else self.ema_warmup
        ema_update(nets.teacher, nets.student, self.ema, step if warmup else None)
        super().after_step(nets, step)

    def inference_network(self, nets: T) -> nn.Module:
        """The teacher."""
        return nets.teacher

    def target_loss(self, logits: Logits, label: Tensor, weight: float = 1.0) -> dict[str, Tensor]:
        """Loss on pseudo-labels (B, H, W) of target images, and for the log the share of pixels that have one."""
        share = (label != IGNORE).float().mean()
        return {**prefixed("target", self.pseudo_supervised(logits, label), weight), "confident_share": share}


def prefixed(prefix: str, terms: Losses, weight: float = 1.0) -> dict[str, Tensor]:
    """Multiply terms by ``weight``, and prefix their names."""
    return {f"{prefix}_{name}": weight * term for name, term in terms.items()}
