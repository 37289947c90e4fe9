"""Runs whose images, masks or processes are not there any more."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import processes
from overfly import train
from overfly.core.errors import RunError
from overfly.models.checkpoints import weights_sha256
from overfly.recipe import load
from overfly.training.run import Run


def test_changed_masks_make_a_new_run(
    small: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for part in ("images", "masks"):
        (tmp_path / part).mkdir()
    for number in range(4):
        Image.new("RGB", (64, 64), (number, 9, 90)).save(tmp_path / "images" / f"{number}.png")
        Image.new("L", (64, 64), number % 2).save(tmp_path / "masks" / f"{number}.png")
    source = {"name": "folder", "root": str(tmp_path), "classes": ["a", "b"], "masks": "masks"}
    recipe = load({**small, "source": source, "target": None}, "steps=2")

    def trained(out: Path) -> Run:
        return train(recipe, out=out, device="cpu", quiet=True).run

    first = trained(tmp_path / "runs")
    assert trained(tmp_path / "runs").path == first.path
    for number in range(4):
        Image.new("L", (64, 64), (number + 1) % 2).save(tmp_path / "masks" / f"{number}.png")
    second = trained(tmp_path / "runs")
    assert second.path != first.path
    assert f"{first.path.name}: its images or masks have changed since" in capsys.readouterr().err
    assert weights_sha256(first.weights) != weights_sha256(second.weights)
    assert trained(tmp_path / "runs").path == second.path
    with pytest.raises(RunError, match="images or masks"):
        trained(first.path)


def test_a_killed_process_ends_the_other_one(small: dict[str, Any], tmp_path: Path) -> None:
    load(small, "steps=100000", "batch=4").save(tmp_path / "recipe.yaml")
    command = ("train", tmp_path / "recipe.yaml", "--checkpoint-every", "1", "--log-every", "1")
    first, second = processes.start(*command, out=tmp_path / "cut", world=2)
    deadline = time.monotonic() + 300
    while not list((tmp_path / "cut").glob("*/checkpoints/last*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    second.kill()
    first.join(60)
    assert first.exitcode == 2, "a sentence, not a traceback"
    assert Run.open(next((tmp_path / "cut").glob("*/recipe.yaml")).parent).whole_checkpoint() is not None
