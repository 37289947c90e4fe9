from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from overfly import train
from overfly.core.errors import DataError, RecipeError
from overfly.core.records import Item, UInt8
from overfly.data.synthetic import Synthetic
from overfly.evaluation.label_free_metrics import VALIDATORS
from overfly.methods.method import Networks, TeacherStudent
from overfly.methods.source_only import SourceOnly
from overfly.models.segmenter import Segmenter
from overfly.recipe import Recipe, load
from overfly.training.run import Run
from overfly.training.setup import initial_segmenter
from overfly.training.trainer import Trainer
from overfly.training.validation import label_free_metrics_at, logged_source_miou, reference

WATCHED = ("validation.every=2", "validation.target=true", "validation.keep_all=true", "steps=4", "optim.lr=1e-5",
           "target.train=2", "source.val=1")  # fmt: skip


def trained(recipe: Recipe, out: Path, **settings: Any) -> Run:
    return train(recipe, out=out, device="cpu", quiet=True, **settings).run


@pytest.fixture
def _blind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening a label of the target is an error."""
    original = Synthetic.read_label

    def guarded(self: Synthetic, item: Item) -> UInt8:
        if self.scene == "rural":
            raise DataError("a label of the target was opened")
        return original(self, item)

    monkeypatch.setattr(Synthetic, "read_label", guarded)


@pytest.mark.usefixtures("_blind")
def test_every_validation_is_written_down_and_kept(small: dict[str, Any], tmp_path: Path) -> None:
    run = trained(load(small, *WATCHED), tmp_path)
    rows = list(run.log.rows())
    assert list(run.validation_weights) == [2, 4]
    for step, file in run.validation_weights.items():
        found = label_free_metrics_at(rows, step)
        assert found is not None
        assert found.source_miou == logged_source_miou(rows, step)
        assert (found.labels_opened, found.images) == (0, 2)
        assert {name for name in VALIDATORS if found.figures()[name] is None} == {"agreement", "consensus"}
        assert Segmenter.load(file).classes == run.recipe.domain("source").classes
    assert label_free_metrics_at(rows, 3) is None
    best = max(run.validation_weights, key=lambda step: logged_source_miou(rows, step) or 0)
    assert all(torch.equal(load_file(run.weights)[k], v) for k, v in load_file(run.validation_weights[best]).items())


def test_watching_changes_nothing_and_resumes_exactly(small: dict[str, Any], tmp_path: Path) -> None:
    recipe = load(small, *WATCHED, "validation.select=last", "augment=[dihedral]")
    whole = trained(recipe, tmp_path / "whole")
    blind = trained(load(recipe, "validation.target=false", "validation.keep_all=false"), tmp_path / "blind")
    assert all(torch.equal(load_file(blind.weights)[k], v) for k, v in load_file(whole.weights).items())
    original = Trainer.save

    def dies(self: Trainer) -> None:
        if self.state["step"] == 4:
            raise KeyboardInterrupt
        original(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "save", dies)
        with pytest.raises(KeyboardInterrupt):
            trained(recipe, tmp_path / "cut", checkpoint_every=2)
    cut = trained(recipe, tmp_path / "cut", checkpoint_every=2)
    rows = [[row for row in run.log.rows() if "event" in row] for run in (cut, whole)]
    assert rows[0] == rows[1]
    for step, file in whole.validation_weights.items():
        assert all(torch.equal(load_file(cut.validation_weights[step])[k], v) for k, v in load_file(file).items())


def test_a_run_without_a_source_watches_the_target_alone(small: dict[str, Any], tmp_path: Path) -> None:
    start = trained(load(small), tmp_path)
    free = {"target": small["target"], "start": str(start.path), "method": "recalibrate", "batch": 2, "crop": 64}
    run = trained(load(free, *WATCHED[:-1]), tmp_path / "free")
    found = label_free_metrics_at(list(run.log.rows()), 4)
    assert found is not None
    assert found.source_miou is None
    assert all(torch.equal(load_file(run.weights)[k], v) for k, v in load_file(run.validation_weights[4]).items())


def test_what_a_network_is_compared_with() -> None:
    class Ships(SourceOnly):
        def deployed(self, nets: Networks) -> torch.nn.Module:
            return nets.teacher if isinstance(nets, TeacherStudent) else nets.student

    nets = TeacherStudent(torch.nn.Linear(1, 1))
    assert reference(SourceOnly(), nets) is nets.teacher
    assert reference(Ships(), nets) is nets.student
    assert reference(SourceOnly(), Networks(torch.nn.Linear(1, 1))) is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["validation.target=true"], "target .*every"),
        (["validation.keep_all=true"], "keep_all .*every"),
        (["validation={every: 2, target: true}", "target=null"], "validation.target"),
    ],
)
def test_what_cannot_be_watched(small: dict[str, Any], changes: list[str], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        load(small, *changes)


def test_several_processes_write_what_one_would(small: dict[str, Any], tmp_path: Path) -> None:
    load(small, *WATCHED, "batch=4", "steps=2").save(tmp_path / "recipe.yaml")
    command = [sys.executable, "-m", "overfly", "train", str(tmp_path / "recipe.yaml"), "--device", "cpu"]
    command += ["--devices", "2", "--out", str(tmp_path / "runs"), "--quiet"]
    subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, capture_output=True, timeout=120)
    run = Run.open(next((tmp_path / "runs").glob("*/recipe.yaml")).parent)
    rows = [row for row in run.log.rows() if row.get("event") == "label-free"]
    assert [row["step"] for row in rows] == [2]
    assert list(run.validation_weights) == [2]


def test_no_network_is_compared_with_itself(recipe_of: Callable[..., Recipe]) -> None:
    for name, student in (
        ("transnorm", False),
        ("dsbn", True),
        ("multiscale_self_training", True),
        ("source_only", False),
    ):
        recipe = recipe_of(name)
        nets = recipe.method.networks(initial_segmenter(recipe))
        assert reference(recipe.method, nets) is (nets.student if student else None), name
