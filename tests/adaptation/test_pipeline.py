from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from overfly import adapt, train
from overfly.adaptation.gate import Gate, geometric_consistency
from overfly.adaptation.pipeline import adapt as compare
from overfly.adaptation.pipeline import plan_candidates, setting_differences
from overfly.adaptation.selection import Comparison, resolve_checkpoint
from overfly.commands.export_data import card_content
from overfly.commands.load_predictor import NetworkFolder, load_network
from overfly.commands.serve import served_networks
from overfly.core.errors import DataError, OverflyError, RecipeError, RunError
from overfly.core.records import Batch
from overfly.data.loveda import CLASSES
from overfly.data.synthetic import Synthetic, synthesize
from overfly.evaluation.score import score
from overfly.methods.dacs import DACS, Mixed
from overfly.methods.method import TeacherStudent
from overfly.recipe import Recipe, load
from overfly.training.engine import TrainerConfig, launch_fabric
from overfly.training.run import Run


class Shuffled(DACS, name="shuffled"):
    """DACS with wrong pseudo-labels."""

    def mix(self, nets: TeacherStudent, batch: Batch) -> Mixed:
        """Shift every pseudo-label to the next class."""
        mixed = super().mix(nets, batch)
        wrong = (mixed.pseudo_label + 1) % len(nets.segmenter.classes)
        label = torch.where(mixed.from_source, mixed.label, wrong)
        return mixed._replace(label=label, weight=torch.ones_like(mixed.weight))


@pytest.fixture(autouse=True)
def _short_recalibration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("overfly.adaptation.pipeline.RECALIBRATION", {"batch": 4, "steps": 4})


@pytest.fixture
def tiny(small: dict[str, Any]) -> dict[str, Any]:
    light = {role: {**small[role], "size": 32} for role in ("source", "target")}
    light |= {"optim": {"name": "adamw", "lr": 0.003}, "batch": 4, "crop": 32}
    return {**small, **light, "start": {**small, **light, "steps": 12}, "steps": 6}


def adapted(recipe: Recipe, out: Path) -> tuple[Path, dict[str, Any]]:
    found = adapt(recipe, out=out, device="cpu", quiet=True, estimate=False)
    return found.path, json.loads((found.path / "selection.json").read_text())


def same_weights(one: Path, other: Path) -> bool:
    first, second = load_file(one), load_file(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_candidates_are_source_only_recalibrated_and_adapted(tiny: dict[str, Any]) -> None:
    plans = plan_candidates(load({**tiny, "method": "dacs"}))
    assert list(plans) == ["source only", "recalibrated", "adapted"]
    assert plans["source only"] == load(tiny["start"])
    recalibrated = plans["recalibrated"]
    assert isinstance(recalibrated, Recipe)
    assert recalibrated.start == plans["source only"]
    assert recalibrated.method.name == "recalibrate"


def test_a_recipe_without_start_gets_a_source_only_baseline(small: dict[str, Any]) -> None:
    recipe = load({**small, "method": "dacs", "augment": ["dihedral"]})
    before = plan_candidates(recipe)["source only"]
    assert isinstance(before, Recipe)
    assert before.method.name == "source_only"
    assert (before.augment, before.steps) == (recipe.augment, recipe.steps)


def test_the_seed_holds_for_all_candidates(tiny: dict[str, Any]) -> None:
    plans = plan_candidates(load({**tiny, "method": "dacs"}, "seed=4"))
    assert {plan.seed for plan in plans.values() if isinstance(plan, Recipe)} == {4}


def test_several_recipes_share_a_baseline_and_list_their_differences(tiny: dict[str, Any]) -> None:
    one, two = (
        load({**tiny, "method": {"name": "multiscale_self_training", "mix_share": share}}) for share in (0.5, 0.0)
    )
    plans = plan_candidates(one, two)
    assert list(plans) == ["source only", "recalibrated", "adapted 1", "adapted 2"]
    assert plans["adapted 2"] == two
    assert setting_differences([one, two]) == [{"method.mix_share": 0.5}, {"method.mix_share": 0.0}]
    assert setting_differences([one]) == [{}]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("start.steps=13", "recipe 2 .*start.steps .*13, .*12"),
        ("window=32", "recipe 2 .*window .*32"),
        ("seed=3", "recipe 2 .*seed .*3, .*0"),
        ("target.scene=urban", "recipe 2 .*target.scene .*urban, .*rural"),
        ("batch=4", "recipe 2"),
    ],
)
def test_recipes_that_differ_in_a_shared_setting_raise(tiny: dict[str, Any], change: str, words: str) -> None:
    recipe = {**tiny, "method": "dacs"}
    with pytest.raises(RecipeError, match=words):
        plan_candidates(load(recipe), load(recipe, change))


def test_recipes_without_a_common_start_raise(small: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="start"):
        plan_candidates(load({**small, "method": "dacs"}), load({**small, "method": "dacs", "batch": 4}))


def test_a_missing_teacher_of_a_later_recipe_raises_before_training(tiny: dict[str, Any], tmp_path: Path) -> None:
    one = load({**tiny, "method": "dacs"})
    two = load({**tiny, "method": {"name": "distill", "teacher": str(tmp_path / "nowhere.safetensors")}})
    with pytest.raises(RecipeError, match=r"recipe 2: method\.teacher: "):
        adapt(one, two, out=tmp_path / "runs", device="cpu", quiet=True)
    assert not (tmp_path / "runs").exists()


def test_one_of_several_recipes_is_recommended_without_labels(tiny: dict[str, Any], tmp_path: Path) -> None:
    start = {**tiny, "start": {**tiny["start"], "steps": 60}, "steps": 20}
    files = []
    for name, method in (
        ("harm", {"name": "shuffled", "ema": 0.5}),
        ("own", {"name": "multiscale_self_training", "mix_share": 0.0}),
    ):
        files.append(tmp_path / f"{name}.yaml")
        load({**start, "method": method}).save(files[-1])
    found = adapt(files[0], str(files[1]), "seed=1", out=tmp_path, device="cpu", quiet=True, estimate=False)
    candidates = found.selection.candidates
    assert list(candidates) == ["source only", "recalibrated", "adapted 1", "adapted 2"]
    assert candidates["adapted 1"].rejections
    assert found.selection.recommended != "adapted 1"
    assert candidates["adapted 2"].settings["method.name"] == "multiscale_self_training"
    rejected = Run.open(candidates["adapted 1"].run)
    assert f"adapted 1: {rejected.path.name} (name shuffled" in "".join(found.selection.differences)
    assert [recipe["seed"] for recipe in found.selection.recipes] == [1, 1]
    assert "name shuffled" in (found.path / "selection.md").read_text()
    assert found.selection.labels_opened == 0
    assert not list(found.path.glob("recipe.yaml"))


def test_of_several_accepted_candidates_the_most_consistent_is_recommended(
    tiny: dict[str, Any], tmp_path: Path
) -> None:
    recipes = [load({**tiny, "method": name}) for name in ("dacs", "mic")]
    loose = Gate(
        max_source_loss=1.0, min_agreement=0.0, skip_familiarity=True, max_confidence_loss=1.0,
        min_consistency_gain=-1.0, tolerance=1e-9,
    )  # fmt: skip
    config = TrainerConfig("cpu", quiet=True)
    fabric = launch_fabric(recipes[0], config)
    selection = compare(*recipes, out=tmp_path, fabric=fabric, config=config, gate=loose, estimates=False).selection
    others = {
        role: geometric_consistency(each.metrics)
        for role, each in selection.candidates.items()
        if role != "source only"
    }
    assert len(others) == 3
    assert others[selection.recommended] == max(others.values())
    assert "geometric consistency" in selection.summary
    assert selection.reverse_validation is None


def test_unfamiliar_images_are_checked_by_reverse_validation(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("overfly.adaptation.pipeline.familiarity", lambda *_: 0.6)
    monkeypatch.setattr("overfly.adaptation.reverse_validation.TREES", 20)
    recipe, config = (
        load({**tiny, "method": "dacs"}, "target.train=8", "source.train=8"),
        TrainerConfig("cpu", quiet=True),
    )
    gate, fabric = Gate(min_reverse_familiarity=1.0), launch_fabric(recipe, config)
    rejected = compare(recipe, out=tmp_path, fabric=fabric, config=config, gate=gate, estimates=False).selection
    reverse = rejected.reverse_validation
    assert reverse is not None
    assert 0.0 < reverse < 1.0
    assert rejected.recommended == "source only"
    assert f"{100 * reverse:.1f} %" in rejected.candidates["adapted"].rejections[0]
    assert f"reverse validation: {100 * reverse:.0f} %" in rejected.markdown()
    assert rejected.labels_opened == 0
    metrics = {name: candidate.metrics for name, candidate in rejected.candidates.items()}
    reasons = Gate(min_reverse_familiarity=0.0).all_rejections("source only", metrics, 0.6, reverse)
    assert not any("--skip-familiarity" in reason for reason in reasons["adapted"])


def test_source_only_raises(small: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="does not adapt"):
        plan_candidates(load(small))


def test_the_comparison_is_written_and_no_target_label_is_read(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    read = Synthetic.read_label

    def watched(self: Synthetic, item: Any) -> Any:
        opened.append(self.scene)
        return read(self, item)

    monkeypatch.setattr(Synthetic, "read_label", watched)
    path, selection = adapted(load({**tiny, "method": "dacs"}), tmp_path)
    assert set(opened) == {"urban"}
    assert selection["labels_opened"] == 0
    assert set(selection["candidates"]) == {"source only", "recalibrated", "adapted"}
    recommended = Run.open(selection["candidates"][selection["recommended"]]["run"])
    assert same_weights(path / "recommended.safetensors", recommended.weights)
    assert "Target labels opened: 0" in (path / "selection.md").read_text()
    assert (path / "samples" / "selection.png").stat().st_size > 1000
    assert path.name.endswith("urban-rural_comparison")
    for run in selection["candidates"].values():
        assert not list(Path(run["run"]).glob("selection*"))
        assert not list(Path(run["run"]).glob("*.safetensors"))


def test_source_miou_is_scored_with_the_recipes_window_for_all_candidates(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever window the start was trained to be scored with, and where it is a file of weights."""
    windows: list[int | None] = []

    def watched(*given: Any, window: int | None = None, **rest: Any) -> Any:
        windows.append(window)
        return score(*given, window=window, **rest)

    monkeypatch.setattr("overfly.adaptation.pipeline.score", watched)
    before = train(load(tiny["start"]), out=tmp_path / "start", device="cpu", quiet=True).run
    file = before.segmenter().save(tmp_path / "start.safetensors")
    for number, start in enumerate((before.path, file)):
        recipe = load({**tiny, "start": str(start), "method": "dacs", "steps": 1, "window": 16})
        _, selection = adapted(recipe, tmp_path / str(number))
        assert windows == [16] * (number + 1)  # the adapted and the recalibrated are scored so by their own recipes
        assert selection["candidates"]["source only"]["metrics"]["source_miou"] is not None


def test_the_same_recipes_use_the_same_comparison_folder_and_train_nothing(
    tiny: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = load({**tiny, "method": "dacs"})
    adapt(recipe, out=tmp_path, device="cpu", estimate=False)
    printed = capfd.readouterr().err
    assert "training 1 of 3: source only" in printed
    assert "training 3 of 3: adapted" in printed
    assert "comparing 3 candidates" in printed
    assert "already trained" not in printed
    path, first = adapted(recipe, tmp_path)
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("last.ckpt")}
    capfd.readouterr()
    found = adapt(recipe, out=tmp_path, device="cpu", estimate=False)
    assert capfd.readouterr().err.count("already trained") == 1
    assert found.path == path
    assert json.loads((path / "selection.json").read_text()) == first
    assert before == {file: file.stat().st_mtime_ns for file in tmp_path.rglob("last.ckpt")}
    assert len(list(tmp_path.glob("*_comparison"))) == 1
    other, _ = adapted(load(recipe, "steps=5"), tmp_path)
    assert other != path


def test_a_run_is_adapted_without_its_source(tiny: dict[str, Any], tmp_path: Path) -> None:
    run = train(load(tiny["start"]), out=tmp_path / "first", device="cpu", quiet=True).run
    recipe = load(
        {"start": str(run.path), "target": tiny["target"], "method": "source_free", "crop": 32, "batch": 4, "steps": 3}
    )
    path, selection = adapted(recipe, tmp_path / "second")
    assert selection["candidates"]["source only"]["run"] == str(run.path)
    assert selection["candidates"]["adapted"]["metrics"]["source_miou"] is None
    assert (path / "recommended.safetensors").exists()


def test_a_source_without_held_out_images_is_adapted(tiny: dict[str, Any], tmp_path: Path) -> None:
    """A folder without splits, as is the default: before, the selection failed after all the training."""
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    for index in range(4):
        image, label = synthesize("urban", "train", index, 64)
        Image.fromarray(image).save(tmp_path / "images" / f"{index}.png")
        Image.fromarray(label).save(tmp_path / "masks" / f"{index}.png")
    source = {"name": "folder", "root": str(tmp_path), "masks": "masks", "classes": list(CLASSES.names)}
    recipe = {**tiny, "source": source, "start": {**tiny["start"], "source": source}, "method": "dacs"}
    path, selection = adapted(load(recipe), tmp_path / "runs")
    assert selection["familiarity"] is None
    assert selection["candidates"]["adapted"]["metrics"]["source_miou"] is None
    assert "no held-out images" in (path / "selection.md").read_text()
    few = {"train": 0.999, "val": 0.001}
    with pytest.raises(DataError, match=r"\bval\b"):
        adapted(load(recipe, f"source.splits={few}"), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_wrong_validation_mask_raises_before_training(tiny: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    for index in range(4):
        image, label = synthesize("urban", "train", index, 64)
        Image.fromarray(image).save(tmp_path / "images" / f"{index}.png")
        Image.fromarray(label).save(tmp_path / "masks" / f"{index}.png")
    source: dict[str, Any] = {"name": "folder", "root": str(tmp_path), "masks": "masks"}
    source |= {"classes": list(CLASSES.names), "splits": {"train": 0.5, "val": 0.5}}
    recipe = load({**tiny, "source": source, "start": {**tiny["start"], "source": source}, "method": "dacs"})
    mask = Path(str(recipe.domain("source").items("val")[0].label))
    Image.fromarray(np.full((64, 64), 99, np.uint8)).save(mask)
    with pytest.raises(DataError, match=mask.name):
        adapt(recipe, out=tmp_path / "runs", device="cpu", quiet=True)
    assert not (tmp_path / "runs").exists()


def test_a_missing_teacher_raises_before_training(tiny: dict[str, Any], tmp_path: Path) -> None:
    recipe = load({**tiny, "method": {"name": "distill", "teacher": str(tmp_path / "nowhere.safetensors")}})
    with pytest.raises(OverflyError, match=r"^method\.teacher: "):
        adapt(recipe, out=tmp_path / "runs", device="cpu", quiet=True)
    assert not (tmp_path / "runs").exists()


def test_labels_of_target_images_that_are_source_images_are_counted(tiny: dict[str, Any], tmp_path: Path) -> None:
    recipe = load({**tiny, "target": {**tiny["source"], "train": 3}, "method": "dacs", "steps": 1})
    _, selection = adapted(recipe, tmp_path)
    assert selection["labels_opened"] == 3
    free = {
        "start": selection["candidates"]["adapted"]["run"],
        "target": tiny["source"],
        "method": "source_free",
        "crop": 32,
        "batch": 4,
        "steps": 1,
    }
    assert adapted(load(free), tmp_path / "free")[1]["labels_opened"] == 4


def test_a_comparison_folder_means_its_recommended_network_and_a_run_folder_its_own(
    tiny: dict[str, Any], tmp_path: Path
) -> None:
    recipe = load({**tiny, "method": "dacs", "steps": 1})
    config, gate = TrainerConfig("cpu", quiet=True), Gate(min_consistency_gain=1.0)
    comparison = compare(
        recipe, out=tmp_path, fabric=launch_fabric(recipe, config), config=config, gate=gate, estimates=False
    )
    path, selection = comparison.path, comparison.selection
    assert selection.recommended == "source only"
    assert selection.summary == "recommended: source only; rejected: recalibrated and adapted"
    before, run = (Run.open(selection.candidates[name].run) for name in ("source only", "adapted"))
    assert same_weights(comparison.weights, before.weights)
    image = torch.full((1, 3, 64, 64), 99.0)
    for folder, own in ((path, before), (run.path, run), (before.path, before)):
        assert torch.equal(load_network(folder)[0](image).main, own.segmenter()(image).main)
    assert resolve_checkpoint(path) == before.path
    assert resolve_checkpoint(run.path) == run.path
    content = card_content(NetworkFolder.open(path))
    assert (content.title, content.method.split(":")[0]) == (before.path.name, "`source_only`")
    assert "source only" in content.selection
    assert card_content(NetworkFolder.open(run.path)).method.startswith("`dacs`")
    (network,) = served_networks([str(path)])
    assert network.title == "source only, Urban to Rural, seed 0"
    assert (network.about["method"], network.about["folder"]) == ("source_only", path.name)
    assert len(served_networks([str(tmp_path)])) == 3
    shutil.rmtree(before.path)
    assert resolve_checkpoint(path) == path / "recommended.safetensors"
    assert load_network(path)[1].title == path.name
    assert card_content(NetworkFolder.open(path)).title == path.name


def test_a_damaged_selection_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "2026_a-b_comparison"
    folder.mkdir()
    (folder / "selection.json").write_text('{"format": 99}')
    (found,) = Comparison.find_all(tmp_path)
    with pytest.raises(RunError, match=r"selection\.json .*overfly adapt"):
        _ = found.selection
