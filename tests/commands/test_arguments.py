from __future__ import annotations

from pathlib import Path

import pytest

from overfly import data_synthesize
from overfly.commands.arguments import check_bounds, is_setting, parse_seeds, split_entries
from overfly.core.errors import RecipeError
from overfly.recipe import Recipe


@pytest.mark.parametrize(
    ("entry", "setting"),
    [
        ("steps=150", True),
        ("source.scene=rural", True),
        ("start=recipes/synthetic/rural-start.yaml", True),
        ("augment=[dihedral]", True),
        ("source.classes.bare soil=[1, 2, 3]", True),
        ("method.strong_augment=[" + "x, " * 400 + "]", True),
        ("clip=", True),
        ("=1", False),
        ("recipes/lr=3/a.yaml", False),
        ("lr=3/*.yaml", False),
        ("a.yaml", False),
        ("exists=1.yaml", False),
    ],
)
def test_settings_are_distinguished_from_recipes(
    entry: str, setting: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "exists=1.yaml").write_text("steps: 1\n")
    assert is_setting(entry) == setting


def test_entries_are_split_into_recipes_and_settings(recipe: Recipe, tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    recipe.save(file)
    assert split_entries([recipe, str(file), "seed=1"]) == ([recipe, str(file)], ["seed=1"])
    for missing in ("missing.yaml", "runs/missing", "missing"):
        with pytest.raises(RecipeError, match=missing):
            split_entries([missing])


@pytest.mark.parametrize(("text", "seeds"), [("3", [0, 1, 2]), ("0,5,0", [0, 5]), ("2,", [2])])
def test_seeds_are_a_count_or_a_list(text: str, seeds: list[int]) -> None:
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize("text", ["", "0", "-1", "many", "1,-1"])
def test_invalid_seeds_name_the_option(text: str) -> None:
    with pytest.raises(RecipeError, match="--seeds"):
        parse_seeds(text)


def test_bounds_name_the_option_and_the_value() -> None:
    check_bounds({"size": (8, 8, 16)})
    with pytest.raises(RecipeError, match=r"--size .*8 to 16.* 17"):
        check_bounds({"size": (17, 8, 16)})


def test_a_folder_may_be_a_string(tmp_path: Path) -> None:
    data_synthesize(str(tmp_path / "world"), scenes=["urban"], size=64, train=1, val=1, test=1)
    assert (tmp_path / "world").is_dir()
