from __future__ import annotations

from inspect import signature
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from conftest import REPOSITORY
from overfly import benchmark, train
from overfly.core.errors import RecipeError
from overfly.core.optimizers import Adam
from overfly.core.settings import OPTIONS, parse_yaml
from overfly.data.loveda import CLASSES
from overfly.methods.adversarial import AdaptSegNet
from overfly.ops.criterion import CrossEntropy
from overfly.recipe import Recipe, load
from overfly.training.setup import initial_network

RECIPES = sorted((REPOSITORY / "recipes").rglob("*.yaml"))


def test_recipe_round_trips_through_yaml(recipe: Recipe, tmp_path: Path) -> None:
    recipe.save(tmp_path / "a.yaml")
    assert load(tmp_path / "a.yaml") == recipe
    assert load(recipe) == recipe
    assert load(recipe.model_dump(mode="json")) == recipe


def test_settings_of_a_kind_are_saved(small: dict[str, Any], tmp_path: Path) -> None:
    recipe = load(
        small, "method.criterion={name: ohem, threshold: 0.5}", "augment=[{name: scale_jitter, low: 0.7}]",
        "optim={name: adamw, betas: [0.5, 0.6]}",
    )  # fmt: skip
    recipe.save(tmp_path / "a.yaml")
    again = load(tmp_path / "a.yaml")
    assert again == recipe
    assert again.method.criterion.model_dump()["threshold"] == 0.5
    assert again.augment[0].model_dump()["low"] == 0.7
    assert again.model_dump()["source"]["scene"] == "urban"


def test_override_inside_a_default_keeps_the_other_settings(small: dict[str, Any]) -> None:
    method = load(small, "method=adaptsegnet", "method.critic.lr=3e-4", "method.criterion.aux=0.1").method
    assert method == AdaptSegNet(critic=Adam(lr=3e-4, betas=(0.9, 0.99)), criterion=CrossEntropy(aux=0.1))


def test_method_given_as_a_value_keeps_its_settings(recipe: Recipe) -> None:
    method = AdaptSegNet(levels="multi", weight=0.5)
    result = Recipe(source=recipe.source, target=recipe.target, method=method)
    assert result.method == method
    assert load(result.model_dump(mode="json")) == result


def test_overrides_reach_every_depth(small: dict[str, Any]) -> None:
    recipe = load(small, "optim.lr=1e-3", "source.size=32", "augment=[dihedral]", "augment.0.p=0.5", "steps=7")
    assert recipe.optim.lr == 1e-3
    assert recipe.source is not None
    assert recipe.source.model_dump()["size"] == 32
    assert recipe.augment[0].p == 0.5
    assert recipe.steps == 7
    assert (
        load(small, "method.criterion=ohem", "method.criterion.min_kept=5").method.criterion.model_dump()["min_kept"]
        == 5
    )
    assert load(small, "model.mean=[1,2,3]", "model.std=[1,1,1]").model.mean == (1, 2, 3)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stepps=3", "stepps: .*steps"),
        ("optim.momentun=0.5", r"optim\.momentun: .*momentum"),
        ("source.sise=32", r"source\.sise: .*size"),
        ("augment=[{name: gamma, lov: 1}]", r"augment\.0\.lov: .*low"),
        ("device=cpu", "device: .*--device"),
        ("optim.lr=-1", r"optim\.lr.*0.*-1"),
        ("optim.lr=fast", r"optim\.lr.*fast"),
        ("batch=0", "batch must be at least 1, got 0"),
        ("source={name: folder, root: x, classes: [no, yes]}", r"source\.classes.*False"),
        ("model=unet", "unet.*pidnet_s"),
        ("method=dance", "dance"),
        ("source=null", "source"),
        ("epochs=2", "steps.*epochs"),
        ("nonsense", "nonsense"),
        ("steps.x=3", r"steps\.x"),
    ],
)
def test_invalid_settings_are_named(small: dict[str, Any], override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        load(small, override)
    assert not any(word in str(caught.value) for word in ("\n", "Input", "valid", "(given"))


def test_start_recipe_is_nested_and_has_the_same_seed(small: dict[str, Any], tmp_path: Path) -> None:
    load(small, "model=pidnet_m").save(tmp_path / "first.yaml")
    (tmp_path / "second.yaml").write_text(
        "start: first.yaml\ntarget: {name: synthetic, scene: rural}\nmethod: recalibrate\nsteps: 2\n"
    )
    recipe = load(tmp_path / "second.yaml", "seed=5", "target.size=128")
    assert isinstance(recipe.start, Recipe)
    assert recipe.seed == recipe.start.seed == 5
    assert recipe.model.name == "pidnet_m"
    assert recipe.start.target is not None
    assert recipe.start.target.model_dump()["size"] == 128
    recipe.save(tmp_path / "third.yaml")
    assert load(tmp_path / "third.yaml") == recipe


def test_invalid_recipe_files(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no\.yaml"):
        load(tmp_path / "no.yaml")
    for text in ("a: [", "just words", "\x00"):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(RecipeError, match=r"bad\.yaml"):
            load(tmp_path / "bad.yaml")


def test_numbers_in_scientific_notation() -> None:
    assert parse_yaml("1e-3") == 0.001
    assert parse_yaml("{a: 5E2}") == {"a": 500.0}
    assert parse_yaml("1e") == "1e"


def test_length_in_epochs(small: dict[str, Any]) -> None:
    del small["steps"]
    assert load(small, "epochs=20", "batch=6").length(2522) == round(20 * 2522 / 6)
    assert load(small).length(5) == 20_000


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_recipe_file_loads(path: Path) -> None:
    assert load(path).seed == 0


def test_model_override_applies_to_the_start_too(small: dict[str, Any]) -> None:
    values = {**small, "method": "recalibrate", "start": {key: small[key] for key in small if key != "model"}}
    recipe = load(values, "model=lraspp_mobilenet_v2")
    assert isinstance(recipe.start, Recipe)
    assert recipe.start.model.name == recipe.model.name == "lraspp_mobilenet_v2"
    assert load(values, "model.name=pidnet_m").model.name == "pidnet_m"
    with pytest.raises(RecipeError, match=r"start.*pidnet_s.*pidnet_m"):
        load({**values, "model": "pidnet_m", "start": {**values["start"], "model": "pidnet_s"}})


def test_domains_must_have_the_same_max_value(small: dict[str, Any], tmp_path: Path) -> None:
    target = {"name": "folder", "root": str(tmp_path), "classes": list(CLASSES.names), "max_value": 65535}
    with pytest.raises(RecipeError, match=r"255.*65535.*max_value"):
        load({**small, "target": target, "method": "dacs"})


def test_random_crop_must_match_the_crop_of_mixing_methods(small: dict[str, Any]) -> None:
    cropped = ("augment=[{name: random_crop, size: 32}]",)
    assert load(small, *cropped, "method=source_only")
    assert load(small, *cropped, "method=dacs", "crop=32")
    with pytest.raises(RecipeError, match=r"random_crop.* 32 .*crop: 64"):
        load(small, *cropped, "method=dacs")


def test_start_must_have_the_max_value_of_the_domain(small: dict[str, Any], tmp_path: Path) -> None:
    trained = initial_network(load(small))[0]
    trained.max_value = 1.0
    start = trained.save(tmp_path / "unit.safetensors")
    with pytest.raises(RecipeError, match=r"unit\.safetensors.* 1,.*255"):
        initial_network(load(small), start)[0]


@pytest.mark.parametrize("name", ["cbst", "iast", "multiscale_self_training"])
def test_self_training_needs_a_trained_network(name: str, small: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=f"{name}.*start"):
        load({**small, "method": name})
    trained = initial_network(load(small))[0].network
    state = {key: value for key, value in trained.state_dict().items() if not key.startswith(trained.class_layer)}
    save_file(state, tmp_path / "encoder.safetensors")
    model = {"name": "small_network", "weights": str(tmp_path / "encoder.safetensors")}
    with pytest.raises(RecipeError, match=r"encoder\.safetensors"):
        initial_network(load({**small, "method": name, "model": model}))[0]
    start = {**small, "model": model}
    assert initial_network(load({**start, "method": name, "start": start}))[0]


def test_options_are_parameters_of_the_commands() -> None:
    known = {name.replace("_", "-") for command in (train, benchmark) for name in signature(command).parameters}
    assert known >= set(OPTIONS)
    assert not set(OPTIONS) & set(Recipe.model_fields)
