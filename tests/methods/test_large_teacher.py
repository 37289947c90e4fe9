"""A large network that adapts itself and teaches a small one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from overfly.core.records import IGNORE, Batch
from overfly.data.loading import BatchDataset
from overfly.methods.large_teacher import LargeTeacher, LargeTeacherNetworks, inconsistency
from overfly.methods.multiscale_self_training import BATCH_EMA
from overfly.recipe import Recipe
from overfly.training.setup import initial_network, training_streams

Case = tuple[LargeTeacher, LargeTeacherNetworks, Batch]


@pytest.fixture
def case(recipe_of: Callable[..., Recipe]) -> Case:
    recipe = recipe_of("large_teacher")
    method = recipe.method
    assert isinstance(method, LargeTeacher)
    nets = method.networks(initial_network(recipe)[0]).train()
    return method, nets, BatchDataset(*training_streams(recipe)).batch(0)


def test_inconsistency_is_one_minus_the_iou_of_labeled_pixels() -> None:
    label = torch.tensor([[[0, 0, 1, 1], [1, IGNORE, IGNORE, 0]]])
    predicted = torch.tensor([[[0, 1, 1, 1], [1, 3, 0, 0]]])
    average = torch.tensor([0.5, 0.5, 0.5, 0.5])
    expected = [1 - 2 / 3, 1 - 3 / 4]
    found = inconsistency(predicted, label, average)
    for value, one in zip(found[:2].tolist(), expected, strict=True):
        assert value == pytest.approx(BATCH_EMA * 0.5 + (1 - BATCH_EMA) * one)
    assert found[2:].tolist() == [0.5, 0.5]  # in no labeled pixel


def test_each_network_learns_from_its_own_terms(case: Case) -> None:
    method, nets, batch = case
    terms = dict(method.losses(nets, batch))
    own = sum(value for name, value in terms.items() if name.startswith("large"))
    assert isinstance(own, torch.Tensor)
    own.backward(retain_graph=True)  # type: ignore[no-untyped-call]
    assert any(part.grad is not None for part in nets.large.student.parameters())
    assert all(part.grad is None for part in nets.student.parameters())
    nets.zero_grad()
    (terms["source_main"] + terms["mixed_main"]).backward()  # type: ignore[no-untyped-call]
    assert any(part.grad is not None for part in nets.student.parameters())
    for teacher in (nets.teacher, nets.large.teacher):
        assert all(part.grad is None for part in teacher.parameters())
        assert not teacher.training


def test_both_averages_move_and_inference_uses_the_small_one(case: Case) -> None:
    method, nets, _ = case
    with torch.no_grad():
        for student in (nets.student, nets.large.student):
            for part in student.parameters():
                part.add_(1.0)
    before = [next(net.parameters()).clone() for net in (nets.teacher, nets.large.teacher)]
    method.after_step(nets, 5)
    for net, old in zip((nets.teacher, nets.large.teacher), before, strict=True):
        torch.testing.assert_close(next(net.parameters()), old + (1 - method.ema))
    assert method.inference_network(nets) is nets.teacher
    assert nets.step == 6


def test_inconsistent_classes_weigh_more(case: Case) -> None:
    method, nets, batch = case
    equal = method.model_copy(update={"inconsistency_weight": 0.0})
    losses = []
    for each in (method, equal):
        torch.manual_seed(0)
        nets.inconsistency.copy_(torch.linspace(0, 1, 7))
        losses.append(float(each.losses(nets, batch)["mixed_main"].detach()))
    assert losses[0] != losses[1]
    torch.manual_seed(0)
    nets.inconsistency.fill_(1.0)  # the same for all: a mean of 1
    nets.eval()
    first = float(method.losses(nets, batch)["large_mixed_main"].detach())
    torch.manual_seed(0)
    assert float(equal.losses(nets, batch)["large_mixed_main"].detach()) == first  # the large one has no weights
