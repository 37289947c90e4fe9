"""Arguments shared by several commands; pydantic and PyTorch are imported inside functions."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overfly.core.choices import Cache
from overfly.core.errors import RecipeError

if TYPE_CHECKING:
    from overfly.data.domain import Domain
    from overfly.recipe import Recipe

    PathLike = Path | str
    PathLikes = Sequence[Path | str]
    AddressLike = Path | str
    RecipeLike = Recipe | Path | str
else:  # the types that the command line parses
    PathLike = Path
    PathLikes = list[str]
    AddressLike = str
    RecipeLike = str

MAX_SIDE = 16384
"""Largest side of an image, in pixels."""


def split_entries(entries: Sequence[RecipeLike]) -> tuple[list[RecipeLike], list[str]]:
    """Split arguments into recipes, and settings such as ``seed=1``; raise `RecipeError` if one is neither."""
    recipes: list[RecipeLike] = []
    settings: list[str] = []
    for entry in entries:
        if not isinstance(entry, Path | str) or os.path.exists(entry):  # noqa: PTH110  (pathlib raises for long settings)
            recipes.append(entry)
        elif is_setting(str(entry)):
            settings.append(str(entry))
        elif str(entry).endswith((".yaml", ".yml")) or os.sep in str(entry):
            raise RecipeError(f"{entry} does not exist; give a recipe file")
        else:
            raise RecipeError(
                f"{str(entry)!r} is neither a file nor a setting; give a recipe, or key=value such as seed=1"
            )
    return recipes, settings


def is_setting(entry: Path | str) -> bool:
    """Return whether an entry changes a setting, such as ``start=other.yaml``; not a recipe, folder or pattern."""
    key, equals, value = str(entry).partition("=")
    pattern = any(mark in value for mark in "*?") and value.endswith((".yaml", ".yml"))
    exists = os.path.exists(entry)  # noqa: PTH110  (pathlib raises for long settings)
    return bool(key and equals) and os.sep not in key and not pattern and not exists


def check_bounds(options: dict[str, tuple[int, int, int]]) -> None:
    """Raise RecipeError if an option (value, smallest, largest) is out of range."""
    for name, (value, smallest, largest) in options.items():
        if not smallest <= value <= largest:
            raise RecipeError(f"--{name} must be {smallest} to {largest}, got {value}")


def image_cache(cache: Cache) -> Path | str | None:
    """Return the loader's cache of decoded images: a folder, "memory", or None."""
    from overfly.core.download import cache_folder

    return {"memory": "memory", "off": None, "disk": cache_folder() / "images"}[cache]


def parse_seeds(text: str) -> list[int]:
    """Parse seeds: ``3`` is their number, ``0,1,5`` is a list (``2,`` for one seed)."""
    try:
        numbers = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 0 or text.strip() == "0":
        raise RecipeError(f"--seeds must be a number of seeds such as 3, or a list such as 0,1,5 or 2, (got {text!r})")
    return list(dict.fromkeys(numbers)) if "," in text else list(range(numbers[0]))


def load_domain(text: str, overrides: Sequence[str] = ()) -> "Domain":
    """Load a domain from its file or its name, or the source of a recipe file."""
    from overfly.core.settings import read_mapping

    values: object = {"name": text}
    if _is_file(text):
        values = read_mapping(Path(text), "domain or recipe")
    if isinstance(values, dict) and "source" in values:
        values = values["source"]
    if not isinstance(values, dict):
        raise RecipeError(f"{text} holds no domain; write 'name: folder' and its settings")
    return _validate(values, overrides, f"domain {text}")


def load_domains(text: str, overrides: Sequence[str] = ()) -> "dict[str, Domain]":
    """Load the domains of a recipe file, or one by its file or name, by title; raise `RecipeError` if there is none."""
    from overfly.core.settings import read_mapping
    from overfly.recipe import load

    if _is_file(text) and {"source", "target", "start"} & set(read_mapping(Path(text), "domain or recipe")):
        recipe = load(text, *overrides)
        roles = {"source": recipe.source, "target": recipe.target}
        return {f"{role} {domain.title}": domain for role, domain in roles.items() if domain is not None}
    domain = load_domain(text, overrides)
    return {domain.title: domain}


def override_domain(domain: "Domain", overrides: Sequence[str]) -> "Domain":
    """Return a domain with other settings."""
    if not overrides:
        return domain
    return _validate(domain.model_dump(mode="json"), overrides, f"domain {domain.name}")


def _is_file(text: str) -> bool:
    return text.endswith((".yaml", ".yml")) or Path(text).is_file()


def _validate(values: dict[str, Any], overrides: Sequence[str], name: str) -> "Domain":
    from pydantic import ValidationError

    from overfly.core.settings import set_value, validation_message
    from overfly.data.domain import Domain

    for override in overrides:
        set_value(values, override)
    try:
        return Domain.model_validate(values)
    except ValidationError as error:
        raise RecipeError(validation_message(error, name, Domain)) from None
