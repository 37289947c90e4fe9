"""Statistics that source_only estimates at the end, on source images without augmentation."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from overfly import train
from overfly.models.segmenter import Segmenter
from overfly.ops.normalization import estimate_statistics
from overfly.recipe import Recipe, load
from overfly.training.run import Run
from overfly.training.setup import source_images, training_streams
from overfly.training.trainer import Trainer

STEPS = 4
STRONG = "augment=[dihedral, {name: gamma, p: 1.0, low: 3.0, high: 3.0}]"


def trained(recipe: Recipe, out: Path) -> Run:
    return train(recipe, out=out, device="cpu", quiet=True, checkpoint_every=2).run


def equal(first: Segmenter, second: Segmenter) -> bool:
    one, two = first.state_dict(), second.state_dict()
    return all(torch.equal(value, two[name]) for name, value in one.items())


@pytest.fixture
def recipe(small: dict[str, Any]) -> Recipe:
    return load(small, f"steps={STEPS}", STRONG)


def test_final_statistics_are_those_of_plain_source_images(recipe: Recipe, tmp_path: Path) -> None:
    run = trained(recipe, tmp_path)
    stream, _ = training_streams(recipe)
    expected = copy.deepcopy(run.segmenter())
    estimate_statistics(expected, source_images(stream, STEPS))
    assert equal(run.segmenter(), expected)
    nets = torch.load(run.checkpoint, weights_only=True)["nets"]
    final = load_file(run.weights)
    moving = {name: value for name, value in nets.items() if name.endswith("running_mean")}
    assert moving
    for name, value in moving.items():
        assert not torch.allclose(value, final[name.removeprefix("student.")], rtol=0.01), name


@pytest.mark.parametrize("at", ["save", "estimate_statistics"])
@pytest.mark.parametrize("every", [0, 2])
def test_an_interrupted_run_ends_with_the_same_statistics(
    at: str, every: int, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load(recipe, f"validation.every={every}")
    with monkeypatch.context() as patch:
        original = getattr(Trainer, at)

        def interrupted(self: Trainer) -> None:
            original(self)
            raise KeyboardInterrupt

        patch.setattr(Trainer, at, interrupted)
        with pytest.raises(KeyboardInterrupt):
            trained(recipe, tmp_path / "cut")
    whole = trained(recipe, tmp_path / "whole")
    assert equal(trained(recipe, tmp_path / "cut").segmenter(), whole.segmenter())


def test_self_training_keeps_its_statistics(
    small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = trained(load(small), tmp_path / "start")
    monkeypatch.setattr(Trainer, "estimate_statistics", lambda *_: pytest.fail("estimated"))
    for method in ("multiscale_self_training", "recalibrate"):
        run = trained(load({**small, "start": str(start.path), "method": method}), tmp_path)
        assert run.finished
