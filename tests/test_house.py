"""The house rules that a machine can keep."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import overfly
from conftest import REPOSITORY
from overfly import cli
from overfly.commands import api

SOURCES = sorted((REPOSITORY / "src").rglob("*.py"))
TESTS = sorted((REPOSITORY / "tests").rglob("*.py"))
FILE_LINES = 400
FUNCTION_LINES = 60


@pytest.mark.parametrize("path", [*SOURCES, *TESTS], ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_files_and_functions_stay_small(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and node.end_lineno:
            length = node.end_lineno - node.lineno + 1
            doc = ast.get_docstring(node, clean=False)
            length -= doc.count("\n") + 1 if doc and path in SOURCES else 0
            assert length <= FUNCTION_LINES, f"{node.name} has {length} lines of code"


def test_tests_mirror_the_source() -> None:
    folders = {path.parent.relative_to(REPOSITORY / "src" / "overfly") for path in SOURCES}
    for folder in folders:
        if len(list((REPOSITORY / "src" / "overfly" / folder).glob("*.py"))) > 1:
            assert list((REPOSITORY / "tests" / folder).glob("test_*.py")), f"no tests for {folder}"


def test_the_commands_are_the_api() -> None:
    app = cli.application()
    found = set()
    for name in app:
        if name.startswith("-"):
            continue
        inner = [f"{name}_{word}" for word in app[name] if not word.startswith("-")]
        found |= set(inner or [name])
    assert found == {"_".join(cli.words(name)) for name in api.__all__}


def test_public_names_are_there_and_told_about() -> None:
    for name in overfly.__all__:
        found = getattr(overfly, name)
        assert callable(found), f"{name} is a module of the same name"
        assert found.__doc__, name
    assert set(overfly.__all__) <= set(dir(overfly))
    assert not hasattr(overfly, "no_such_name")
    assert sorted(overfly.__all__) == overfly.__all__
    for name in api.__all__:
        documented = getattr(api, name).__doc__
        assert documented
        if name != "list_kinds":
            assert "Args:" in documented, name


def test_nothing_names_a_machine_or_unpickles() -> None:
    for path in SOURCES:
        text = path.read_text()
        assert not re.search(r"(?<![\w.])/(work|farm)/", text), path
        for call in re.findall(r"torch\.load\([^)]*\)", text):
            assert "weights_only=True" in call, (path, call)
        assert "pickle.load" not in text, path


def test_importing_needs_no_torchvision_and_no_heavy_extra() -> None:
    code = (
        "import sys, overfly.commands.api;"
        "heavy = {'torchvision', 'rasterio', 'onnxruntime', 'openvino', 'fastapi', 'av'};"
        "heavy |= {'tensorboard'};"
        "found = heavy & set(sys.modules); assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)
