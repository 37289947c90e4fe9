from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from overfly import adapt, train
from overfly.adaptation.gate import Gate, geometric_consistency
from overfly.adaptation.pipeline import adapt as judge
from overfly.adaptation.pipeline import beside, differences
from overfly.adaptation.selection import Selection
from overfly.commands.arguments import split_entries
from overfly.commands.export import card_content
from overfly.commands.load_predictor import resolve_start
from overfly.commands.serve import served_networks
from overfly.core.errors import DataError, OverflyError, RecipeError
from overfly.core.records import Batch
from overfly.data.loveda import CLASSES
from overfly.data.synthetic.domain import Synthetic, synthesize
from overfly.evaluation.score import score
from overfly.methods.dacs import DACS, Mix, MixNetworks
from overfly.recipe import Recipe, load
from overfly.training.engine import TrainerConfig, launch_fabric
from overfly.training.run import Run


class Shuffled(DACS, name="shuffled"):
    """DACS whose pseudo-labels are of another class each: planted harm."""

    def mix(self, nets: MixNetworks, batch: Batch) -> Mix:
        """Every class called by the next one's name."""
        mix = super().mix(nets, batch)
        wrong = (mix.pseudo + 1) % len(nets.segmenter.classes)
        return mix._replace(label=torch.where(mix.cut, mix.label, wrong), weight=torch.ones_like(mix.weight))


@pytest.fixture
def tiny(small: dict[str, Any]) -> dict[str, Any]:
    light = {"model": "lraspp_mobilenet_v2", "optim": {"name": "adamw", "lr": 0.003}, "batch": 4}
    return {**small, **light, "start": {**small, **light, "steps": 12}, "steps": 6}


def adapted(recipe: Recipe, out: Path) -> tuple[Run, dict[str, Any]]:
    found = adapt(recipe, out=out, device="cpu", quiet=True)
    return found.run, json.loads((found.path / "selection.json").read_text())


def test_three_networks_stand_beside_each_other(tiny: dict[str, Any]) -> None:
    plans = beside(load({**tiny, "method": "dacs"}))
    assert list(plans) == ["source only", "recalibrated", "adapted"]
    assert plans["source only"] == load(tiny["start"])
    recalibrated = plans["recalibrated"]
    assert isinstance(recalibrated, Recipe)
    assert recalibrated.start == plans["source only"]
    assert recalibrated.method.name == "recalibrate"


def test_a_recipe_without_a_start_is_given_its_own_baseline(small: dict[str, Any]) -> None:
    recipe = load({**small, "method": "dacs", "augment": ["dihedral"]})
    before = beside(recipe)["source only"]
    assert isinstance(before, Recipe)
    assert before.method.name == "source_only"
    assert (before.augment, before.steps) == (recipe.augment, recipe.steps)


def test_the_seed_reaches_all_three(tiny: dict[str, Any]) -> None:
    plans = beside(load({**tiny, "method": "dacs"}, "seed=4"))
    assert {plan.seed for plan in plans.values() if isinstance(plan, Recipe)} == {4}


def test_several_ways_begin_from_one_network_and_say_where_they_differ(tiny: dict[str, Any]) -> None:
    one, two = (
        load({**tiny, "method": {"name": "multiscale_self_training", "mix_share": share}}) for share in (0.5, 0.0)
    )
    plans = beside(one, two)
    assert list(plans) == ["source only", "recalibrated", "adapted 1", "adapted 2"]
    assert plans["adapted 2"] == two
    assert differences([one, two]) == [{"method.mix_share": 0.5}, {"method.mix_share": 0.0}]
    assert differences([one]) == [{}]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("start.steps=13", "recipe 2 says 13 for start.steps, and the first 12; recipes to choose among share"),
        ("window=32", "recipe 2 says 32 for window, and the first none"),
        ("seed=3", "recipe 2 says 3 for seed, and the first 0"),
        ("target.scene=urban", "recipe 2 says urban for target.scene, and the first rural"),
        ("batch=4", "recipe 2 says what another one says"),
    ],
)
def test_ways_from_different_starts_are_not_chosen_among(tiny: dict[str, Any], change: str, words: str) -> None:
    recipe = {**tiny, "method": "dacs"}
    with pytest.raises(RecipeError, match=words):
        beside(load(recipe), load(recipe, change))


def test_ways_without_a_start_need_one_in_common(small: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="write the same start in both"):
        beside(load({**small, "method": "dacs"}), load({**small, "method": "dacs", "batch": 4}))


def test_what_a_later_recipe_lacks_is_found_before_the_first_is_trained(tiny: dict[str, Any], tmp_path: Path) -> None:
    one = load({**tiny, "method": "dacs"})
    two = load({**tiny, "method": {"name": "distill", "teacher": str(tmp_path / "nowhere.safetensors")}})
    with pytest.raises(RecipeError, match=r"recipe 2: method.teacher: .* does not exist"):
        adapt(one, two, out=tmp_path / "runs", device="cpu", quiet=True)
    assert not (tmp_path / "runs").exists()


def test_of_several_ways_one_is_chosen_without_labels(tiny: dict[str, Any], tmp_path: Path) -> None:
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
    refused = Run.open(candidates["adapted 1"].run)
    assert json.loads((refused.path / "selection.json").read_text())["recommended"] == found.selection.recommended
    safe = load_file(refused.path / "best.safetensors")
    assert all(torch.equal(safe[name], each) for name, each in load_file(found.best).items())
    assert f"adapted 1: {refused.path.name} (name shuffled" in "".join(found.selection.differences)
    assert found.run.recipe.method.name == (
        "shuffled" if candidates["adapted 2"].rejections else "multiscale_self_training"
    )
    assert found.run.recipe.seed == 1
    assert "In what the adapted networks differ" in (found.path / "selection.md").read_text()
    assert found.selection.labels_opened == 0


def test_of_several_that_pass_the_steadiest_is_recommended(tiny: dict[str, Any], tmp_path: Path) -> None:
    """With a gate that lets all pass."""
    recipes = [load({**tiny, "method": name}) for name in ("dacs", "mic")]
    loose = Gate(source_loss=1.0, agreement=0.0, familiar=0.0, sureness=1.0).model_copy(
        update={"margin": -1.0, "alike": 1e-9}
    )
    config = TrainerConfig("cpu", quiet=True)
    _, selection = judge(*recipes, out=tmp_path, fabric=launch_fabric(recipes[0], config), config=config, gate=loose)
    others = {
        role: geometric_consistency(each.metrics)
        for role, each in selection.candidates.items()
        if role != "source only"
    }
    assert len(others) == 3
    assert others[selection.recommended] == max(others.values())
    assert "it is steadier on the target than" in selection.summary
    other = Path(selection.candidates["adapted 2" if selection.recommended != "adapted 2" else "adapted 1"].run)
    assert (other / "selection.json").exists()
    if selection.recommended != "recalibrated":
        assert not (other / "best.safetensors").exists()


def test_where_the_pictures_may_be_strange_what_the_labels_teach_is_asked(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, config = load({**tiny, "method": "dacs"}, "target.train=8"), TrainerConfig("cpu", quiet=True)

    def selection(known: float, asked: float) -> Selection:
        monkeypatch.setattr("overfly.adaptation.pipeline.familiarity", lambda *_: known)
        gate = Gate(known=asked)
        return judge(recipe, out=tmp_path, fabric=launch_fabric(recipe, config), config=config, gate=gate)[1]

    refused, taken = selection(0.6, 1.0), selection(0.6, 0.0)
    assert refused.reverse_validation is not None
    assert 0.0 < refused.reverse_validation < 1.0
    assert refused.recommended == "source only"
    assert f"teach {100 * refused.reverse_validation:.1f} %" in refused.candidates["adapted"].rejections[0]
    assert f"Its labels of the target teach {100 * refused.reverse_validation:.0f} %" in refused.report()
    assert refused.labels_opened == 0
    assert taken.reverse_validation == refused.reverse_validation
    assert not any("--skip-familiarity" in reason for reason in taken.candidates["adapted"].rejections)


def test_source_only_is_no_adaptation(small: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="does not adapt"):
        beside(load(small))


def test_the_verdict_is_written_and_no_target_label_is_opened(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    read = Synthetic.read_label

    def watched(self: Synthetic, item: Any) -> Any:
        opened.append(self.scene)
        return read(self, item)

    monkeypatch.setattr(Synthetic, "read_label", watched)
    run, selection = adapted(load({**tiny, "method": "dacs"}), tmp_path)
    assert set(opened) == {"urban"}
    assert selection["labels_opened"] == 0
    assert set(selection["candidates"]) == {"source only", "recalibrated", "adapted"}
    best = load_file(run.path / "best.safetensors")
    chosen = load_file(Run.open(selection["candidates"][selection["recommended"]]["run"]).weights)
    assert best.keys() == chosen.keys()
    assert all(torch.equal(best[name], chosen[name]) for name in best)
    assert "Target labels opened: 0" in (run.path / "selection.md").read_text()
    assert (run.path / "samples" / "selection.png").stat().st_size > 1000


def test_what_was_lost_at_home_is_asked_in_one_way_of_all(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever window the start was trained to be scored with, and where it is a file of weights."""
    asked: list[int | None] = []

    def watched(*given: Any, window: int | None = None, **rest: Any) -> Any:
        asked.append(window)
        return score(*given, window=window, **rest)

    monkeypatch.setattr("overfly.adaptation.pipeline.score", watched)
    before = train(load(tiny["start"]), out=tmp_path / "start", device="cpu", quiet=True).run
    file = before.segmenter().save(tmp_path / "start.safetensors")
    for number, start in enumerate((before.path, file)):
        recipe = load({**tiny, "start": str(start), "method": "dacs", "steps": 1, "window": 32})
        _, selection = adapted(recipe, tmp_path / str(number))
        assert asked == [32] * (number + 1)  # the adapted and the recalibrated are scored so by their own recipes
        assert selection["candidates"]["source only"]["metrics"]["source_miou"] is not None


def test_again_trains_nothing_and_says_the_same(tiny: dict[str, Any], tmp_path: Path) -> None:
    recipe = load({**tiny, "method": "dacs"})
    run, first = adapted(recipe, tmp_path)
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("last.ckpt")}
    again, second = adapted(recipe, tmp_path)
    assert again.path == run.path
    assert first == second
    assert before == {file: file.stat().st_mtime_ns for file in tmp_path.rglob("last.ckpt")}


@pytest.mark.parametrize("seed", [0, 1])
def test_shuffled_pseudo_labels_are_refused(tiny: dict[str, Any], tmp_path: Path, seed: int) -> None:
    start = {**tiny["start"], "steps": 60}
    recipe = load({**tiny, "start": start, "method": {"name": "shuffled", "ema": 0.5}, "steps": 30}, f"seed={seed}")
    _, selection = adapted(recipe, tmp_path)
    assert selection["recommended"] != "adapted"
    assert selection["candidates"]["adapted"]["rejections"]


def test_a_run_is_adapted_without_its_source(tiny: dict[str, Any], tmp_path: Path) -> None:
    run, _ = adapted(load({**tiny, "method": "dacs"}), tmp_path / "first")
    recipe = load(
        {"start": str(run.path), "target": tiny["target"], "method": "source_free", "crop": 64, "batch": 4, "steps": 3}
    )
    free, selection = adapted(recipe, tmp_path / "second")
    assert selection["candidates"]["source only"]["run"] == str(run.path)
    assert selection["candidates"]["adapted"]["metrics"]["source_miou"] is None
    assert (free.path / "best.safetensors").exists()


def test_split_entries_are_told_apart(tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = load(tiny)
    Path("a.yaml").write_text("")
    Path("run=1").mkdir()
    long = "method.strong_augment=[" + "x, " * 400 + "]"
    recipes, settings = split_entries(["seed=1", Path("a.yaml"), recipe, "a.yaml", "run=1", long])
    assert recipes == [Path("a.yaml"), recipe, "a.yaml", "run=1"]
    assert settings == ["seed=1", long]
    for entry, words in (
        ("b.yaml", "b.yaml is not there"),
        ("seed", "'seed' is no file and changes no"),
        ("", "'' is no"),
    ):
        with pytest.raises(RecipeError, match=words):
            split_entries(["a.yaml", entry])


def test_a_source_of_which_nothing_was_held_out_is_adapted(tiny: dict[str, Any], tmp_path: Path) -> None:
    """A folder without splits, as is the default: before, the selection failed after all the training."""
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    for index in range(4):
        image, label = synthesize("urban", "train", index, 64)
        Image.fromarray(image).save(tmp_path / "images" / f"{index}.png")
        Image.fromarray(label).save(tmp_path / "masks" / f"{index}.png")
    source = {"name": "folder", "root": str(tmp_path), "masks": "masks", "classes": list(CLASSES.names)}
    recipe = {**tiny, "source": source, "start": {**tiny["start"], "source": source}, "method": "dacs"}
    run, selection = adapted(load(recipe), tmp_path / "runs")
    assert selection["familiarity"] is None
    assert selection["candidates"]["adapted"]["metrics"]["source_miou"] is None
    assert "Without held-out pictures of the source" in (run.path / "selection.md").read_text()
    few = {"train": 0.999, "val": 0.001}
    with pytest.raises(DataError, match=r"the split val .* takes none"):
        adapted(load(recipe, f"source.splits={few}"), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_what_the_recipe_lacks_is_found_before_its_start_is_trained(tiny: dict[str, Any], tmp_path: Path) -> None:
    recipe = load({**tiny, "method": {"name": "distill", "teacher": str(tmp_path / "nowhere.safetensors")}})
    with pytest.raises(OverflyError, match=r"^method.teacher: .* does not exist"):
        adapt(recipe, out=tmp_path / "runs", device="cpu", quiet=True)
    assert not (tmp_path / "runs").exists()


def test_labels_of_target_pictures_that_the_source_has_too_are_counted(tiny: dict[str, Any], tmp_path: Path) -> None:
    recipe = load({**tiny, "target": {**tiny["source"], "train": 3}, "method": "dacs", "steps": 1})
    run, selection = adapted(recipe, tmp_path)
    assert selection["labels_opened"] == 3
    free = {
        "start": str(run.path),
        "target": tiny["source"],
        "method": "source_free",
        "crop": 64,
        "batch": 4,
        "steps": 1,
    }
    assert adapted(load(free), tmp_path / "free")[1]["labels_opened"] == 4


def test_a_refused_run_is_told_of_as_the_network_that_it_ships(tiny: dict[str, Any], tmp_path: Path) -> None:
    recipe = load({**tiny, "method": "dacs", "steps": 1})
    config = TrainerConfig("cpu", quiet=True)
    run, selection = judge(
        recipe, out=tmp_path, fabric=launch_fabric(recipe, config), config=config, gate=Gate(margin=1.0)
    )
    assert selection.recommended == "source only"
    before = Run.open(selection.candidates["source only"].run)
    story = card_content(run)
    assert (story.title, story.method.split(":")[0]) == (before.path.name, "`source_only`")
    assert story.scores["source/val"][0]["mIoU"] == before.scores["source/val"]["miou"]
    assert "use the source-only network" in story.verdict
    (network,) = served_networks([str(run.path)])
    assert network.title == "source only, Urban to Rural, seed 0"
    assert (network.about["method"], network.about["folder"]) == ("source_only", run.path.name)
    assert selection.summary == "use the source-only network: recalibrated and adapted are refused"
    assert resolve_start(run.path) == before.path  # what overfly adapt --from takes
    assert resolve_start(before.path) == before.path
    shutil.rmtree(before.path)
    assert resolve_start(run.path) == run.path / "best.safetensors"
    assert "is not there any more" in card_content(run).method
    assert served_networks([str(run.path)])[0].title == run.path.name
    (run.path / "best.safetensors").unlink()
    assert card_content(run).method.startswith("`dacs`")
