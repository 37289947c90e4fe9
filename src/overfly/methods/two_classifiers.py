"""Two class layers: MCD (Saito et al., CVPR 2018, arXiv:1712.02560), CLAN (Luo et al., CVPR 2019, arXiv:1809.09478)."""

import copy
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from overfly.core.errors import RecipeError
from overfly.core.optimizers import Optim
from overfly.core.records import Batch, Logits, Losses
from overfly.core.spec import NonNegativeFloat, NonNegativeInt, PositiveInt
from overfly.methods import adversarial
from overfly.methods.adversarial import Adversarial, StudentCritic
from overfly.methods.method import Method, Networks, prefixed
from overfly.models.segmenter import Segmenter
from overfly.ops.losses import probabilities
from overfly.ops.normalization import probe_outputs, split_logits

NOISE = 0.1
"""Noise of the second class layer, without which both would get the same gradients and stay the same."""


class TwoClassifiers(Networks):
    """A student and a second class layer; inference uses the student with its own class layer."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__(student)
        self.second = second_class_layer(student)


class MCD(Method[TwoClassifiers], name="mcd"):
    """Train two class layers to disagree on the target, and the features to make them agree (Saito et al., 2018).

    The paper (section 3.3) alternates three steps: A trains class layers and features on the source; B trains the class
    layers on the source and to maximize their discrepancy on the target, with fixed features; C trains the features to
    minimize it, with fixed class layers. ``alternating`` does so, one batch per step. ``joint`` computes all three from
    one forward pass, like a gradient reversal layer: one step instead of ``2 + feature_steps``, all with the same
    weights. The discrepancy is measured at the class layers' own resolution. The second class layer starts as the
    first, with noise, so that no untrained layer disturbs a trained start; both are random in the paper. Source and
    target share one forward pass. Inference uses the student with its own class layer.
    """

    preheat_steps: NonNegativeInt = 0
    """Steps A alone at the start; at least as many as the schedule's ``warmup``."""
    update: Literal["joint", "alternating"] = "joint"
    """Steps A, B and C together, or one after the other."""
    classifier_weight: NonNegativeFloat = 1.0
    """Weight of the discrepancy that the class layers maximize."""
    feature_weight: NonNegativeFloat = 1.0
    """Weight of the discrepancy that the features minimize."""
    feature_steps: PositiveInt = 4
    """Steps C per step A and step B, with ``alternating`` (n of the paper)."""

    def networks(self, student: nn.Module) -> TwoClassifiers:
        return TwoClassifiers(student)

    def losses(self, nets: TwoClassifiers, batch: Batch) -> Losses:
        """The losses of steps A, B and C, or of the current one."""
        (source, _), features = two_classifier_forward(nets.student, nets.second, batch.source.image, batch.target)
        layers, label = (class_layer(nets.student), nets.second), batch.source.label
        sources, targets = slice(len(label)), slice(len(label), None)
        steps = self.steps(nets.step)
        terms: dict[str, Tensor] = {}
        if "A" in steps:
            terms |= self.supervised(source.logits, label)
            terms |= prefixed("second", self.supervised(Logits(source.second), label))
        if "B" in steps:
            first, second = (adversarial.forward_detached(layer, features) for layer in layers)
            terms["maximize"] = -self.classifier_weight * discrepancy(first[targets], second[targets])
            if "A" not in steps:
                first, second = (upsample(nets.student, scores, batch.target)[sources] for scores in (first, second))
                terms |= self.supervised(Logits(first), label)
                terms |= prefixed("second", self.supervised(Logits(second), label))
        if "C" in steps:
            first, second = (adversarial.forward_frozen(layer, features)[targets] for layer in layers)
            terms["minimize"] = self.feature_weight * discrepancy(first, second)
        return terms

    def steps(self, step: int) -> str:
        """Return the steps A, B and C of the paper that an optimizer step performs."""
        if step < self.preheat_steps:
            return "A"
        turn = (step - self.preheat_steps) % (2 + self.feature_steps)
        return "ABC" if self.update == "joint" else ("AB" + "C" * self.feature_steps)[turn]

    def optimizers(self, nets: TwoClassifiers, optim: Optim) -> list[Optimizer]:
        return [*super().optimizers(nets, optim), head_optimizer(nets.second, optim)]

    @property
    def has_unused_parameters(self) -> bool:
        """True with ``alternating``, whose steps B and C train part of the weights."""
        return super().has_unused_parameters or self.update == "alternating"


def discrepancy(first: Tensor, second: Tensor) -> Tensor:
    """Mean absolute difference of the class probabilities of two scores (B, K, h, w): 0 to 2 / K (equation 4)."""
    return (probabilities(first) - probabilities(second)).abs().mean()


class TwoOutputs(NamedTuple):
    """Outputs of two class layers for the same images.

    Attributes:
        logits: the student's, at the size of the images.
        second: class scores of the second class layer (B, K, H, W), at the size of the images.
    """

    logits: Logits
    second: Tensor


def class_layer(student: nn.Module) -> nn.Module:
    """The submodule of a student that maps features to class scores; raise `RecipeError` if it is not named."""
    network = _segmenter(student).network
    return network.get_submodule(network.class_layer)


@torch.no_grad()
def second_class_layer(student: nn.Module) -> nn.Module:
    """A copy of the student's `class_layer` with noise of `NOISE` of each kernel's standard deviation."""
    second = copy.deepcopy(class_layer(student))
    for weight in (weight for weight in second.parameters() if weight.ndim > 1):
        weight.add_(NOISE * weight.std() * torch.randn_like(weight))
    return second


def two_classifier_forward(student: nn.Module, second: nn.Module, *images: Tensor) -> tuple[list[TwoOutputs], Tensor]:
    """Outputs of both class layers for several groups of images (B_i, C, H, W), from one forward pass.

    Returns:
        The outputs of each group, and the feature map (B, F, h, w) of all groups that both class layers read.
    """
    batch, sizes = torch.cat(images), [len(group) for group in images]
    inputs: list[Tensor] = []
    handle = class_layer(student).register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    try:
        logits: Logits = student(batch)
    finally:
        handle.remove()
    scores = upsample(student, second(inputs[0]), batch)
    outputs = map(TwoOutputs, split_logits(logits, sizes), torch.split(scores, sizes))
    return list(outputs), inputs[0]


def upsample(student: nn.Module, scores: Tensor, images: Tensor) -> Tensor:
    """Scores (B, K, h, w) of a class layer at the size of the images (B, C, H, W)."""
    height, width = images.shape[-2:]
    return _segmenter(student).upsample(scores, height, width)


def head_optimizer(layer: nn.Module, optim: Optim) -> Optimizer:
    """Optimizer of a second class layer, at the learning rate of heads."""
    return optim.optimizer(layer, dict(layer.named_parameters()))


def _segmenter(student: nn.Module) -> Segmenter:
    if isinstance(student, Segmenter) and student.network.class_layer:
        return student
    name = getattr(student, "architecture", type(student).__name__)
    raise RecipeError(f"methods mcd and clan need a network that names its class_layer, and {name} does not")


class TwoClassifiersCritic(StudentCritic):
    """A student, a second class layer, and a critic of their ensemble."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__(student, adversarial.Critic(probe_outputs(student).main.shape[1]))
        self.second = second_class_layer(student)


class CLAN(Adversarial[TwoClassifiersCritic], name="clan"):
    """Weigh the adversarial loss of each target pixel by the disagreement of two class layers (Luo et al., 2019).

    A loss on the angle between their weights separates the class layers, which start as in `MCD`. The critic reads the
    softmax of their summed scores. Disagreement weighs the target in the student's loss and in the critic's. Source and
    target share one forward pass. Inference uses the student with its own class layer, where the paper sums both. As in
    the published code the weights are 1 for the first steps (`preheat_steps`); its damping of the weights over the
    steps is left out.
    """

    weight: NonNegativeFloat = 0.001
    """Weight of the adversarial loss."""
    local_weight: NonNegativeFloat = 40.0
    """Factor of the disagreement in a target pixel's weight (λ_local)."""
    epsilon: NonNegativeFloat = 0.4
    """Weight of a target pixel without disagreement (ε)."""
    preheat_steps: NonNegativeInt = 500
    """Steps in which every target pixel weighs 1, at least as many as the schedule's ``warmup``; the published code
    takes a twentieth of all steps."""
    discrepancy_weight: NonNegativeFloat = 0.01
    """Weight of the cosine between the class layers' weights."""

    def networks(self, student: nn.Module) -> TwoClassifiersCritic:
        return TwoClassifiersCritic(student)

    def losses(self, nets: TwoClassifiersCritic, batch: Batch) -> Losses:
        """Supervised loss of both class layers on the source; weight discrepancy; adversarial losses."""
        (source, target), _ = two_classifier_forward(nets.student, nets.second, batch.source.image, batch.target)
        weight = None
        if nets.step >= self.preheat_steps:
            weight = self.epsilon + self.local_weight * disagreement(target)
        return {
            **self.supervised(source.logits, batch.source.label),
            **prefixed("second", self.supervised(Logits(source.second), batch.source.label)),
            "discrepancy": self.discrepancy_weight * alignment(class_layer(nets.student), nets.second),
            "adversarial": self.weight * adversarial.adversarial_loss(nets.critic, ensemble(target), weight),
            "critic": adversarial.critic_loss(nets.critic, ensemble(source), ensemble(target), weight),
        }

    def optimizers(self, nets: TwoClassifiersCritic, optim: Optim) -> list[Optimizer]:
        return [*super().optimizers(nets, optim), head_optimizer(nets.second, optim)]


def ensemble(outputs: TwoOutputs) -> Tensor:
    """Class probabilities (B, K, H, W) of the summed scores of both class layers."""
    return probabilities(outputs.logits.main + outputs.second)


def disagreement(outputs: TwoOutputs) -> Tensor:
    """One minus the cosine of both class layers' probabilities at each pixel (B, H, W): 0 to 1 (equation 4)."""
    return 1 - F.cosine_similarity(probabilities(outputs.logits.main), probabilities(outputs.second), dim=1)


def alignment(first: nn.Module, second: nn.Module) -> Tensor:
    """Cosine between the kernels of two layers of one form, -1 to 1 (equation 3); biases and normalization left out."""
    first_weights, second_weights = (
        torch.cat([p.flatten() for p in layer.parameters() if p.ndim > 1]) for layer in (first, second)
    )
    return F.cosine_similarity(first_weights, second_weights, dim=0)
