"""Conventions of the code base."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest

import overfly
from conftest import REPOSITORY
from overfly import cli
from overfly.commands import MODULES

SOURCES = sorted((REPOSITORY / "src").rglob("*.py"))
TESTS = sorted((REPOSITORY / "tests").rglob("*.py"))
FILE_LINES = 400
FUNCTION_LINES = 60
SOURCE_FILES = 150
SOURCE_LINES = 26_500


@pytest.mark.parametrize("path", [*SOURCES, *TESTS], ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_files_and_functions_stay_small(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and node.end_lineno:
            length = node.end_lineno - node.lineno + 1
            assert length <= FUNCTION_LINES, f"{node.name} has {length} lines"


def test_the_source_stays_small() -> None:
    assert len(SOURCES) <= SOURCE_FILES
    assert sum(path.read_text().count("\n") for path in SOURCES) <= SOURCE_LINES


def test_tests_mirror_the_source() -> None:
    folders = {path.parent.relative_to(REPOSITORY / "src" / "overfly") for path in SOURCES}
    for folder in folders:
        if len(list((REPOSITORY / "src" / "overfly" / folder).glob("*.py"))) > 1:
            assert list((REPOSITORY / "tests" / folder).glob("test_*.py")), f"no tests for {folder}"


def test_the_commands_are_the_public_functions() -> None:
    app = cli.application(["train"])
    found = set()
    for name in app:
        if not name.startswith("-"):
            inner = [f"{name}_{word}" for word in app[name] if not word.startswith("-")]
            found |= set(inner or [name])
    assert found == {"_".join(cli.words(name)) for name in MODULES}
    assert set(MODULES) <= set(overfly.__all__)


def test_public_names_exist_and_are_documented() -> None:
    assert sorted(overfly.__all__) == overfly.__all__
    assert set(MODULES) <= set(overfly.__all__) <= set(dir(overfly))
    assert not hasattr(overfly, "no_such_name")
    for name in overfly.__all__:
        value = getattr(overfly, name)
        assert callable(value), f"{name} is a module of the same name"
        assert value.__doc__, name
        if name in MODULES and name != "list_kinds":
            assert "Args:" in value.__doc__, name


@pytest.mark.parametrize("name", sorted(MODULES))
def test_commands_take_paths_as_strings_too(name: str) -> None:
    for parameter in inspect.signature(getattr(overfly, name)).parameters.values():
        assert not re.search(r"\bPath\b", str(parameter.annotation)), f"{name}: annotate {parameter.name} as PathLike"


def test_nothing_names_a_machine_or_unpickles() -> None:
    for path in SOURCES:
        text = path.read_text()
        assert not re.search(r"(?<![\w.])/(work|farm)/", text), path
        for call in re.findall(r"torch\.load\([^)]*\)", text):
            assert "weights_only=True" in call, (path, call)
        assert "pickle.load" not in text, path
