"""Training by several processes, started by --devices or by torchrun."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conftest import REPOSITORY
from overfly.core.errors import RecipeError
from overfly.recipe import load
from overfly.training.engine import TrainerConfig, process_counts
from overfly.training.run import Run

PLAIN = '''
"""A network without batch normalization, whose gradient does not depend on how a batch is shared; then the command."""
import sys
from torch import nn
from overfly import cli
from overfly.core.records import Logits
from overfly.models.network import Network, register


class Plain(Network):
    stride = 4
    heads = ("head",)

    def __init__(self, classes, bands):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(bands, 8, 3, 4, 1), nn.GroupNorm(2, 8), nn.ReLU())
        self.head = nn.Conv2d(8, classes, 1)

    def forward(self, image):
        return Logits(main=self.head(self.body(image)))


@register
def plain(classes: int, training_heads: bool, bands: int) -> Plain:
    """A network for this test."""
    return Plain(classes, bands)


cli.main(sys.argv[1:])
'''


BROKEN_IN_ONE_PROCESS = """
import os, sys
from torch import nn
from overfly import cli
from overfly.methods.multiscale_self_training import MultiscaleSelfTraining


class Broken(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, image):
        logits = self.network(image)
        return logits._replace(main=logits.main * float("nan"))


class HalfBroken(MultiscaleSelfTraining, name="half_broken"):
    def inference_network(self, nets):
        network = super().inference_network(nets)
        return Broken(network) if os.environ.get("LOCAL_RANK") == "1" else network


cli.main(sys.argv[1:])
"""


def trained(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next(folder.glob("*/checkpoints/best.safetensors")))


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        port: int = opened.getsockname()[1]
        return port


def test_two_machines_train_the_same_weights_as_one_process(small: dict[str, Any], tmp_path: Path) -> None:
    load(small, "batch=4", "steps=4", "optim={name: sgd, lr: 0.1, momentum: 0.9}").save(tmp_path / "recipe.yaml")
    script = tmp_path / "plain.py"
    script.write_text(PLAIN)
    command = [str(script), "train", str(tmp_path / "recipe.yaml"), "model=plain", "--device", "cpu", "--quiet"]
    command += ["--log-every", "1", "--out"]
    port = free_port()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    torchrun += ["--master-addr", "127.0.0.1", "--master-port", str(port)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY / "src")}
    jobs = [
        subprocess.Popen(
            [*torchrun, "--node-rank", str(node), *command, str(tmp_path / "two")],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for node in range(2)
    ]  # fmt: skip
    subprocess.run([sys.executable, *command, str(tmp_path / "one")], env=environment, check=True, timeout=600)
    outputs = [job.communicate(timeout=600) for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], outputs
    assert sum("trained:" in out for out, _ in outputs) == 1
    one, two = trained(tmp_path / "one"), trained(tmp_path / "two")
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-6)
    log = next((tmp_path / "one").glob("*/log.jsonl")).read_text().splitlines()
    losses = [json.loads(line)["main"] for line in log]
    assert losses[-1] < losses[0]


def test_validation_not_finite_in_one_of_two_processes_does_not_block(small: dict[str, Any], tmp_path: Path) -> None:
    changes = ("batch=4", "steps=2", "validation.every=1")
    load({**small, "start": {**small, "batch": 4}, "method": "multiscale_self_training"}, *changes).save(
        tmp_path / "recipe.yaml"
    )
    script = tmp_path / "broken.py"
    script.write_text(BROKEN_IN_ONE_PROCESS)
    run_two_processes([str(script), "train", str(tmp_path / "recipe.yaml"), "method=half_broken"], tmp_path / "runs")
    run = Run.open(next((tmp_path / "runs").glob("*half_broken*")))
    rows = [row for row in run.log.rows() if row.get("event") == "validation"]
    assert [(row["step"], row["source_miou"]) for row in rows] == [(1, None), (2, None)]
    assert run.finished


def test_adapt_on_two_processes(small: dict[str, Any], tmp_path: Path) -> None:
    load({**small, "start": {**small, "batch": 4}, "method": "multiscale_self_training", "batch": 4}).save(
        tmp_path / "recipe.yaml"
    )
    run_two_processes(["-m", "overfly", "adapt", str(tmp_path / "recipe.yaml")], tmp_path / "runs")
    assert len(list((tmp_path / "runs").rglob("selection.json"))) == 1
    methods = [Run.open(file.parent).recipe.method.name for file in (tmp_path / "runs").glob("*/recipe.yaml")]
    assert sorted(methods) == ["multiscale_self_training", "recalibrate", "source_only"]


def run_two_processes(command: list[str], out: Path) -> None:
    """Run a command of overfly with two processes on the CPU."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY / "src")}
    arguments = ["--devices", "2", "--device", "cpu", "--quiet", "--out", str(out)]
    subprocess.run(
        [sys.executable, *command, *arguments], env=environment, check=True, capture_output=True, timeout=600
    )


def test_process_counts_of_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    assert process_counts(TrainerConfig(devices=3)) == (3, 1)
    for name, value in {"TORCHELASTIC_RUN_ID": "a", "LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "12"}.items():
        monkeypatch.setenv(name, value)
    assert process_counts(TrainerConfig()) == (4, 3)
    assert process_counts(TrainerConfig(devices=4)) == (4, 3)
    with pytest.raises(RecipeError, match="--devices 2"):
        process_counts(TrainerConfig(devices=2))
