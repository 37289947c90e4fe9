"""What the API's functions take, made into values: recipes, domains, seeds, and options within their ranges."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, ParamSpec, TypeVar, get_args, get_type_hints

from cyclopts import Parameter
from pydantic import ValidationError

from overfly.core.download import cache_folder
from overfly.core.errors import RecipeError
from overfly.core.settings import read_mapping, set_value, validation_message
from overfly.data.domain import Domain
from overfly.recipe import Recipe, load

P = ParamSpec("P")
R = TypeVar("R")


def pathlike(function: Callable[P, R]) -> Callable[P, R]:
    """Let the arguments that are paths be given as text too, as a notebook does; the command line is as before."""
    signature = inspect.signature(function)

    @functools.lru_cache(1)
    def paths() -> tuple[set[str], set[str]]:
        hints = {name: get_args(hint) or (hint,) for name, hint in get_type_hints(function).items()}
        one = {name for name, kinds in hints.items() if Path in kinds and str not in kinds}
        return one, {name for name, kinds in hints.items() if list[Path] in kinds}

    @functools.wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            given = signature.bind(*args, **kwargs)
        except TypeError:
            return function(*args, **kwargs)  # which says whose argument it is that is wrong
        one, several = paths()
        for name, value in given.arguments.items():
            if name in one and isinstance(value, str):
                given.arguments[name] = Path(value)
            elif name in several and value is not None:
                given.arguments[name] = [Path(each) for each in value]
        return function(*given.args, **given.kwargs)

    return called


Cache = Literal["memory", "disk", "off"]
LARGEST = 16384
"""Side of the largest image that is measured, in pixels."""


def _as_path(kind: Any, tokens: Any) -> Path:  # noqa: ARG001  (the shape that cyclopts calls)
    return Path(tokens[0].value)


Written = Annotated[Path | str | Recipe, Parameter(accepts_keys=False, n_tokens=1, converter=_as_path)]
"""A recipe as a value, or, as on the command line, the path of one."""


def _as_text(kind: Any, tokens: Any) -> str:  # noqa: ARG001  (the shape that cyclopts calls)
    return str(tokens[0].value)


More = Annotated[Path | str | Recipe, Parameter(accepts_keys=False, n_tokens=1, converter=_as_text)]
"""Another recipe as a value or a path, or a setting to change."""


def recipes_and_settings(entries: Sequence[Path | str | Recipe]) -> tuple[list[Path | str | Recipe], list[str]]:
    """What is given behind a command, told apart: recipes, and settings such as ``seed=1``.

    Raises:
        RecipeError: an entry is neither.
    """
    recipes: list[Path | str | Recipe] = []
    settings: list[str] = []
    for entry in entries:
        if isinstance(entry, Recipe) or os.path.exists(entry):  # noqa: PTH110  (a long setting is no error)
            recipes.append(entry)
        elif is_setting(str(entry)):
            settings.append(str(entry))
        elif str(entry).endswith((".yaml", ".yml")) or os.sep in str(entry):
            raise RecipeError(f"{entry} is not there; give the file of a recipe")
        else:
            raise RecipeError(
                f"{str(entry)!r} is no file and changes no setting; give a recipe's file, or key=value such as seed=1"
            )
    return recipes, settings


def is_setting(entry: str) -> bool:
    """Whether an entry changes a setting, such as ``start=other.yaml``, and is no recipe, folder or pattern."""
    key, equals, value = entry.partition("=")
    pattern = any(mark in value for mark in "*?") and value.endswith((".yaml", ".yml"))
    there = os.path.exists(entry)  # noqa: PTH110  (a long setting is no error)
    return bool(key and equals) and os.sep not in key and not pattern and not there


def check_bounds(options: dict[str, tuple[int, int, int]]) -> None:
    """Refuse an option that is out of its range: value, least, most."""
    for name, (value, least, most) in options.items():
        if not least <= value <= most:
            raise RecipeError(f"--{name} {value} is out of range; take {least} to {most}")


def cache_of(cache: Cache) -> Path | str | None:
    """Where decoded pictures are kept, as the loader takes it."""
    return {"memory": "memory", "off": None, "disk": cache_folder() / "pictures"}[cache]


def seeds_of(text: str) -> list[int]:
    """The seeds that ``3`` (how many) or ``0,1,5`` (which; ``2,`` for one) means.

    Raises:
        RecipeError: it means none.
    """
    try:
        numbers = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 0 or text.strip() == "0":
        raise RecipeError(
            f"--seeds {text} is no number of seeds; write how many, such as 3, or which, such as 0,1,5 or 2,"
        )
    return list(dict.fromkeys(numbers)) if "," in text else list(range(numbers[0]))


def domain_of(text: str, overrides: tuple[str, ...] = ()) -> Domain:
    """A domain from a file, a recipe's source, or a name."""
    values: object = {"name": text}
    if text.endswith((".yaml", ".yml")) or Path(text).is_file():
        values = read_mapping(Path(text), "domain or recipe")
    if isinstance(values, dict) and "source" in values:
        values = values["source"]
    if not isinstance(values, dict):
        raise RecipeError(f"{text} holds no domain; write 'name: folder' and its settings")
    return _valid(values, overrides, f"domain {text}")


def domains_of(text: str, overrides: tuple[str, ...] = ()) -> dict[str, Domain]:
    """The domains that a text means, by what to call them: both of a recipe's file, else one.

    Raises:
        RecipeError: it means none.
    """
    if text.endswith((".yaml", ".yml")) or Path(text).is_file():
        values = read_mapping(Path(text), "domain or recipe")
        if {"source", "target", "start"} & set(values):
            recipe = load(text, *overrides)
            roles = {"source": recipe.source, "target": recipe.target}
            return {f"{role} {domain.title}": domain for role, domain in roles.items() if domain is not None}
    domain = domain_of(text, overrides)
    return {domain.title: domain}


def changed(domain: Domain, overrides: tuple[str, ...]) -> Domain:
    """A domain with other settings."""
    if not overrides:
        return domain
    values = domain.model_dump(mode="json")
    return _valid(values, overrides, f"domain {domain.name}")


def _valid(values: dict[str, Any], overrides: tuple[str, ...], named: str) -> Domain:
    for override in overrides:
        set_value(values, override)
    try:
        return Domain.model_validate(values)
    except ValidationError as error:
        raise RecipeError(validation_message(error, named)) from None
