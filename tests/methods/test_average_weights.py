"""The method `average_weights`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from overfly import train
from overfly.core.errors import RecipeError
from overfly.recipe import load
from overfly.training.run import Run


@pytest.fixture
def trained(small: dict[str, Any], tmp_path: Path) -> list[Run]:
    """A source-only network, and two that continue from it with different rates."""
    further = [{**small, "start": small, "optim": {"name": "sgd", "lr": rate}} for rate in (0.1, 0.01)]
    runs = [train(load(values), out=tmp_path, device="cpu", quiet=True).run for values in further]
    return [next(run for run in map(Run.open, tmp_path.glob("*source_only*")) if run.recipe.start is None), *runs]


def test_weights_and_statistics_are_averaged(small: dict[str, Any], tmp_path: Path, trained: list[Run]) -> None:
    start, *others = (load_file(run.weights) for run in trained)
    method = {"name": "average_weights", "runs": [str(run.path) for run in trained[1:]]}
    values = {"start": str(trained[0].path), "target": small["target"], "method": method, "crop": 64, "batch": 2}
    average = load_file(train(load({**values, "steps": 1}), out=tmp_path, device="cpu", quiet=True).run.weights)
    assert average.keys() == start.keys()
    moved = 0
    for name, value in average.items():
        if value.is_floating_point():
            expected = ((others[0][name].double() + others[1][name].double()) / 2).float()
            torch.testing.assert_close(value, expected, rtol=0, atol=1e-7)
            moved += int(not torch.equal(value, start[name]))
    assert moved > len(average) // 2


def test_networks_must_fit_the_start(small: dict[str, Any], tmp_path: Path, trained: list[Run]) -> None:
    method = {"name": "average_weights", "runs": [str(tmp_path / "none")]}
    values = {"start": str(trained[0].path), "target": small["target"], "method": method, "crop": 64, "batch": 2}
    with pytest.raises(RecipeError, match=r"method\.runs: .*none does not exist"):
        train(load({**values, "steps": 1}), out=tmp_path, device="cpu", quiet=True)
    another = train(load({**small, "model": "lraspp_mobilenet_v2"}), out=tmp_path, device="cpu", quiet=True).run
    method = {"name": "average_weights", "runs": [str(trained[1].path), str(another.path)]}
    with pytest.raises(RecipeError, match=r"method\.runs: .* is not a network of the start's architecture"):
        train(load({**values, "method": method, "steps": 1}), out=tmp_path, device="cpu", quiet=True)
    with pytest.raises(RecipeError, match=r"method\.runs"):
        load({**values, "method": {"name": "average_weights", "runs": []}, "steps": 1})
    assert not list(tmp_path.glob("*average_weights*"))
