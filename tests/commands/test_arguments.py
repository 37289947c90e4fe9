from __future__ import annotations

import inspect
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from overfly.commands import api
from overfly.commands.arguments import is_setting, pathlike


@pathlike
def take(
    one: Path, *rest: str, several: list[Path] | None = None, out: Path | None = None, both: Path | str = ""
) -> list[object]:
    return [one, rest, several, out, both]


def test_text_becomes_a_path_where_a_path_is_asked_for_and_nowhere_else() -> None:
    assert take("a", "b", several=["c"], out="d", both="e") == [Path("a"), ("b",), [Path("c")], Path("d"), "e"]  # type: ignore[arg-type, list-item]
    assert take(Path("a")) == [Path("a"), (), None, None, ""]


def test_a_missing_argument_is_told_as_ever() -> None:
    with pytest.raises(TypeError, match=r"take.*missing"):
        take()  # type: ignore[call-arg]


@pytest.mark.parametrize("name", sorted(api.__all__))
def test_every_function_of_the_api_takes_its_paths_as_text(name: str) -> None:
    function = getattr(api, name)
    kinds = [get_args(hint) or (hint,) for hint in get_type_hints(function).values()]
    paths = any((Path in each and str not in each) or list[Path] in each for each in kinds)
    assert paths == hasattr(function, "__wrapped__")
    assert inspect.signature(function) == inspect.signature(inspect.unwrap(function))


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
        ("there=1.yaml", False),
    ],
)
def test_settings_are_told_from_recipes(
    entry: str, setting: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there=1.yaml").write_text("steps: 1\n")
    assert is_setting(entry) == setting


def test_a_notebooks_call(tmp_path: Path) -> None:
    api.data_synthesize(str(tmp_path / "world"), scenes=["urban"], size=64, train=1, val=1, test=1)  # type: ignore[arg-type]
    assert (tmp_path / "world").is_dir()
