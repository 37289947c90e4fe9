"""Recipes, commands, links and Python of the documents work, and generated pages are current."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from conftest import REPOSITORY
from overfly import cli
from overfly.recipe import Recipe

PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
RECIPES = [
    (page, block)
    for page in PAGES
    for block in re.findall(r"```yaml\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    if re.search(r"^(source|start):", block, re.MULTILINE)
]
COMMANDS = [
    (page, line.strip())
    for page in PAGES
    for block in re.findall(r"```(?:bash|sh|console)\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip().startswith("overfly ")
]


def script(name: str) -> Any:
    """A script of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", REPOSITORY / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_method_pages_are_current() -> None:
    module = script("methods")
    pages: dict[Path, str] = module.pages()
    existing = set(module.FOLDER.glob("*.md"))
    assert existing == set(pages), "run `make docs`"
    for file, text in pages.items():
        assert file.read_text(encoding="utf-8") == text, f"{file.name}: run `make docs`"


def test_the_reference_is_current() -> None:
    module = script("build")
    assert module.PAGE.read_text(encoding="utf-8") == module.page(), "run `make docs`"
    assert module.DATASETS.read_text(encoding="utf-8") == module.datasets(), "run `make docs`"


@pytest.mark.parametrize(("page", "block"), RECIPES, ids=lambda value: value.name if isinstance(value, Path) else "")
def test_recipes_in_documents_are_valid(page: Path, block: str) -> None:
    del page
    values = yaml.safe_load(block)
    if not isinstance(values.get("start"), str):
        Recipe.model_validate(values)


@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=lambda value: value.name if isinstance(value, Path) else value)
def test_commands_in_documents_parse(page: Path, line: str) -> None:
    del page
    words = [word for word in shlex.split(line, comments=True)[1:] if word not in ("|", "&&")]
    if "--help" not in words:
        cli.application().parse_args(words, print_error=False, exit_on_error=False)


def test_links_in_documents_exist() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
            if not target.startswith(("http", "mailto:")):
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    small = [f'"{role}.{name}"' for role in ("source", "target") for name in ("train=6", "test=2", "size=128")]
    code = block.replace('"recipes/', f'"{REPOSITORY}/recipes/').replace(
        '"steps=100"', ", ".join(['"steps=1"', *small])
    )
    assert code != block
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)  # noqa: S102  (our own README)
    assert getattr(names["scores"], "shape", None) == (1, 7, 256, 256)


def test_files_named_in_contributing_exist() -> None:
    text = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for name in set(re.findall(r"`([a-z_/]+\.py)`", text)):
        assert name.endswith("mine.py") or (REPOSITORY / "src" / "overfly" / name).exists() or "/" not in name, name


def test_documents_have_no_comments() -> None:
    for page in PAGES:
        assert "<!--" not in page.read_text(encoding="utf-8"), page
