"""MCD: two class layers disagree, features settle it (Saito et al., CVPR 2018, arXiv:1712.02560)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from overfly.core.optimizers import Optim
from overfly.core.records import Batch, Logits, Losses
from overfly.core.spec import Count, NonNegative
from overfly.methods.method import Method
from overfly.methods.two_classifiers import Twins, class_layer, enlarged, look, twin_optimizer
from overfly.ops.adversarial import frozen, given
from overfly.ops.losses import probabilities


class TakingTurns(Twins):
    """A student, a second class layer, and how many steps they have made."""

    turn: Tensor

    def __init__(self, student: nn.Module) -> None:
        super().__init__(student)
        self.register_buffer("turn", torch.zeros((), dtype=torch.int64))


class MCD(Method[TakingTurns], name="mcd"):
    """Two class layers seek target pixels to disagree on, the features learn to leave them none (Saito et al., 2018).

    The paper goes through three phases: A, both class layers and the features learn the source; B, the class layers
    learn the source and to disagree on the target, features given; C, the features learn to make them agree, class
    layers given. ``in_turn`` is that, one step a phase, each with its own batch. ``at_once`` takes all three from one
    forward pass: each weight gets the gradient that its phases give it at the present weights (the source's once), as
    with a layer that reverses gradients. It costs one step where a round of ``in_turn`` has ``2 + repeats``, and is no
    longer the paper's update, since no phase sees what the one before has changed. Discrepancy is measured at the class
    layers' own size.

    Source and target pass the student in one batch: its batch normalization has the statistics of both. What is shipped
    is the student with the first class layer.
    """

    update: Literal["at_once", "in_turn"] = "at_once"
    """All three phases in every step, or one after the other."""
    disagree: NonNegative = 1.0
    """Weight of the class layers' disagreement on the target, which they seek."""
    agree: NonNegative = 1.0
    """Weight of the same, which the features avoid."""
    repeats: Count = 4
    """Steps of phase C for one of A and one of B, where they take turns."""

    def networks(self, student: nn.Module) -> TakingTurns:
        """The student and a second class layer."""
        return TakingTurns(student)

    def losses(self, nets: TakingTurns, batch: Batch) -> Losses:
        """Phases A, B and C, or the one whose turn it is."""
        (source, _), read = look(nets.student, nets.twin, batch.source.image, batch.target)
        first, second = class_layer(nets.student), nets.twin
        targets = slice(len(batch.source.image), None)
        phases = self.phases(int(nets.turn))
        terms: dict[str, Tensor] = {}
        if "A" in phases:
            terms |= self.supervised(source.logits, batch.source.label)
            terms |= _twin(self.supervised(Logits(source.twin), batch.source.label))
        if "B" in phases:
            one, other = given(first, read), given(second, read)
            terms["disagree"] = -self.disagree * discrepancy(one[targets], other[targets])
            if "A" not in phases:
                one, other = (enlarged(nets.student, each, batch.target)[: targets.start] for each in (one, other))
                terms |= self.supervised(Logits(one), batch.source.label)
                terms |= _twin(self.supervised(Logits(other), batch.source.label))
        if "C" in phases:
            terms["agree"] = self.agree * discrepancy(frozen(first, read)[targets], frozen(second, read)[targets])
        return terms

    def phases(self, turn: int) -> str:
        """The phases of a step."""
        return "ABC" if self.update == "at_once" else ("A", "B", *"C" * self.repeats)[turn % (2 + self.repeats)]

    def after_step(self, nets: TakingTurns, step: int) -> None:
        """The next phase's turn."""
        nets.turn.fill_(step + 1)

    def optimizers(self, nets: TakingTurns, optim: Optim) -> list[Optimizer]:
        """The student's and the second class layer's."""
        return [*super().optimizers(nets, optim), twin_optimizer(nets.twin, optim)]

    @property
    def leaves_weights_out(self) -> bool:
        """In turn, phases B and C do."""
        return super().leaves_weights_out or self.update == "in_turn"


def discrepancy(one: Tensor, other: Tensor) -> Tensor:
    """Mean absolute difference of the class probabilities of two scores (B, K, h, w): 0 to 2 / K (equation 4)."""
    return (probabilities(one) - probabilities(other)).abs().mean()


def _twin(terms: Losses) -> dict[str, Tensor]:
    return {f"twin_{key}": loss for key, loss in terms.items()}
