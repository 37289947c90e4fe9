"""What makes CLAN, FADA and MCD what they are."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from adversaries import assert_same_gradients, backward, batch, student, twice, with_several_class_layers
from torch import Tensor, nn

from overfly.core.errors import RecipeError
from overfly.core.optimizers import SGD
from overfly.core.records import Logits
from overfly.methods.adversarial import FADA, source_channels, target_channels
from overfly.methods.method import Method
from overfly.methods.two_classifiers import (
    MCD,
    TwoOutputs,
    alignment,
    class_layer,
    disagreement,
    discrepancy,
    second_class_layer,
    two_classifier_forward,
)
from overfly.models import Segmenter, build, names
from overfly.ops.losses import self_information
from overfly.recipe import load


@pytest.mark.parametrize("name", names())
def test_every_network_names_the_layer_that_gives_its_scores(name: str) -> None:
    with torch.device("meta"):
        net = Segmenter(build(name, 3), student().classes, architecture=name, mean=(0.0,) * 3, std=(1.0,) * 3)
        given: list[tuple[Tensor, Tensor]] = []
        class_layer(net).register_forward_hook(lambda _, inputs, output: given.append((inputs[0], output)))
        logits = net.network(torch.zeros(2, 3, 64, 64))
        assert len(given) == 1
        assert given[0][1] is logits.main
        second = second_class_layer(net)
        (outputs,), read = two_classifier_forward(net, second, torch.zeros(2, 3, 64, 64))
    assert outputs.second.shape == outputs.logits.main.shape == (2, 3, 64, 64)
    assert read.shape == given[0][0].shape


@pytest.mark.parametrize("net", [student, with_several_class_layers])
def test_both_class_layers_read_the_same_features(net: Any) -> None:
    segmenter = net()
    second = second_class_layer(segmenter)
    layer = class_layer(segmenter)
    for own, first in zip(second.parameters(), layer.parameters(), strict=True):
        assert not torch.equal(own, first) or own.ndim == 1
        assert (own - first).std() <= 0.2 * first.std() or own.ndim == 1  # it knows what the first knows
    images = batch(72).target[:, :, :70]  # sides that are no multiple of the stride
    (outputs,), _ = two_classifier_forward(segmenter, copy.deepcopy(layer), images)
    torch.testing.assert_close(outputs.second, outputs.logits.main)
    (two, one), read = two_classifier_forward(segmenter, second, images, images[:1])
    assert (len(two.second), len(one.logits.main), len(read)) == (2, 1, 3)
    assert not torch.allclose(two.second, two.logits.main)
    assert not layer._forward_pre_hooks


def test_self_information_is_zero_for_confident_predictions() -> None:
    confident = torch.tensor([80.0, 0.0, 0.0]).view(1, 3, 1, 1)
    assert self_information(confident).max() < 1e-30
    uncertain = self_information(torch.zeros(1, 3, 2, 2))
    torch.testing.assert_close(uncertain, torch.full((1, 3, 2, 2), 1 / 3))


def test_clan_weighs_pixels_by_disagreement() -> None:
    one = torch.zeros(1, 3, 1, 3)
    other = torch.zeros(1, 3, 1, 3)
    one[:, 0] = 3.0
    other[0, :, 0, 0] = torch.tensor([3.0, 0.0, 0.0])
    other[0, :, 0, 1] = torch.tensor([1.0, 0.0, 0.0])
    other[0, :, 0, 2] = torch.tensor([0.0, 0.0, 9.0])
    result = disagreement(TwoOutputs(Logits(one), other))[0, 0]
    assert result[0].item() == pytest.approx(0, abs=1e-6)
    assert 0.05 < result[1] < result[2] <= 1
    far = TwoOutputs(Logits(torch.tensor([90.0, 0.0]).view(1, 2, 1, 1)), torch.tensor([0.0, 90.0]).view(1, 2, 1, 1))
    assert disagreement(far).item() == pytest.approx(1)


def test_clan_compares_kernels_by_their_angle() -> None:
    one = nn.Conv2d(3, 4, 1)
    other = copy.deepcopy(one)
    with torch.no_grad():
        other.weight.mul_(5)
        assert one.bias is not None
        one.bias.add_(7)
    assert alignment(one, other).item() == pytest.approx(1)
    with torch.no_grad():
        other.weight.neg_()
    assert alignment(one, other).item() == pytest.approx(-1)


def test_fada_soft_labels_are_a_distribution_over_domain_and_class() -> None:
    method, seen = FADA(max_probability=1.0), batch()
    logits = student()(seen.target)
    assert logits.features is not None
    soft = method.soft_label(logits)
    assert soft.shape == (2, 3, *logits.features.shape[-2:])
    assert not soft.requires_grad
    ones = torch.ones(2, *soft.shape[-2:], dtype=soft.dtype)
    for truth, empty in ((source_channels(soft), slice(3, 6)), (target_channels(soft), slice(0, 3))):
        assert truth.shape[1] == 6
        torch.testing.assert_close(truth.sum(1), ones)
        assert not truth[:, empty].any()


def test_fada_soft_labels_use_temperature_and_max_probability() -> None:
    scores = torch.tensor([1.8, 0.0, 0.0]).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    logits = Logits(scores, features=torch.zeros(1, 1, 2, 2))
    expected = torch.tensor([1.0, 0.0, 0.0]).softmax(0)
    torch.testing.assert_close(FADA().soft_label(logits)[0, :, 0, 0], expected)
    confident = FADA().soft_label(logits._replace(main=scores * 50))
    assert confident[0, :, 1, 1].tolist() == pytest.approx([0.9, 0.0, 0.0])


def test_mcd_discrepancy_is_zero_for_equal_scores_and_grows() -> None:
    scores = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    assert discrepancy(scores, scores + 1).item() == pytest.approx(0, abs=1e-7)
    result = [discrepancy(scores, scores * factor).item() for factor in (1.5, 2.0, -5.0)]
    assert 0 < result[0] < result[1] < result[2] <= 2 / 3
    opposite = torch.tensor([99.0, 0.0, 0.0]).view(1, 3, 1, 1)
    assert discrepancy(opposite, opposite.roll(1, 1)).item() == pytest.approx(2 / 3)


def small_scores(net: Segmenter, second: nn.Module | None, images: Tensor) -> Tensor:
    """Scores of target images at the class layer's own size, with the second class layer in place of the first."""
    weights: dict[str, Tensor] = (
        {} if second is None else {f"classifier.{name}": value for name, value in second.named_parameters()}
    )
    normalized = (images.double() - net.mean) / net.std
    logits: Logits = torch.func.functional_call(net.network, weights, (normalized,))
    return logits.main[2:]


def test_mcd_joint_update_has_the_gradients_of_its_three_steps() -> None:
    method, seen = MCD(classifier_weight=0.7, feature_weight=0.3), batch()
    one, two = twice(method.networks(student()))
    backward(method.losses(one, seen).values())

    net: Any = two.student
    second: Any = two.second
    images = torch.cat([seen.source.image, seen.target])
    heads = {id(p) for layer in (net.network.classifier, second) for p in layer.parameters()}

    def assert_trained(class_layers: bool, features: bool) -> None:
        for parameter in two.parameters():
            parameter.requires_grad_(class_layers if id(parameter) in heads else features)

    phase_a = MCD(update="alternating").losses(two, seen)
    assert set(phase_a) == {"main", "aux", "second_main"}
    backward(phase_a.values())
    assert_trained(class_layers=True, features=False)
    backward([-0.7 * discrepancy(small_scores(net, None, images), small_scores(net, second, images))])
    assert_trained(class_layers=False, features=True)
    backward([0.3 * discrepancy(small_scores(net, None, images), small_scores(net, second, images))])
    assert_trained(class_layers=True, features=True)
    assert_same_gradients(one, two)


def test_mcd_alternating_update_trains_the_papers_weights_in_each_step() -> None:
    method, seen = MCD(update="alternating", feature_steps=2), batch()
    nets = method.networks(student()).double().train()
    assert method.has_unused_parameters
    assert not MCD().has_unused_parameters
    heads = {id(p) for layer in (class_layer(nets.student), nets.second) for p in layer.parameters()}
    others = {id(p) for p in nets.parameters()} - heads
    auxiliary = {id(p) for name, p in nets.named_parameters() if "auxiliary" in name}
    turns = []
    for step in range(6):
        terms = method.losses(nets, seen)
        turns.append(" ".join(terms))
        backward(terms.values())
        trained = {id(p) for p in nets.parameters() if p.grad is not None}
        expected = {0: heads | others, 1: heads, 2: others - auxiliary}[min(step % 4, 2)]
        assert trained == expected
        nets.zero_grad()
        method.after_step(nets, step)
    assert turns == ["main aux second_main", "maximize main second_main", "minimize", "minimize", *turns[:2]]
    assert nets.step == 6


def test_mcd_step_b_has_the_gradient_of_source_loss_and_discrepancy() -> None:
    method, seen = MCD(update="alternating", classifier_weight=0.5), batch()
    one, two = twice(method.networks(student()))
    method.after_step(one, 0)
    backward(method.losses(one, seen).values())
    net: Any = two.student
    second: Any = two.second
    images = torch.cat([seen.source.image, seen.target])
    (source, _), _ = two_classifier_forward(net, second, seen.source.image, seen.target)
    terms = [
        method.supervised(Logits(scores), seen.source.label)["main"] for scores in (source.logits.main, source.second)
    ]
    terms.append(-0.5 * discrepancy(small_scores(net, None, images), small_scores(net, second, images)))
    backward(terms)
    for layer, other in ((class_layer(one.student), class_layer(net)), (one.second, second)):
        assert_same_gradients(layer, other)


@pytest.mark.parametrize("name", ["mcd", "clan"])
def test_the_second_class_layer_starts_as_the_first_and_leaves_it(name: str) -> None:
    method: Any = Method.kinds[name](preheat_steps=0)
    nets, seen = method.networks(student()).double().train(), batch()
    start = alignment(class_layer(nets.student), nets.second).item()
    assert 0.98 < start < 1 - 1e-6
    optimizers = method.optimizers(nets, SGD(lr=0.1))
    for step in range(20):
        backward(method.losses(nets, seen).values())
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        method.after_step(nets, step)
    assert alignment(class_layer(nets.student), nets.second).item() < start


@pytest.mark.parametrize("update", ["joint", "alternating"])
def test_mcd_trains_both_layers_on_the_source_before_they_disagree(update: Any) -> None:
    method, seen = MCD(update=update, preheat_steps=2, feature_steps=1), batch()
    nets = method.networks(student()).double().train()
    turns = []
    for step in range(5):
        turns.append(" ".join(method.losses(nets, seen)))
        method.after_step(nets, step)
    assert turns[:2] == ["main aux second_main"] * 2
    last = {"joint": ["main aux second_main maximize minimize"] * 3}
    assert turns[2:] == last.get(update, ["main aux second_main", "maximize main second_main", "minimize"])


@pytest.mark.parametrize("name", ["mcd", "clan"])
def test_the_preheat_is_at_least_the_warmup(name: str, small: dict[str, Any]) -> None:
    changes = ["schedule.warmup=10", f"method={name}"]
    assert load(small, *changes, "method.preheat_steps=10")
    with pytest.raises(RecipeError, match=r"method\.preheat_steps must be at least schedule\.warmup, 10, got 9"):
        load(small, *changes, "method.preheat_steps=9")


def test_the_second_class_layer_has_the_learning_rate_of_heads() -> None:
    method = MCD()
    *_, second = method.optimizers(method.networks(student()), SGD(lr=0.01, head=10.0))
    assert [group["initial_lr"] for group in second.param_groups] == [0.1]
