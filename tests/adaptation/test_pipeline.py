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

from comparisons import recommend
from overfly import adapt, train
from overfly.adaptation import pipeline
from overfly.adaptation.pipeline import RECALIBRATED, plan_candidates
from overfly.adaptation.selection import Comparison, resolve_checkpoint, setting_differences
from overfly.commands.export_data import card_content
from overfly.commands.load_predictor import NetworkFolder, load_network
from overfly.commands.serve import served_networks
from overfly.core.errors import DataError, OverflyError, RecipeError, RunError
from overfly.core.records import Batch
from overfly.data.loveda import CLASSES
from overfly.data.synthetic import Synthetic, synthesize
from overfly.evaluation.images import MetricOptions
from overfly.evaluation.label_free_metrics import predict_probabilities
from overfly.methods.dacs import DACS, Mixed
from overfly.methods.method import TeacherStudent
from overfly.models.segmenter import Segmenter
from overfly.recipe import Recipe, load
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
    monkeypatch.setattr(pipeline, "RECALIBRATION", {"batch": 4, "steps": 4})
    monkeypatch.setattr(pipeline, "RECALIBRATED", {"recalibrated": RECALIBRATED["recalibrated"]})


@pytest.fixture
def tiny(small: dict[str, Any]) -> dict[str, Any]:
    light: dict[str, Any] = {role: {**small[role], "size": 32} for role in ("source", "target")}
    light |= {"optim": {"name": "adamw", "lr": 0.003}, "batch": 4, "crop": 32}
    return {**small, **light, "start": {**small, **light, "steps": 12}, "steps": 6}


def adapted(*recipes: Recipe, out: Path, **options: Any) -> tuple[Path, dict[str, Any]]:
    found = adapt(*recipes, out=out, device="cpu", quiet=True, estimate=False, **options)
    return found.path, json.loads((found.path / "selection.json").read_text())


def same_weights(one: Path, other: Path) -> bool:
    first, second = load_file(one), load_file(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_candidates_are_source_only_recalibrated_and_adapted(
    tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "RECALIBRATED", RECALIBRATED)
    plans = plan_candidates(load({**tiny, "method": "dacs"}))
    assert list(plans) == ["source only", *RECALIBRATED, "adapted"]
    assert plans["source only"] == load(tiny["start"])
    for name, method in RECALIBRATED.items():
        plan = plans[name]
        assert isinstance(plan, Recipe)
        assert (plan.start, plan.method) == (plans["source only"], method)
    free = {"start": "x.safetensors", "target": tiny["target"], "method": "source_free", "model": tiny["model"]}
    without_source = [name for name, method in RECALIBRATED.items() if not method.needs_source]
    assert list(plan_candidates(load(free))) == ["source only", *without_source, "adapted"]


@pytest.mark.parametrize(("side", "crop", "found"), [(70, 32, 64), (70, 96, 96), (640, 64, 384)])
def test_statistics_are_estimated_on_larger_crops(
    tiny: dict[str, Any], tmp_path: Path, side: int, crop: int, found: int
) -> None:
    Image.fromarray(np.zeros((side, side + 40, 3), np.uint8)).save(tmp_path / "0.png")
    domain = {"name": "folder", "root": str(tmp_path), "images": ".", "classes": list(CLASSES.names)}
    start = {"start": "x.safetensors", "model": tiny["model"]}
    plan = plan_candidates(load({**start, "target": domain, "method": "source_free", "crop": crop}))["recalibrated"]
    assert isinstance(plan, Recipe)
    assert plan.crop == found


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
    reports = found.selection.candidates
    assert list(reports) == ["source only", "recalibrated", "adapted 1", "adapted 2"]
    assert found.selection.recommended != "adapted 1"
    assert reports["adapted 2"].settings["method.name"] == "multiscale_self_training"
    harmed = Run.open(reports["adapted 1"].run)
    assert f"adapted 1: {harmed.path.name} (name shuffled" in "".join(found.selection.differences)
    assert [recipe["seed"] for recipe in found.selection.recipes] == [1, 1]
    assert "name shuffled" in (found.path / "selection.md").read_text()
    assert found.selection.labels_opened == 0
    assert not list(found.path.glob("recipe.yaml"))


def test_accepted_adapted_networks_are_averaged(tiny: dict[str, Any], tmp_path: Path) -> None:
    methods = [{"name": "multiscale_self_training", "mix_share": share} for share in (0.5, 0.0, 1.0)]
    recipes = [load({**tiny, "method": method}) for method in methods]
    loose = ["max_source_loss=1", "max_confidence_loss=1", "min_classes=0"]
    path, selection = adapted(*recipes, out=tmp_path, gate=loose)
    runs = {name: Run.open(report["run"]) for name, report in selection["candidates"].items()}
    assert list(runs) == ["source only", "recalibrated", "adapted 1", "adapted 2", "adapted 3", "averaged"]
    assert runs["averaged"].recipe.batch == recipes[0].batch  # which the devices of a run can share
    states = [load_file(runs[f"adapted {number}"].weights) for number in (1, 2, 3)]
    for name, value in load_file(runs["averaged"].weights).items():
        if value.is_floating_point():
            mean = torch.stack([state[name].double() for state in states]).mean(0)
            torch.testing.assert_close(value.double(), mean, rtol=0, atol=1e-6)
    assert selection["candidates"]["averaged"]["metrics"]["consistency"] > 0
    again, _ = adapted(*recipes, out=tmp_path, gate=loose)
    assert again == path
    assert len(list(tmp_path.glob("*average_weights*"))) == 1
    strict = adapted(
        *recipes, out=tmp_path / "strict", gate=["max_source_loss=0", "min_classes=1", "max_confidence_loss=0"]
    )
    accepted = [
        report
        for name, report in strict[1]["candidates"].items()
        if name.startswith("adapted")
        and all(check["value"] >= check["bound"] for check in report["checks"] if check["rejects"])
    ]
    assert ("averaged" in strict[1]["candidates"]) == (len(accepted) > 1)


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
    path, selection = adapted(load({**tiny, "method": "dacs"}), out=tmp_path)
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

    def watched(network: Segmenter, images: Any, options: MetricOptions) -> Any:
        windows.append(options.window)
        return predict_probabilities(network, images, options)

    monkeypatch.setattr("overfly.evaluation.label_free_metrics.predict_probabilities", watched)
    before = train(load(tiny["start"]), out=tmp_path / "start", device="cpu", quiet=True).run
    file = before.segmenter().save(tmp_path / "start.safetensors")
    for number, start in enumerate((before.path, file), 1):
        recipe = load({**tiny, "start": str(start), "method": "dacs", "steps": 1, "window": 16})
        _, selection = adapted(recipe, out=tmp_path / str(number))
        assert set(windows) == {16}
        reports = {name: report["metrics"] for name, report in selection["candidates"].items()}
        with_source_statistics = {name: values["source_statistics_miou"] for name, values in reports.items()}
        assert with_source_statistics["recalibrated"] == with_source_statistics["source only"] is not None
        assert reports["source only"]["source_miou"] == with_source_statistics["source only"]
        assert reports["recalibrated"]["source_miou"] != with_source_statistics["recalibrated"]


def test_the_same_recipes_use_the_same_comparison_folder_and_train_nothing(
    tiny: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = load({**tiny, "method": "dacs"})
    adapt(recipe, out=tmp_path, device="cpu", estimate=False)
    printed = capfd.readouterr().err
    assert "training 1 of 2: source only" in printed
    assert "training 2 of 2: recalibrated" in printed
    assert "training 1 of 1: adapted" in printed
    assert "already trained" not in printed
    path, first = adapted(recipe, out=tmp_path)
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("last.ckpt")}
    capfd.readouterr()
    found = adapt(recipe, out=tmp_path, device="cpu", estimate=False)
    assert capfd.readouterr().err.count("already trained") == 2
    assert found.path == path
    assert json.loads((path / "selection.json").read_text()) == first
    assert before == {file: file.stat().st_mtime_ns for file in tmp_path.rglob("last.ckpt")}
    assert len(list(tmp_path.glob("*_comparison"))) == 1
    other, _ = adapted(load(recipe, "steps=5"), out=tmp_path)
    assert other != path


@pytest.mark.parametrize("name", ["source only", "adapted"])
def test_a_run_is_adapted_without_its_source(
    name: str, tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recommend(monkeypatch, name)
    run = train(load(tiny["start"]), out=tmp_path / "first", device="cpu", quiet=True).run
    recipe = load(
        {"start": str(run.path), "target": tiny["target"], "method": "source_free", "crop": 32, "batch": 4, "steps": 3}
    )
    path, selection = adapted(recipe, out=tmp_path / "second")
    assert selection["candidates"]["source only"]["run"] == str(run.path)
    assert selection["candidates"]["adapted"]["metrics"]["source_miou"] is None
    assert selection["recommended"] == name
    assert (path / "recommended.safetensors").exists()
    assert not (path / "recommended-source.safetensors").exists()


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
    _, selection = adapted(load(recipe), out=tmp_path / "runs")
    assert selection["target_checks"] == []
    assert selection["candidates"]["adapted"]["metrics"]["source_miou"] is None
    few = {"train": 0.999, "val": 0.001}
    with pytest.raises(DataError, match=r"\bval\b"):
        adapted(load(recipe, f"source.splits={few}"), out=tmp_path / "none")
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
    _, selection = adapted(recipe, out=tmp_path)
    assert selection["labels_opened"] == 3
    free = {
        "start": selection["candidates"]["adapted"]["run"],
        "target": tiny["source"],
        "method": "source_free",
        "crop": 32,
        "batch": 4,
        "steps": 1,
    }
    assert adapted(load(free), out=tmp_path / "free")[1]["labels_opened"] == 4


def test_a_comparison_folder_means_its_recommended_network_and_a_run_folder_its_own(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recommend(monkeypatch, "source only")
    path, _ = adapted(load({**tiny, "method": "dacs", "steps": 1}), out=tmp_path)
    comparison = Comparison(path)
    selection = comparison.selection
    assert selection.recommended == "source only"
    before, run = (Run.open(selection.candidates[name].run) for name in ("source only", "adapted"))
    assert same_weights(comparison.weights, before.weights)
    image = torch.full((1, 3, 64, 64), 99.0)
    for folder, own in ((path, before), (run.path, run), (before.path, before)):
        assert torch.equal(load_network(folder)[0](image).main, own.segmenter()(image).main)
    assert resolve_checkpoint(path) == before.path
    assert resolve_checkpoint(run.path) == run.path
    content = card_content(NetworkFolder.open(path))
    assert (content.title, content.method.split(":")[0]) == (before.path.name, "`source_only`")
    assert content.selection == selection
    assert card_content(NetworkFolder.open(run.path)).method.startswith("`dacs`")
    (network,) = served_networks([str(path)])
    assert network.title == "source only, Urban to Rural, seed 0"
    assert (network.about["method"], network.about["folder"]) == ("source_only", path.name)
    assert len(served_networks([str(tmp_path)])) == 3
    shutil.rmtree(before.path)
    assert resolve_checkpoint(path) == path / "recommended.safetensors"
    assert load_network(path)[1].title == path.name
    assert card_content(NetworkFolder.open(path)).title == path.name


@pytest.mark.parametrize(
    ("content", "message"), [('{"format": 2}', r"selection\.json .*overfly adapt"), ('{"format": 99}', "newer version")]
)
def test_a_damaged_or_newer_selection_is_named(tmp_path: Path, content: str, message: str) -> None:
    folder = tmp_path / "2026_a-b_comparison"
    folder.mkdir()
    (folder / "selection.json").write_text(content)
    (found,) = Comparison.find_all(tmp_path)
    with pytest.raises(RunError, match=message):
        _ = found.selection
