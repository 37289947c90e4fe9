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
from overfly.evaluation.label_free_metrics import LabelFreeMetrics
from overfly.methods.method import Networks, TeacherStudent
from overfly.methods.source_only import SourceOnly
from overfly.models.segmenter import Segmenter
from overfly.recipe import Recipe, load
from overfly.training.evaluate import logged_source_miou, reference
from overfly.training.run import Run
from overfly.training.setup import initial_network
from overfly.training.trainer import Trainer

VALIDATED = ("validation.every=2", "validation.target=true", "validation.keep_all=true", "steps=4", "optim.lr=1e-5",
           "target.train=2", "source.val=1")  # fmt: skip


def label_free_metrics_at(rows: list[dict[str, Any]], step: int) -> LabelFreeMetrics | None:
    """The label-free metrics in the log at a step, or None."""
    for row in reversed(rows):
        if row.get("event") == "label-free" and row["step"] == step:
            values = {key: value for key, value in row.items() if key not in ("step", "event", "details")}
            return LabelFreeMetrics.model_validate({**values, **row["details"]})
    return None


def trained(recipe: Recipe, out: Path, **settings: Any) -> Run:
    return train(recipe, out=out, device="cpu", quiet=True, **settings).run


@pytest.fixture
def _forbid_target_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make reading a target label an error."""
    original = Synthetic.read_label

    def guarded(self: Synthetic, item: Item) -> UInt8:
        if self.scene == "rural":
            raise DataError("a label of the target was opened")
        return original(self, item)

    monkeypatch.setattr(Synthetic, "read_label", guarded)


@pytest.mark.usefixtures("_forbid_target_labels")
def test_every_validation_is_logged_and_its_weights_are_saved(small: dict[str, Any], tmp_path: Path) -> None:
    run = trained(load(small, *VALIDATED), tmp_path)
    rows = list(run.log.rows())
    assert list(run.validation_weights) == [2, 4]
    for step, file in run.validation_weights.items():
        metrics = label_free_metrics_at(rows, step)
        assert metrics is not None
        assert metrics.source_miou == logged_source_miou(rows, step)
        assert metrics.images == 2
        assert {name for name, value in metrics.by_validator().items() if value is None} == {"agreement", "consensus"}
        assert Segmenter.load(file).classes == run.recipe.domain("source").classes
    assert label_free_metrics_at(rows, 3) is None
    best = max(run.validation_weights, key=lambda step: logged_source_miou(rows, step) or 0)
    final, validated = (Segmenter.load(file) for file in (run.weights, run.validation_weights[best]))
    assert all(map(torch.equal, final.parameters(), validated.parameters()))  # statistics are estimated at the end


def test_target_validation_changes_no_weights_and_resumes_exactly(small: dict[str, Any], tmp_path: Path) -> None:
    recipe = load(small, *VALIDATED, "validation.select=last", "augment=[dihedral]")
    whole = trained(recipe, tmp_path / "whole")
    without = trained(load(recipe, "validation.target=false", "validation.keep_all=false"), tmp_path / "without")
    assert all(torch.equal(load_file(without.weights)[k], v) for k, v in load_file(whole.weights).items())
    original = Trainer.save

    def interrupt(self: Trainer) -> None:
        if self.state["step"] == 4:
            raise KeyboardInterrupt
        original(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "save", interrupt)
        with pytest.raises(KeyboardInterrupt):
            trained(recipe, tmp_path / "cut", checkpoint_every=2)
    cut = trained(recipe, tmp_path / "cut", checkpoint_every=2)
    rows = [[row for row in run.log.rows() if "event" in row] for run in (cut, whole)]
    assert rows[0] == rows[1]
    for step, file in whole.validation_weights.items():
        assert all(torch.equal(load_file(cut.validation_weights[step])[k], v) for k, v in load_file(file).items())


def test_run_without_source_validates_on_the_target(small: dict[str, Any], tmp_path: Path) -> None:
    start = trained(load(small), tmp_path)
    free = {"target": small["target"], "start": str(start.path), "method": "recalibrate", "batch": 2, "crop": 64}
    run = trained(load(free, *VALIDATED[:-1]), tmp_path / "free")
    metrics = label_free_metrics_at(list(run.log.rows()), 4)
    assert metrics is not None
    assert metrics.source_miou is None
    assert all(torch.equal(load_file(run.weights)[k], v) for k, v in load_file(run.validation_weights[4]).items())


def test_reference_is_the_other_of_teacher_and_student() -> None:
    class StudentMethod(SourceOnly):
        def inference_network(self, nets: Networks) -> torch.nn.Module:
            return nets.teacher if isinstance(nets, TeacherStudent) else nets.student

    nets = TeacherStudent(torch.nn.Linear(1, 1))
    assert reference(SourceOnly(), nets) is nets.teacher
    assert reference(StudentMethod(), nets) is nets.student
    assert reference(SourceOnly(), Networks(torch.nn.Linear(1, 1))) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["validation.target=true"], "target .*every"),
        (["validation.keep_all=true"], "keep_all .*every"),
        (["validation={every: 2, target: true}", "target=null"], "validation.target"),
    ],
)
def test_invalid_validation_settings(small: dict[str, Any], changes: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load(small, *changes)


def test_two_processes_log_each_validation_once(small: dict[str, Any], tmp_path: Path) -> None:
    load(small, *VALIDATED, "batch=4", "steps=2", "model=lraspp_mobilenet_v2").save(tmp_path / "recipe.yaml")
    command = [sys.executable, "-m", "overfly", "train", str(tmp_path / "recipe.yaml"), "--device", "cpu"]
    command += ["--devices", "2", "--out", str(tmp_path / "runs"), "--quiet"]
    subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, capture_output=True, timeout=600)
    run = Run.open(next((tmp_path / "runs").glob("*/recipe.yaml")).parent)
    rows = [row for row in run.log.rows() if row.get("event") == "label-free"]
    assert [row["step"] for row in rows] == [2]
    assert list(run.validation_weights) == [2]


def test_reference_is_not_the_deployed_network(recipe_of: Callable[..., Recipe]) -> None:
    for name, student in (
        ("transnorm", False),
        ("dsbn", True),
        ("multiscale_self_training", True),
        ("source_only", False),
    ):
        recipe = recipe_of(name)
        nets = recipe.method.networks(initial_network(recipe)[0])
        assert reference(recipe.method, nets) is (nets.student if student else None), name
