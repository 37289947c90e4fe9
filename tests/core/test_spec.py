from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn

from overfly.core.optimizers import SGD, AdamW, Cosine, OneCycle, Optim, Poly, Schedule, StepDecay, set_learning_rate
from overfly.core.spec import Choice, Spec, load_plugins


class Fruit(Choice):
    """Something to choose."""

    weight: float = 1.0
    """In kilograms."""


class Apple(Fruit, name="apple"):
    """Red or green."""

    red: bool = True
    """Whether it is red."""


class Basket(Spec):
    """Holds one fruit."""

    fruit: Fruit = Apple()
    """Which."""


def test_a_choice_is_equal_in_every_spelling() -> None:
    spelled = [
        Basket.model_validate({"fruit": {"name": "apple", "red": False}}),
        Basket(fruit=Apple(red=False)),
        Basket.model_validate(Basket(fruit=Apple(red=False)).model_dump()),
        Basket.model_validate_json(Basket(fruit=Apple(red=False)).model_dump_json()),
    ]
    assert all(basket == spelled[0] for basket in spelled)
    assert Basket.model_validate({"fruit": "apple"}) == Basket()
    assert Basket().model_dump()["fruit"] == {"name": "apple", "weight": 1.0, "red": True}


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(ValidationError, match=r"'pear'.*apple"):
        Basket.model_validate({"fruit": "pear"})
    with pytest.raises(ValidationError, match="apple"):
        Basket.model_validate({"fruit": {"red": True}})


def test_misspelled_settings_and_assignment_raise() -> None:
    with pytest.raises(ValidationError, match="color"):
        Basket.model_validate({"fruit": {"name": "apple", "color": 1}})
    with pytest.raises(ValidationError):
        Basket().fruit = Apple()  # type: ignore[misc]
    with pytest.raises(ValidationError):
        Apple(weight=float("nan"))


def test_kinds_of_one_choice_are_no_kinds_of_another() -> None:
    assert "sgd" not in Schedule.kinds
    assert "poly" not in Optim.kinds
    with pytest.raises(ValidationError):
        Basket.model_validate({"fruit": SGD()})


def test_a_plugin_is_found_when_its_name_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    class Plugin:
        def load(self) -> None:
            class Pear(Fruit, name="late_pear"):
                """From outside."""

    monkeypatch.setattr(
        "overfly.core.spec.entry_points", lambda group: [Plugin()] if group == "overfly.plugins" else []
    )
    assert Basket.model_validate({"fruit": "late_pear"}).fruit.name == "late_pear"
    del Fruit.kinds["late_pear"]
    load_plugins()
    del Fruit.kinds["late_pear"]


@given(st.integers(1, 500), st.integers(0, 100))
@settings(deadline=None, max_examples=40)
def test_every_schedule_stays_between_0_and_1(steps: int, warmup: int) -> None:
    for kind in Schedule.kinds.values():
        schedule = kind(warmup=warmup)
        factors = [schedule.factor(step, steps) for step in range(steps)]
        assert all(0 <= factor <= 1 + 1e-9 for factor in factors)


def test_schedules_by_hand() -> None:
    assert Poly(power=0.9).factor(50, 100) == pytest.approx(0.5**0.9)
    assert Cosine().factor(50, 100) == pytest.approx(0.5)
    assert StepDecay(milestones=(0.5,), gamma=0.1).factor(49, 100) == 1.0
    assert StepDecay(milestones=(0.5,), gamma=0.1).factor(50, 100) == pytest.approx(0.1)
    assert Poly(warmup=10).factor(4, 100) == pytest.approx(0.5)
    assert OneCycle(rise=0.3).factor(30, 100) == pytest.approx(1.0)


def test_the_head_learns_faster_and_norms_are_spared() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    optimizer = AdamW(lr=0.1, head=10, decay_norms=False, weight_decay=0.5).optimizer(module, heads=("2",))
    rates = {
        name: (group["lr"], group["weight_decay"])
        for name, parameter in module.named_parameters()
        for group in optimizer.param_groups
        if any(parameter is member for member in group["params"])
    }
    assert rates["0.weight"] == (0.1, 0.5)
    assert rates["1.weight"] == rates["0.bias"] == (0.1, 0.0)
    assert rates["2.weight"] == (1.0, 0.5)
    assert len(rates) == len(list(module.parameters()))
    set_learning_rate([optimizer], 0.5)
    assert {group["lr"] for group in optimizer.param_groups} == {0.05, 0.5}


def test_frozen_weights_are_not_optimized() -> None:
    module = nn.Linear(2, 2)
    module.bias.requires_grad_(False)
    optimizer = SGD().optimizer(module)
    assert [parameter is module.weight for group in optimizer.param_groups for parameter in group["params"]] == [True]
    assert isinstance(optimizer, torch.optim.SGD)
