"""Training by several processes, started by --devices or by torchrun."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import processes
from overfly import train
from overfly.core.errors import RecipeError
from overfly.core.records import Logits
from overfly.methods.multiscale_self_training import MultiscaleNetworks, MultiscaleSelfTraining
from overfly.recipe import load
from overfly.training.engine import TrainerConfig, process_counts
from overfly.training.run import Run


class Broken(nn.Module):
    """A network whose class scores are not finite."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Logits:
        logits: Logits = self.network(image)
        return logits._replace(main=logits.main * float("nan"))


class HalfBroken(MultiscaleSelfTraining, name="half_broken"):
    """Self-training whose inference network is broken in the second process."""

    def inference_network(self, nets: MultiscaleNetworks) -> nn.Module:
        network = super().inference_network(nets)
        return Broken(network) if os.environ.get("LOCAL_RANK") == "1" else network


def trained(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next(folder.glob("*/checkpoints/best.safetensors")))


def test_two_machines_train_the_same_weights_as_one_process(small: dict[str, Any], tmp_path: Path) -> None:
    recipe = load(
        {**small, "model": "small_group_norm"}, "batch=4", "steps=4", "optim={name: sgd, lr: 0.1, momentum: 0.9}"
    )
    recipe.save(tmp_path / "recipe.yaml")
    command = ("train", tmp_path / "recipe.yaml", "--log-every", "1")
    outputs = processes.run(*command, out=tmp_path / "two", world=2, machines=2)
    assert ["trained:" in output for output in outputs] == [True, False]
    train(recipe, out=tmp_path / "one", device="cpu", log_every=1, quiet=True)
    one, two = trained(tmp_path / "one"), trained(tmp_path / "two")
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-6)
    log = next((tmp_path / "one").glob("*/log.jsonl")).read_text().splitlines()
    losses = [json.loads(line)["main"] for line in log]
    assert losses[-1] < losses[0]


def test_validation_not_finite_in_one_of_two_processes_does_not_block(small: dict[str, Any], tmp_path: Path) -> None:
    start = {**small, "batch": 4}
    recipe = load({**start, "start": start, "method": "multiscale_self_training"}, "steps=2", "validation.every=1")
    recipe.save(tmp_path / "recipe.yaml")
    command = ("train", tmp_path / "recipe.yaml", "method=half_broken")
    processes.run(*command, out=tmp_path / "runs", world=2, module=__name__)
    run = Run.open(next((tmp_path / "runs").glob("*half_broken*")))
    rows = [row for row in run.log.rows() if row.get("event") == "validation"]
    assert [(row["step"], row["source_miou"]) for row in rows] == [(1, None), (2, None)]
    assert run.finished


def test_adapt_on_two_processes(small: dict[str, Any], tmp_path: Path) -> None:
    start = {**small, "batch": 4}
    load({**start, "start": start, "method": "multiscale_self_training"}).save(tmp_path / "recipe.yaml")
    processes.run("adapt", tmp_path / "recipe.yaml", out=tmp_path / "runs", world=2)
    assert len(list((tmp_path / "runs").rglob("selection.json"))) == 1
    methods = [Run.open(file.parent).recipe.method.name for file in (tmp_path / "runs").glob("*/recipe.yaml")]
    assert sorted(set(methods)) == ["multiscale_self_training", "recalibrate", "recalibrate_by_class", "source_only"]


def test_process_counts_of_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    assert process_counts(TrainerConfig(devices=3)) == (3, 1)
    for name, value in {"TORCHELASTIC_RUN_ID": "a", "LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "12"}.items():
        monkeypatch.setenv(name, value)
    assert process_counts(TrainerConfig()) == (4, 3)
    assert process_counts(TrainerConfig(devices=4)) == (4, 3)
    with pytest.raises(RecipeError, match="--devices 2"):
        process_counts(TrainerConfig(devices=2))
