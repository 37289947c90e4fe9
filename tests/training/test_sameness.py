"""The same recipe, seed, machine and threads give the same weights, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import processes
from overfly import train
from overfly.core import device
from overfly.core.device import SAMENESS, describe_machine
from overfly.models.checkpoints import weights_sha256
from overfly.models.segmenter import Segmenter
from overfly.recipe import Recipe, load
from overfly.training.run import Run
from overfly.training.trainer import Trainer


def digest(recipe: Recipe, out: Path) -> str:
    """Train, and return the digest of the weights."""
    return weights_sha256(train(recipe, out=out, device="cpu", quiet=True).run.weights)


def digest_of_processes(recipe: Path, out: Path, world: int) -> str:
    """Train in ``world`` new processes, and return the digest of the weights."""
    processes.run("train", recipe, out=out, world=world)
    return weights_sha256(next(out.glob("*/checkpoints/best.safetensors")))


@pytest.mark.parametrize(("method", "threads"), [("source_only", 2), ("multiscale_self_training", 1)])
def test_two_trainings_give_the_same_bits(
    method: str, threads: int, recipe_of: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipe = recipe_of(method, augment=["dihedral", "scale_jitter", "color_jitter", "gaussian_noise"], optim="adamw")
    torch.set_num_threads(threads)
    digests = [digest(recipe, tmp_path / out) for out in ("first", "second")]
    torch.manual_seed(1)  # no generator of the process is part of the result
    digests.append(digest(recipe, tmp_path / "third"))
    assert len(set(digests)) == 1
    other = recipe_of(method, augment=["dihedral", "scale_jitter", "color_jitter", "gaussian_noise"], seed=1)
    assert digest(other, tmp_path / "other") not in digests


def test_processes_give_the_same_bits_as_as_many_processes(small: dict[str, Any], tmp_path: Path) -> None:
    recipe = load(small, "batch=4", "augment=[dihedral]")
    recipe.save(tmp_path / "recipe.yaml")
    one = [digest(recipe, tmp_path / "here"), digest_of_processes(tmp_path / "recipe.yaml", tmp_path / "one", 1)]
    two = [digest_of_processes(tmp_path / "recipe.yaml", tmp_path / f"two-{number}", 2) for number in range(2)]
    assert one[0] == one[1]
    assert two[0] == two[1]
    assert one[0] != two[0]  # normalization over each process's own half of the batch


class StoppedError(Exception):
    """What stops a run here."""


def test_a_run_resumed_on_another_machine_records_it(
    small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(_: Trainer) -> None:
        raise StoppedError

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "finish", stop)
        with pytest.raises(StoppedError):
            train(load(small), out=tmp_path, device="cpu", quiet=True)
    run = Run.open(next(tmp_path.glob("*/recipe.yaml")).parent)
    assert set(SAMENESS) <= run.machine.keys()
    machine = describe_machine()
    assert {key: run.machine[key] for key in machine} == machine
    monkeypatch.setattr(device, "cpu_name", lambda: "another CPU")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    train(run.path, device="cpu", quiet=True)
    events = [row["changes"] for row in run.log.rows() if row.get("event") == "machine changed"]
    assert len(events) == 1
    assert events[0] in capsys.readouterr().err
    assert "processor another CPU" in events[0]
    assert "ONEDNN_MAX_CPU_ISA=AVX2" in events[0]
    assert "torch" not in events[0]
    assert Segmenter.load(run.weights)
