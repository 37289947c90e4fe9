"""Settings as text: YAML files, and ``key=value`` changes to what they hold."""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any, cast

import yaml
from pydantic import ValidationError

from overfly.core.errors import RecipeError

OPTIONS = ("cache", "checkpoint-every", "device", "devices", "out", "seeds", "split", "workers")
"""Options of commands that are taken for settings now and then."""


class _Loader(yaml.SafeLoader):
    """YAML whose numbers may be written 1e-3, which YAML 1.1 takes for a word, and whose keys stand once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = [key for place, key in enumerate(keys) if key in keys[:place]]
        if twice:
            raise yaml.YAMLError(f"{twice[0]} stands twice, again in line {node.start_mark.line + 1} or below")
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(?:\d[\d_]*)(?:\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def parse(text: str) -> Any:
    """A value written as YAML.

    Raises:
        yaml.YAMLError: it is none, or is nested too deeply.
    """
    if max(map(text.count, "[{")) > 1000:
        raise yaml.YAMLError("it is nested too deeply")
    return yaml.load(text, _Loader)  # noqa: S506  (a safe loader with one more number format)


def read_mapping(path: Path, kind: str = "recipe") -> dict[str, Any]:
    """The settings that a YAML file holds.

    Args:
        path: of the file.
        kind: what it should be, for the sentence that says it is not.

    Raises:
        RecipeError: the file is missing, or not YAML, or no mapping.
    """
    try:
        values = parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"{path} is not there; give the file of a {kind}") from None
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise RecipeError(f"{path} cannot be read as YAML ({reason}); correct it and try again") from None
    if not isinstance(values, dict):
        raise RecipeError(f"{path} holds no settings; a {kind} is a YAML mapping of settings such as 'name: value'")
    return cast(dict[str, Any], values)


def set_value(values: dict[str, Any], override: str) -> None:
    """Change one setting in place.

    Args:
        values: settings, as a mapping of mappings, lists and plain values.
        override: ``dotted.key=value``, the value as YAML.

    Raises:
        RecipeError: this is no key=value, or the key leads through a plain value.
    """
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"{override!r} changes no setting; write key=value, such as method.ema=0.99")
    if not text.strip():
        raise RecipeError(f"{override!r} has no value; write {key}=null to take a setting away")
    try:
        value = parse(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise RecipeError(f"{override!r} holds a value that is not YAML; quote it") from None
    *parents, last = key.split(".")
    place: Any = values
    for parent in parents:
        place = _descend(place, parent, key)
    if isinstance(place, list):
        place[_index(place, last, key)] = value
    else:
        place[last] = value


def validation_message(error: ValidationError, named: str) -> str:
    """All that pydantic found, as one sentence with dotted keys."""
    found = []
    for entry in error.errors():
        key = ".".join(part for part in map(str, entry["loc"]) if not _is_machinery(part))
        what = entry["msg"].removeprefix("Value error, ")
        if entry["type"] == "extra_forbidden":
            what = "there is no such setting"
            if key in OPTIONS:
                what = f"how a command runs is no setting of a recipe but an option, --{key}"
        given = entry.get("input")
        shown = isinstance(given, str | int | float) and entry["type"] != "value_error"
        found.append((f"{key}: {what}" if key else what) + (f" (given: {given!r})" if shown else ""))
    return f"{named} cannot be used: {'; '.join(dict.fromkeys(found))}; correct this and try again"


def _is_machinery(part: str) -> bool:
    """Whether a part of pydantic's location speaks of its own inside."""
    return part.startswith(("function-", "Recipe", "lax-or-strict", "json-or-python")) or "[" in part or part == "path"


def _descend(place: Any, part: str, key: str) -> Any:
    if isinstance(place, list):
        index = _index(place, part, key)
        if isinstance(place[index], str):
            place[index] = {"name": place[index]}
        if not isinstance(place[index], dict | list):
            raise RecipeError(f"{key}: {part} is a plain value and has no settings below it; change {part} itself")
        return place[index]
    if part != "name" and isinstance(place.get(part), str):
        place[part] = {"name": place[part]}
    if place.get(part) is None:
        place[part] = {}
    if not isinstance(place[part], dict | list):
        raise RecipeError(f"{key}: {part} is a plain value and has no settings below it; change {part} itself")
    return place[part]


def _index(place: list[Any], part: str, key: str) -> int:
    if not part.isdigit() or int(part) >= len(place):
        raise RecipeError(f"{key}: {part!r} is no entry of a list of {len(place)}; count from 0")
    return int(part)
