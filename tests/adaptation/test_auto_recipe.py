from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from overfly import adapt
from overfly.adaptation import auto_recipe as proposal
from overfly.adaptation.auto_recipe import Own, of_folders, seconds
from overfly.core.errors import OverflyError, RecipeError
from overfly.core.optimizers import AdamW, Poly
from overfly.data.folder import Folder
from overfly.data.synthetic.domain import synthesize
from overfly.recipe import Recipe
from overfly.training.engine import TrainerConfig
from overfly.training.run import Run
from overfly.training.setup import initial_segmenter

NAMES = ["background", "building", "road", "water", "barren", "forest", "agriculture"]


@pytest.fixture
def own(tmp_path: Path) -> Own:
    """A with masks of class numbers, B without, 96 pixels a side."""
    for place, scene, count in (("A", "urban", 8), ("B", "rural", 4)):
        (tmp_path / place / "images").mkdir(parents=True)
        (tmp_path / place / "masks").mkdir()
        for index in range(count):
            image, label = synthesize(scene, "train", index, 96)  # type: ignore[arg-type]
            Image.fromarray(image).save(tmp_path / place / "images" / f"{index}.png")
            if place == "A":
                Image.fromarray(np.where(label == 255, 0, label)).save(tmp_path / place / "masks" / f"{index}.png")
    (tmp_path / "classes.yaml").write_text(yaml.safe_dump(NAMES))
    folders = tmp_path / "A" / "images", tmp_path / "A" / "masks", tmp_path / "B" / "images"
    return Own(*folders, tmp_path / "classes.yaml")


@pytest.mark.parametrize(("text", "found"), [("90s", 90), ("10m", 600), ("2h", 7200), ("5", 300), ("1.5h", 5400)])
def test_a_time_is_understood(text: str, found: float) -> None:
    assert seconds(text) == found


@pytest.mark.parametrize("text", ["", "soon", "0m", "-5m", "10d"])
def test_what_is_no_time_is_said(text: str) -> None:
    with pytest.raises(RecipeError, match="is no time"):
        seconds(text)


def test_steps_follow_the_time_and_the_machine(own: Own, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proposal, "step_seconds", lambda recipe, _: 1.0 if recipe.method.needs_target else 0.5)
    recipe, plain = of_folders(own, "10m", TrainerConfig("cpu", quiet=True))
    assert isinstance(recipe.start, Recipe)
    assert plain.start == recipe.start
    assert (recipe.steps, plain.steps, recipe.start.steps) == (174, 174, 300)
    assert recipe.schedule == Poly(power=1.0, warmup=17)
    assert recipe.optim == plain.optim == AdamW(lr=1e-3)
    differences = [each.method.model_dump() for each in (recipe, plain)]
    assert [(way["mix_share"], way["ramp_steps"]) for way in differences] == [(0.5, 58), (0.0, 58)]
    assert recipe.crop == 96
    assert recipe.target is not None
    assert not any(item.label for item in recipe.target.items("train"))
    assert isinstance(recipe.source, Folder)
    assert recipe.source.classes.names == tuple(NAMES)
    assert recipe.source.mean is not None
    assert len(recipe.source.items("train")) + len(recipe.source.items("val")) == 8
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe


def test_settings_that_are_given_hold_for_all_and_are_not_proposed(own: Own, monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[str] = []

    def step_seconds(recipe: Recipe, _: object) -> float:
        timed.append(recipe.model.name)
        return 0.1

    monkeypatch.setattr(proposal, "step_seconds", step_seconds)
    changes = ["model=lraspp_mobilenet_v2", "steps=60", "start.steps=40"]
    one, two = of_folders(own, "10m", TrainerConfig("cpu", quiet=True), changes)
    assert isinstance(one.start, Recipe)
    assert (one.model.name, one.start.model.name) == ("lraspp_mobilenet_v2",) * 2
    assert (one.steps, two.steps, one.start.steps, one.schedule.warmup) == (60, 60, 40, 6)
    assert one.method.model_dump()["ramp_steps"] == 20
    assert not timed
    (dacs,) = of_folders(own, "10m", TrainerConfig("cpu", quiet=True), ["method=dacs", "model=lraspp_mobilenet_v2"])
    assert dacs.method.name == "dacs"
    assert dacs.steps == int(0.4 * 600 / 0.1)
    assert set(timed) == {"lraspp_mobilenet_v2"}


def test_the_same_proposal_again_has_the_same_steps(own: Own, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, out = TrainerConfig("cpu", quiet=True), tmp_path / "runs"
    monkeypatch.setattr(proposal, "step_seconds", lambda *_: 0.2)
    first = of_folders(own, "10m", config, out=out)
    monkeypatch.setattr(proposal, "step_seconds", lambda *_: 0.4)
    assert of_folders(own, "10m", config, out=out) == first
    assert of_folders(own, "30m", config, out=out)[0].steps == 1305
    (note,) = [file for file in out.iterdir() if json.loads(file.read_text())["adapted"] == first[0].steps][:1]
    note.write_text("{")
    assert of_folders(own, "10m", config, out=out)[0].steps == 435


def test_a_short_time_goes_to_one_adaptation(own: Own, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proposal, "step_seconds", lambda recipe, _: 1.0 if recipe.method.needs_target else 0.5)
    (recipe,) = of_folders(own, "8m", TrainerConfig("cpu", quiet=True))
    assert isinstance(recipe.start, Recipe)
    assert (recipe.steps, recipe.start.steps) == (192, 432)


def test_a_time_that_is_too_short_is_said_with_what_is_needed(own: Own, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proposal, "step_seconds", lambda *_: 2.0)
    with pytest.raises(RecipeError, match=r"too short .* give 5m or more"):
        of_folders(own, "1m", TrainerConfig("cpu", quiet=True))


def test_colors_of_classes_are_read_as_colors(own: Own) -> None:
    assert own.classes is not None
    own.classes.write_text(yaml.safe_dump({"roof": [255, 0, 0], "rest": [0, 0, 0]}))
    assert proposal.classes_of(own.classes) == {"classes": {"roof": [255, 0, 0], "rest": [0, 0, 0]}}
    own.classes.write_text(yaml.safe_dump({"classes": ["a", "b"], "ignore": [7]}))
    assert proposal.classes_of(own.classes) == {"classes": ["a", "b"], "ignore": [7]}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"images_b": None}, "adapt needs a recipe"),
        ({"images_a": Path("nowhere")}, "nowhere is no folder of images"),
        ({"masks_a": Path("nowhere")}, "nowhere is no folder of masks"),
        ({"classes": Path("none.yaml")}, "none.yaml is not there"),
        ({"start": Path("runs/x")}, "adapt needs a recipe"),
    ],
)
def test_what_is_missing_is_said_in_a_sentence(own: Own, change: dict[str, Path | None], words: str) -> None:
    with pytest.raises(OverflyError, match=words):
        of_folders(Own(**{**own.__dict__, **change}), "10m", TrainerConfig("cpu", quiet=True))


def test_a_time_is_not_silently_ignored_beside_a_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="--budget 10m is for folders of your own; a recipe says its length"):
        adapt("recipes/synthetic/urban-rural-plain.yaml", budget="10m", out=tmp_path, device="cpu", quiet=True)
    assert not list(tmp_path.iterdir())


def test_one_command_from_folders_to_a_verdict_and_again_without_the_source(
    own: Own, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proposal, "FEWEST", 2)
    monkeypatch.setattr(proposal, "step_seconds", lambda *_: 10.0)
    out = tmp_path / "runs"
    found = adapt(
        source_images=own.images_a, source_masks=own.masks_a, target_images=own.images_b, classes=own.classes,
        budget="50s", out=out, device="cpu", quiet=True,
    )  # fmt: skip
    assert found.best.exists()
    assert found.run.recipe.method.name == "multiscale_self_training"
    assert found.selection.labels_opened == 0
    free = adapt(
        "steps=2",
        checkpoint=found.path,
        target_images=own.images_b,
        budget="60s",
        out=tmp_path / "b",
        device="cpu",
        quiet=True,
    )
    assert Run.open(free.path).recipe.source is None
    assert Run.open(free.path).recipe.steps == 2
    assert Run.open(free.path).recipe.schedule.warmup > 0


@pytest.mark.parametrize(
    ("beside", "words"),
    [
        ({"title": "X"}, "says title, and it is read for both places"),
        ({"images": "x", "splits": {"train": "a.txt"}}, "says images, splits, and it is read for both"),
        ({"name": "synthetic"}, "speaks of the domain drawn"),
        ({1: 5}, "1: there is no such setting"),
    ],
)
def test_settings_beside_classes_that_cannot_be_are_said(own: Own, beside: dict[object, object], words: str) -> None:
    assert own.classes is not None
    own.classes.write_text(yaml.safe_dump({"classes": NAMES, **beside}))
    with pytest.raises(RecipeError, match=words):
        of_folders(own, "10m", TrainerConfig("cpu", quiet=True), ["steps=2", "start.steps=2"])


def test_a_file_of_classes_may_be_any_file(own: Own) -> None:
    assert own.classes is not None
    own.classes.write_text(yaml.safe_dump({"name": "folder", "classes": ["a"]}))
    assert proposal.classes_of(own.classes) == {"classes": ["a"]}
    for text, words in (
        ("[" * 3000, "nested too deeply"),
        ("a: 1\na: 2", "a stands twice"),
        ("a: [", "cannot be read"),
    ):
        own.classes.write_text(text)
        with pytest.raises(RecipeError, match=words):
            proposal.classes_of(own.classes)
    with pytest.raises(RecipeError, match="is no file"):
        proposal.classes_of(own.classes.parent)


@pytest.mark.parametrize("count", [2, 3])
def test_of_few_pictures_one_is_held_back_all_the_same(own: Own, count: int) -> None:
    assert own.images_a is not None
    assert own.masks_a is not None
    for folder in (own.images_a, own.masks_a):
        for number in range(count, 8):
            (folder / f"{number}.png").unlink()
    recipe, _ = of_folders(own, "10m", TrainerConfig("cpu", quiet=True), ["steps=2", "start.steps=2"])
    assert recipe.source is not None
    train, held = (recipe.source.items(split) for split in ("train", "val"))
    assert train
    assert held
    assert len(train) + len(held) == count
    for folder in (own.images_a, own.masks_a):
        for number in range(1, count):
            (folder / f"{number}.png").unlink()
    with pytest.raises(RecipeError, match="images holds one picture"):
        of_folders(own, "10m", TrainerConfig("cpu", quiet=True))


def test_epochs_may_be_given_instead_of_steps(own: Own, tmp_path: Path) -> None:
    changes = ["epochs=6", "start.epochs=2", "batch=2"]
    recipe, _ = of_folders(own, "10m", TrainerConfig("cpu", quiet=True), changes, tmp_path / "runs")
    assert isinstance(recipe.start, Recipe)
    assert recipe.source is not None
    assert (recipe.epochs, recipe.steps, recipe.start.epochs, recipe.start.steps) == (6, None, 2, None)
    assert recipe.schedule.warmup == max(1, recipe.length(len(recipe.source.items("train"))) // 10)
    assert not (tmp_path / "runs").exists()


def test_weights_say_their_own_network(own: Own, tmp_path: Path) -> None:
    recipe = Recipe.model_validate({"source": {"name": "synthetic"}, "model": "lraspp_mobilenet_v2"})
    file = initial_segmenter(recipe).save(tmp_path / "network.safetensors")
    (found,) = of_folders(Own(images_b=own.images_b, start=file), "10m", TrainerConfig("cpu", quiet=True), ["steps=2"])
    assert found.model.name == "lraspp_mobilenet_v2"
    assert found.optim == AdamW(lr=5e-4)
