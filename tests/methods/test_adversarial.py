"""The one sum of losses has the gradients of the papers' two phases: first the student, then the critic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from adversaries import assert_same_gradients, backward, batch, student, twice, without_aux
from torch import Tensor, nn

from overfly.core.errors import RecipeError
from overfly.core.optimizers import SGD
from overfly.core.records import Batch, Logits
from overfly.methods.adversarial import FADA, AdaptSegNet, Advent, MinEnt
from overfly.methods.method import Method
from overfly.methods.two_classifiers import CLAN, MCD
from overfly.models import Network
from overfly.ops.losses import entropy
from overfly.ops.normalization import joint_forward, probe_outputs

Scores = Callable[[Tensor], Tensor]


def bce(scores: Tensor, truth: float, weight: Tensor | None = None) -> Tensor:
    if weight is not None:
        scores = F.interpolate(scores, size=weight.shape[-2:], mode="bilinear", align_corners=False)
    loss = F.binary_cross_entropy_with_logits(scores, torch.full_like(scores, truth), reduction="none")
    return (loss if weight is None else loss * weight[:, None]).mean()


def probabilities(scores: Tensor) -> Tensor:
    return scores.softmax(1)


def self_information_of(scores: Tensor) -> Tensor:
    p = scores.softmax(1)
    return -p * p.log() / torch.tensor(float(p.shape[1])).log()


def both(net: nn.Module, seen: Batch) -> tuple[Logits, Logits]:
    """Two domains through the student as one batch."""
    logits: Logits = net(torch.cat([seen.source.image, seen.target]))
    return logits.select(slice(0, 2)), logits.select(slice(2, 4))


@pytest.mark.parametrize("levels", ["single", "multi"])
@pytest.mark.parametrize(("kind", "shown"), [(AdaptSegNet, probabilities), (Advent, self_information_of)])
def test_adaptsegnet_and_advent_have_the_gradients_of_two_phases(kind: type[Any], shown: Scores, levels: str) -> None:
    method, seen = kind(levels=levels, weight=1.0, aux_weight=0.3), batch()
    one, two = twice(method.networks(student()))
    backward(method.losses(one, seen).values())

    weights = (1.0,) if levels == "single" else (1.0, 0.3)
    critics = list(two.critic.children())
    assert len(critics) == len(weights)
    source, target = both(two.student, seen)
    maps = [[shown(part.main), shown(part.aux[0])] for part in (source, target)]
    for critic in critics:
        critic.requires_grad_(False)
    terms = list(method.supervised(source, seen.source.label).values())
    terms += [w * bce(critic(m), 1.0) for w, critic, m in zip(weights, critics, maps[1], strict=False)]
    backward(terms)
    assert all(parameter.grad is None for critic in critics for parameter in critic.parameters())
    for critic, true, false in zip(critics, *maps, strict=False):
        critic.requires_grad_(True)
        backward([bce(critic(true.detach()), 1.0) / 2, bce(critic(false.detach()), 0.0) / 2])
    assert_same_gradients(one, two)


def test_fada_has_the_gradients_of_two_phases() -> None:
    method, seen = FADA(weight=1.0), batch()
    one, two = twice(method.networks(student()))
    backward(method.losses(one, seen).values())

    critic = two.critic
    source, target = both(two.student, seen)
    assert source.features is not None
    assert target.features is not None
    soft = [F.interpolate((p.main / 1.8).softmax(1), scale_factor=1 / 4, mode="area") for p in (source, target)]
    soft = [s.detach().clamp(max=0.9) for s in soft]
    nodata_mask = torch.zeros_like(soft[0])
    critic.requires_grad_(False)
    terms = list(method.supervised(source, seen.source.label).values())
    terms.append(F.cross_entropy(critic(target.features), torch.cat([soft[1], nodata_mask], 1)))
    backward(terms)
    critic.requires_grad_(True)
    backward(
        [
            0.5 * F.cross_entropy(critic(source.features.detach()), torch.cat([soft[0], nodata_mask], 1)),
            0.5 * F.cross_entropy(critic(target.features.detach()), torch.cat([nodata_mask, soft[1]], 1)),
        ]
    )
    assert_same_gradients(one, two)


def swapped(net: nn.Module, second_layer: nn.Module, images: Tensor) -> Tensor:
    """Scores with the second class layer in the place of the first: another way to them than the method's."""
    weights: dict[str, Tensor] = {
        f"network.classifier.{name}": value for name, value in second_layer.named_parameters()
    }
    logits: Logits = torch.func.functional_call(net, weights, (images,))
    return logits.main


def test_clan_has_the_gradients_of_two_phases() -> None:
    method, seen = CLAN(weight=1.0, discrepancy_weight=0.5, preheat_steps=0), batch()
    one, two = twice(method.networks(student()))
    backward(method.losses(one, seen).values())

    net: Any = two.student
    second_layer: Any = two.second
    critic: Any = two.critic
    source, target = both(net, seen)
    second = swapped(net, second_layer, torch.cat([seen.source.image, seen.target]))
    maps = [(source.main + second[:2]).softmax(1), (target.main + second[2:]).softmax(1)]
    p, q = target.main.softmax(1), second[2:].softmax(1)
    weight = 0.4 + 40 * (1 - (p * q).sum(1) / (p.norm(dim=1) * q.norm(dim=1)))
    w, v = net.network.classifier.weight.flatten(), second_layer.weight.flatten()
    critic.requires_grad_(False)
    terms = list(method.supervised(source, seen.source.label).values())
    terms += [F.cross_entropy(second[:2], seen.source.label, ignore_index=255)]
    terms += [0.5 * (w @ v) / (w.norm() * v.norm()), bce(critic(maps[1]), 1.0, weight)]
    backward(terms)
    critic.requires_grad_(True)
    backward([bce(critic(maps[0].detach()), 1.0) / 2, bce(critic(maps[1].detach()), 0.0, weight.detach()) / 2])
    assert_same_gradients(one, two)


def test_one_pass_gives_running_statistics_of_both_domains() -> None:
    net, images = student(), batch()
    source, target = joint_forward(net, images.source.image, images.target)
    assert len(source.main) == len(target.main) == 2
    other = student()
    whole = other(torch.cat([images.source.image, images.target]))
    assert torch.equal(whole.main[2:], target.main)
    assert torch.equal(whole.aux[0][:2], source.aux[0])
    assert all(torch.equal(a, b) for a, b in zip(net.buffers(), other.buffers(), strict=True))
    assert int(net.state_dict()["network.encoder.1.num_batches_tracked"]) == 1


def test_student_outputs_leaves_modes_and_statistics_unchanged() -> None:
    net = student()
    net.get_submodule("network.encoder").eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    modes = [part.training for part in net.modules()]
    result = probe_outputs(net)
    assert result.main.shape[1] == 3
    assert len(result.aux) == 1
    assert modes == [part.training for part in net.modules()]
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("method", [AdaptSegNet(levels="multi"), Advent(levels="multi"), MinEnt(levels="multi")])
def test_two_levels_need_an_auxiliary_head(method: Method[Any]) -> None:
    with pytest.raises(RecipeError, match="levels=multi"):
        method.networks(without_aux())


@pytest.mark.parametrize("method", [AdaptSegNet(), Advent(), MinEnt(), CLAN(), FADA(), MCD()])
def test_adversarial_methods_work_without_training_heads(method: Method[Any]) -> None:
    nets = method.networks(without_aux()).double().train()
    optimizers = method.optimizers(nets, SGD())
    terms = method.losses(nets, batch())
    backward(terms.values())
    held = [id(p) for each in optimizers for group in each.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in nets.parameters())
    assert all(p.grad is not None and p.grad.any() for p in nets.parameters())
    assert all("initial_lr" in group for each in optimizers for group in each.param_groups)


def test_the_critic_has_its_own_learning_rate() -> None:
    method = AdaptSegNet()
    first, critic = method.optimizers(method.networks(student()), SGD(lr=0.01))
    assert first.param_groups[0]["initial_lr"] == 0.01
    assert isinstance(critic, torch.optim.Adam)
    assert critic.param_groups[0]["initial_lr"] == 1e-4
    assert critic.param_groups[0]["betas"] == (0.9, 0.99)


def test_minent_minimizes_the_mean_entropy_of_the_target() -> None:
    method, seen = MinEnt(levels="multi", weight=0.5, aux_weight=0.25), batch()
    nets = method.networks(student())
    terms = method.losses(nets, seen)
    source, target = both(student(), seen)
    torch.testing.assert_close(terms["entropy"], 0.5 * entropy(target.main).mean())
    torch.testing.assert_close(terms["entropy_aux"], 0.25 * entropy(target.aux[0]).mean())
    torch.testing.assert_close(terms["main"], method.supervised(source, seen.source.label)["main"])
    assert "entropy_aux" not in MinEnt().losses(nets, seen)


def test_fada_needs_features() -> None:
    class Bare(Network):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(3, 3, 1)

        def forward(self, image: Tensor) -> Logits:
            return Logits(self.layer(image))

    with pytest.raises(RecipeError, match="features"):
        FADA().networks(student(Bare()))
    with pytest.raises(RecipeError, match="class_layer"):
        MCD().networks(student(Bare()))


def test_clan_weights_are_1_during_preheat_steps() -> None:
    method, seen = CLAN(preheat_steps=2), batch()
    nets = method.networks(student()).double()
    unweighted = CLAN(preheat_steps=0, local_weight=0.0, epsilon=1.0).losses(nets, seen)
    weighted = CLAN(preheat_steps=0).losses(nets, seen)["adversarial"]
    assert torch.allclose(method.losses(nets, seen)["adversarial"], unweighted["adversarial"], rtol=1e-2)
    method.after_step(nets, 1)
    assert torch.equal(method.losses(nets, seen)["adversarial"], weighted)
    assert not torch.allclose(weighted, unweighted["adversarial"], rtol=1e-2)
