"""Training by several processes, as torchrun starts them on one machine or on many."""

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


def trained(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next(folder.glob("*/checkpoints/best.safetensors")))


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        port: int = opened.getsockname()[1]
        return port


def test_two_machines_end_where_one_process_ends_with_the_same_batch(small: dict[str, Any], tmp_path: Path) -> None:
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
    told = [job.communicate(timeout=600) for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], told
    assert sum("trained:" in out for out, _ in told) == 1  # the first process speaks for all
    one, two = trained(tmp_path / "one"), trained(tmp_path / "two")
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-6)
    log = next((tmp_path / "one").glob("*/log.jsonl")).read_text().splitlines()
    losses = [json.loads(line)["main"] for line in log]
    assert losses[-1] < losses[0]  # there was something to learn


def test_how_many_processes_torchrun_has_started(monkeypatch: pytest.MonkeyPatch) -> None:
    assert process_counts(TrainerConfig(devices=3)) == (3, 1)
    for name, value in {"TORCHELASTIC_RUN_ID": "a", "LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "12"}.items():
        monkeypatch.setenv(name, value)
    assert process_counts(TrainerConfig()) == (4, 3)
    assert process_counts(TrainerConfig(devices=4)) == (4, 3)
    with pytest.raises(RecipeError, match="torchrun starts 4 processes here, not --devices 2"):
        process_counts(TrainerConfig(devices=2))
