from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from overfly import adapt
from overfly.adaptation import auto_recipe
from overfly.adaptation.auto_recipe import folder_recipes
from overfly.adaptation.inputs import ImageInputs
from overfly.core.errors import OverflyError, RecipeError
from overfly.core.optimizers import AdamW, Poly
from overfly.core.settings import parse_budget
from overfly.data.folder import Folder, read_classes
from overfly.data.synthetic import synthesize
from overfly.recipe import Recipe
from overfly.training.engine import TrainerConfig
from overfly.training.run import Run
from overfly.training.setup import initial_network

NAMES = ["background", "building", "road", "water", "barren", "forest", "agriculture"]


@pytest.fixture
def own(tmp_path: Path) -> ImageInputs:
    """A source folder with masks of class ids, and a target folder without; images of 96 pixels a side."""
    for name, scene, count in (("A", "urban", 8), ("B", "rural", 4)):
        (tmp_path / name / "images").mkdir(parents=True)
        (tmp_path / name / "masks").mkdir()
        for index in range(count):
            image, label = synthesize(scene, "train", index, 96)  # type: ignore[arg-type]
            Image.fromarray(image).save(tmp_path / name / "images" / f"{index}.png")
            if name == "A":
                Image.fromarray(np.where(label == 255, 0, label)).save(tmp_path / name / "masks" / f"{index}.png")
    (tmp_path / "classes.yaml").write_text(yaml.safe_dump(NAMES))
    folders = tmp_path / "A" / "images", tmp_path / "A" / "masks", tmp_path / "B" / "images"
    return ImageInputs(*folders, tmp_path / "classes.yaml")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("90s", 90),
        ("10m", 600),
        ("2h", 7200),
        ("5", 300),
        ("1.5h", 5400),
        ("5min", 300),
        ("5 minutes", 300),
        ("20 sec", 20),
        ("2 hours", 7200),
    ],
)
def test_budget_is_parsed(text: str, found: float) -> None:
    assert parse_budget(text) == found


@pytest.mark.parametrize("text", ["", "soon", "0m", "-5m", "10d"])
def test_an_invalid_budget_raises(text: str) -> None:
    with pytest.raises(RecipeError, match="--budget"):
        parse_budget(text)


def test_steps_fit_the_budget(own: ImageInputs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto_recipe, "time_step", lambda recipe, _: 1.0 if recipe.method.needs_target else 0.5)
    recipe, aligned = folder_recipes(own, "12m", TrainerConfig("cpu", quiet=True))
    assert isinstance(recipe.start, Recipe)
    assert aligned.start == recipe.start
    assert (recipe.steps, aligned.steps, recipe.start.steps) == (158, 158, 460)
    assert recipe.schedule == Poly(power=1.0, warmup=15)
    assert recipe.optim == aligned.optim == AdamW(lr=1.5e-4, head=10.0)
    differences = [each.method.model_dump() for each in (recipe, aligned)]
    assert [(way["reference"], way["ramp_steps"]) for way in differences] == [("equal", 52), ("source", 52)]
    three = folder_recipes(own, "16m", TrainerConfig("cpu", quiet=True))
    assert [(each.steps, each.method.model_dump()["mix_share"]) for each in three] == [(163, 0.5), (163, 0.5), (163, 0)]
    assert differences[0]["ema"] == pytest.approx(1 - 6 / 158)
    assert recipe.crop == 96
    assert recipe.target is not None
    assert not any(item.label for item in recipe.target.items("train"))
    assert isinstance(recipe.source, Folder)
    assert recipe.source.classes.names == tuple(NAMES)
    assert recipe.source.mean is not None
    assert len(recipe.source.items("train")) + len(recipe.source.items("val")) == 8
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe


@pytest.mark.parametrize("upright", [False, True])
def test_images_with_a_fixed_top_are_not_turned(
    own: ImageInputs, monkeypatch: pytest.MonkeyPatch, upright: bool
) -> None:
    """Sky above and ground below in every mask, or both anywhere."""
    monkeypatch.setattr(auto_recipe, "time_step", lambda *_: 0.5)
    assert own.source_masks is not None
    for number, file in enumerate(sorted(own.source_masks.iterdir())):
        mask = np.zeros((96, 96), np.uint8)
        mask[48 if upright or number % 2 else 0 :][:48] = 1
        Image.fromarray(mask).save(file)
    for recipe in folder_recipes(own, "12m", TrainerConfig("cpu", quiet=True)):
        assert isinstance(recipe.start, Recipe)
        for each in (recipe, recipe.start):
            assert each.augment[0].name == ("horizontal_flip" if upright else "dihedral")
        assert recipe.method.model_dump()["turns"] != upright


def test_given_settings_hold_for_all_recipes(own: ImageInputs, monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[str] = []

    def time_step(recipe: Recipe, _: object) -> float:
        timed.append(recipe.model.name)
        return 0.1

    monkeypatch.setattr(auto_recipe, "time_step", time_step)
    changes = ["model=lraspp_mobilenet_v2", "steps=60", "start.steps=40"]
    one, two, three = folder_recipes(own, "10m", TrainerConfig("cpu", quiet=True), changes)
    assert isinstance(one.start, Recipe)
    assert (one.model.name, one.start.model.name) == ("lraspp_mobilenet_v2",) * 2
    assert three.steps == 60
    assert (one.steps, two.steps, one.start.steps, one.schedule.warmup) == (60, 60, 40, 6)
    assert one.method.model_dump()["ramp_steps"] == 20
    assert not timed
    (dacs,) = folder_recipes(own, "10m", TrainerConfig("cpu", quiet=True), ["method=dacs", "model=lraspp_mobilenet_v2"])
    assert dacs.method.name == "dacs"
    assert dacs.steps == int(0.34 * 600 / 0.1)
    assert set(timed) == {"lraspp_mobilenet_v2"}


def test_the_same_proposal_again_has_the_same_steps(
    own: ImageInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, out = TrainerConfig("cpu", quiet=True), tmp_path / "runs"
    monkeypatch.setattr(auto_recipe, "time_step", lambda *_: 0.2)
    first = folder_recipes(own, "10m", config, out=out)
    monkeypatch.setattr(auto_recipe, "time_step", lambda *_: 0.4)
    assert folder_recipes(own, "10m", config, out=out) == first
    assert folder_recipes(own, "30m", config, out=out)[0].steps == 765
    (note,) = [file for file in out.iterdir() if json.loads(file.read_text())["adapted"] == first[0].steps][:1]
    note.write_text("{")
    assert folder_recipes(own, "10m", config, out=out)[0].steps == 255


def test_a_short_budget_trains_one_variant(own: ImageInputs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto_recipe, "time_step", lambda recipe, _: 1.0 if recipe.method.needs_target else 0.5)
    (recipe,) = folder_recipes(own, "8m", TrainerConfig("cpu", quiet=True))
    assert isinstance(recipe.start, Recipe)
    assert (recipe.steps, recipe.start.steps) == (163, 403)


def test_a_budget_that_is_too_short_is_rejected_with_advice(own: ImageInputs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto_recipe, "time_step", lambda *_: 2.0)
    with pytest.raises(RecipeError, match=r"12 .*10 .*100.*--budget 10m"):
        folder_recipes(own, "1m", TrainerConfig("cpu", quiet=True), out=own.classes and own.classes.parent / "runs")
    assert own.classes is not None
    assert not (own.classes.parent / "runs").exists()


def test_a_budget_of_212_and_57_steps_is_rejected_with_a_crop_that_fits(
    own: ImageInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auto_recipe, "time_step", lambda recipe, _: 5.0 if recipe.method.needs_target else 1.657)
    monkeypatch.setattr(auto_recipe, "choose_crop", lambda *_: 512)
    with pytest.raises(RecipeError, match=r"212 .*57 .*100.*--budget 25m.*crop=384"):
        folder_recipes(own, "14m", TrainerConfig("cpu", quiet=True))


def test_a_short_budget_takes_a_smaller_crop(own: ImageInputs, monkeypatch: pytest.MonkeyPatch) -> None:
    def time_step(recipe: Recipe, _: object) -> float:
        return (5.0 if recipe.method.needs_target else 1.5) * (recipe.crop / 512) ** 2

    monkeypatch.setattr(auto_recipe, "time_step", time_step)
    monkeypatch.setattr(auto_recipe, "choose_crop", lambda *_: 512)
    (recipe,) = folder_recipes(own, "14m", TrainerConfig("cpu", quiet=True))
    assert isinstance(recipe.start, Recipe)
    assert (recipe.crop, recipe.window, recipe.start.crop, recipe.steps) == (384, 384, 384, 101)
    with pytest.raises(RecipeError, match=r"57 .*crop=384"):
        folder_recipes(own, "14m", TrainerConfig("cpu", quiet=True), ["crop=512"])


def test_colors_of_classes_are_read_as_colors(own: ImageInputs) -> None:
    assert own.classes is not None
    own.classes.write_text(yaml.safe_dump({"roof": [255, 0, 0], "rest": [0, 0, 0]}))
    assert read_classes(own.classes) == {"classes": {"roof": [255, 0, 0], "rest": [0, 0, 0]}}
    own.classes.write_text(yaml.safe_dump({"classes": ["a", "b"], "ignore": [7]}))
    assert read_classes(own.classes) == {"classes": ["a", "b"], "ignore": [7]}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"target_images": None}, "--target-images"),
        ({"source_masks": None}, "^--source-masks"),
        ({"source_images": Path("nowhere")}, "images: nowhere"),
        ({"source_masks": Path("nowhere")}, "masks: nowhere"),
        ({"classes": Path("none.yaml")}, "none.yaml"),
        ({"checkpoint": Path("runs/x")}, "--checkpoint"),
    ],
)
def test_a_missing_option_is_named(own: ImageInputs, change: dict[str, Path | None], words: str) -> None:
    with pytest.raises(OverflyError, match=words):
        folder_recipes(ImageInputs(**{**own.__dict__, **change}), "10m", TrainerConfig("cpu", quiet=True))


def test_a_budget_with_a_recipe_raises(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="--budget 10m"):
        adapt("recipes/synthetic/urban-rural-plain.yaml", budget="10m", out=tmp_path, device="cpu", quiet=True)
    assert not list(tmp_path.iterdir())


def test_adapt_two_folders_then_one_folder_from_the_comparison(
    own: ImageInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("overfly.adaptation.pipeline.RECALIBRATION", {"batch": 2, "steps": 2})
    monkeypatch.setattr(auto_recipe, "MIN_STEPS", 2)
    monkeypatch.setattr(auto_recipe, "time_step", lambda *_: 10.0)
    out = tmp_path / "runs"
    small = ("model=small_network", "crop=64", "window=64", "batch=2")
    found = adapt(
        *small, "start.model=small_network",
        source_images=own.source_images, source_masks=own.source_masks, target_images=own.target_images,
        classes=own.classes, budget="60s", out=out, estimate=False, device="cpu", quiet=True,
    )  # fmt: skip
    assert found.recommended.exists()
    assert found.selection.recipes[0]["method"]["name"] == "multiscale_self_training"
    assert found.selection.labels_opened == 0
    free = adapt(
        *small[1:],
        "steps=2",
        checkpoint=found.path,
        target_images=own.target_images,
        budget="60s",
        estimate=False,
        out=tmp_path / "b",
        device="cpu",
        quiet=True,
    )
    recipe = Run.open(free.selection.candidates["adapted"].run).recipe
    assert recipe.source is None
    assert recipe.steps == 2
    assert recipe.schedule.warmup > 0


@pytest.mark.parametrize(
    ("beside", "words"),
    [
        ({"title": "X"}, "title"),
        ({"images": "x", "splits": {"train": "a.txt"}}, "images, splits"),
        ({"name": "synthetic"}, "synthetic"),
        ({1: 5}, "classes.yaml.*1: "),
    ],
)
def test_invalid_settings_beside_classes_raise(own: ImageInputs, beside: dict[object, object], words: str) -> None:
    assert own.classes is not None
    own.classes.write_text(yaml.safe_dump({"classes": NAMES, **beside}))
    with pytest.raises(RecipeError, match=words):
        folder_recipes(own, "10m", TrainerConfig("cpu", quiet=True), ["steps=2", "start.steps=2"])


@pytest.mark.parametrize(
    "values", [{"building": 1}, {"classes": {"building": "red"}}, 5, [], {}, [{"name": "roof"}], [True]]
)
def test_classes_of_another_shape_raise(own: ImageInputs, values: object) -> None:
    assert own.classes is not None
    own.classes.write_text(yaml.safe_dump(values))
    with pytest.raises(RecipeError, match=r"--classes: .*classes\.yaml .*building: \[255") as raised:
        folder_recipes(own, "10m", TrainerConfig("cpu", quiet=True))
    assert "images" not in str(raised.value)


def test_an_invalid_classes_file_is_named(own: ImageInputs) -> None:
    assert own.classes is not None
    own.classes.write_text(yaml.safe_dump({"name": "folder", "classes": ["a"]}))
    assert read_classes(own.classes) == {"classes": ["a"]}
    for text, words in (
        ("[" * 3000, "classes.yaml"),
        ("a: 1\na: 2", "a "),
        ("a: [", "classes.yaml"),
    ):
        own.classes.write_text(text)
        with pytest.raises(RecipeError, match=words):
            read_classes(own.classes)
    with pytest.raises(RecipeError, match="classes"):
        read_classes(own.classes.parent)


@pytest.mark.parametrize("count", [2, 3])
def test_one_of_few_images_is_held_out(own: ImageInputs, count: int) -> None:
    assert own.source_images is not None
    assert own.source_masks is not None
    for folder in (own.source_images, own.source_masks):
        for number in range(count, 8):
            (Path(folder) / f"{number}.png").unlink()
    recipe, *_ = folder_recipes(own, "10m", TrainerConfig("cpu", quiet=True), ["steps=2", "start.steps=2"])
    assert recipe.source is not None
    train, held = (recipe.source.items(split) for split in ("train", "val"))
    assert train
    assert held
    assert len(train) + len(held) == count
    for folder in (own.source_images, own.source_masks):
        for number in range(1, count):
            (Path(folder) / f"{number}.png").unlink()
    with pytest.raises(RecipeError, match=r"images .*1 "):
        folder_recipes(own, "10m", TrainerConfig("cpu", quiet=True))


def test_epochs_may_be_given_instead_of_steps(own: ImageInputs, tmp_path: Path) -> None:
    changes = ["epochs=6", "start.epochs=2", "batch=2"]
    recipe, *_ = folder_recipes(own, "10m", TrainerConfig("cpu", quiet=True), changes, tmp_path / "runs")
    assert isinstance(recipe.start, Recipe)
    assert recipe.source is not None
    assert (recipe.epochs, recipe.steps, recipe.start.epochs, recipe.start.steps) == (6, None, 2, None)
    assert recipe.schedule.warmup == max(1, recipe.length(len(recipe.source.items("train"))) // 10)
    assert not (tmp_path / "runs").exists()


def test_a_weights_file_gives_its_model(own: ImageInputs, tmp_path: Path) -> None:
    recipe = Recipe.model_validate({"source": {"name": "synthetic"}, "model": "lraspp_mobilenet_v2"})
    file = initial_network(recipe)[0].save(tmp_path / "network.safetensors")
    (found,) = folder_recipes(
        ImageInputs(target_images=own.target_images, checkpoint=file),
        "10m",
        TrainerConfig("cpu", quiet=True),
        ["steps=2"],
    )
    assert found.model.name == "lraspp_mobilenet_v2"
    assert found.optim == AdamW(lr=5e-4)
