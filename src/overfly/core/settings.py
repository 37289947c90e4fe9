"""Settings as text: YAML files, ``key=value`` overrides, and messages for invalid values."""

import difflib
import hashlib
import re
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any, cast, get_args

import yaml
from pydantic import ValidationError

from overfly.core.errors import RecipeError
from overfly.core.spec import Spec

OPTIONS = ("cache", "checkpoint-every", "device", "devices", "out", "seeds", "split", "workers")
"""Options of commands that users may give as settings by mistake."""
VALIDATOR = re.compile(r"^function-|^Recipe|^lax-or-strict|^json-or-python|\[|^path$")
"""Parts of pydantic's error locations that are validators, not settings."""
MAX_TEXT = 1_000_000
"""Largest length of YAML text in characters."""
MAX_DEPTH = 50
"""Largest depth of nested lists and mappings."""
MAX_VALUES = 100_000
"""Largest number of values, with those of each alias counted again."""


class _Loader(yaml.SafeLoader):
    """YAML with 1e-3 as a number, which YAML 1.1 reads as text, an error for duplicate keys, and bounds."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth = 0
        self.values: dict[int, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        is_alias = self.check_event(yaml.AliasEvent)
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise yaml.YAMLError(f"it is nested more than {MAX_DEPTH} deep")
        node = super().compose_node(parent, index)
        self.depth -= 1
        if is_alias and id(node) not in self.values:
            raise yaml.YAMLError("an alias refers to a list or mapping that contains it")
        if isinstance(node, yaml.CollectionNode) and not is_alias:
            parts = [part for pair in node.value for part in (pair if isinstance(pair, tuple) else (pair,))]
            self.values[id(node)] = 1 + sum(self.values.get(id(part), 1) for part in parts)
        else:
            self.values.setdefault(id(node), 1)
        if self.values[id(node)] > MAX_VALUES:
            raise yaml.YAMLError(f"it holds more than {MAX_VALUES} values")
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        names: set[Hashable] = set()
        for key in [self.construct_object(key, deep=True) for key, _ in node.value]:
            if not isinstance(key, Hashable) or key in names:
                problem = "duplicate key" if isinstance(key, Hashable) else "a list or mapping as a key:"
                raise yaml.YAMLError(f"{problem} {key} in line {node.start_mark.line + 1} or below")
            names.add(key)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        value = super().construct_yaml_int(node)
        if abs(value) >= 2**63:
            raise yaml.YAMLError("it holds a whole number of more than 64 bits")
        return value


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(?:\d[\d_]*)(?:\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def parse_yaml(text: str) -> Any:
    """Parse a YAML value; raise `yaml.YAMLError` if the text is not YAML, too long, or nested too deeply."""
    if len(text) > MAX_TEXT:
        raise yaml.YAMLError(f"it is longer than {MAX_TEXT} characters")
    return yaml.load(text, _Loader)  # noqa: S506  (a safe loader with one more number format)


def write_mapping(path: Path, values: Mapping[str, Any]) -> None:
    """Write settings as YAML, with the SHA-256 of the other lines in the first one."""
    text = "\n" + yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    path.write_text(f"# sha256 {hashlib.sha256(text.encode()).hexdigest()}{text}", encoding="utf-8")


def read_mapping(path: Path, kind: str = "recipe") -> dict[str, Any]:
    """Read the settings in a YAML file, and compare them with the digest in its first line, if it has one.

    ``kind`` is the name of such a file in error messages. Raises `RecipeError`: the file is missing, cut or changed, or
    not YAML, or not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
        digest = re.match("# sha256 ([0-9a-f]{64})", text)
        if digest and hashlib.sha256(text[digest.end() :].encode()).hexdigest() != digest[1]:
            raise RecipeError(f"{path} was cut or changed since it was written; restore it, or delete its first line")
        values = parse_yaml(text)
    except FileNotFoundError:
        raise RecipeError(f"{path} does not exist; give the file of a {kind}") from None
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise RecipeError(f"{path} cannot be read as YAML ({reason}); correct it and try again") from None
    if not isinstance(values, dict):
        raise RecipeError(f"{path} is not a {kind}; write a YAML mapping of settings, such as 'name: value'")
    return cast(dict[str, Any], values)


def set_value(values: dict[str, Any], override: str) -> None:
    """Change a setting in place by ``dotted.key=value``, a YAML value; raise `RecipeError` if it is none."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"{override!r} is not a setting; write key=value, such as method.ema=0.99")
    if not text.strip():
        raise RecipeError(f"{override!r} has no value; write {key}=null to unset it")
    try:
        value = parse_yaml(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise RecipeError(f"{override!r} has a value that is not YAML; quote it") from None
    *parents, last = key.split(".")
    container: Any = values
    for parent in parents:
        container = _descend(container, parent, key)
    container[_place(container, last, key)] = value


def validation_message(error: ValidationError, name: str, spec: type[Spec] | None = None) -> str:
    """Format all errors of a validation as one sentence with dotted keys.

    ``name`` is that of the validated file or object; ``spec`` gives suggestions for misspelled settings.
    """
    problems = []
    for entry in error.errors():
        path = [part for part in map(str, entry["loc"]) if not VALIDATOR.search(part)]
        key = ".".join(path)
        if entry["type"] == "extra_forbidden":
            path = path or [str(entry["loc"][-1])]
            problems.append(f"{'.'.join(path)}: {_unknown(path, spec)}")
        elif entry["type"] == "value_error":
            text = entry["msg"].removeprefix("Value error, ")
            problems.append(f"{key}: {text}" if key else text)
        else:
            problems.append(f"{key or 'it'} {_problem(entry)}")
    return f"{name} cannot be used: {'; '.join(dict.fromkeys(problems))}; correct this and try again"


MESSAGES: dict[str, dict[str, str]] = yaml.safe_load(Path(__file__).with_name("messages.yaml").read_text("utf-8"))
PROBLEMS, TYPES = MESSAGES["problems"], MESSAGES["types"]


def _problem(entry: Mapping[str, Any]) -> str:
    """Format the error of one value."""
    kind, value = entry["type"], entry.get("input")
    if kind in PROBLEMS:
        bounds = {key: f"{end:g}" if isinstance(end, float) else end for key, end in entry.get("ctx", {}).items()}
        problem = PROBLEMS[kind].format(**bounds)
    else:
        problem = f"must be {TYPES.get(kind.partition('_')[0], 'another value')}"
    if kind == "string_type" and isinstance(value, bool):
        return f"{problem}, got {str(value).lower()}; YAML reads yes, no, on and off as true or false, so quote them"
    if isinstance(value, bool):
        return f"{problem}, got {str(value).lower()}"
    return f"{problem}, got {value!r}" if isinstance(value, int | float | str) else problem


def _unknown(path: list[str], spec: type[Spec] | None) -> str:
    """Format the error for an unknown setting, with the most similar known one."""
    if path[0] in OPTIONS and len(path) == 1:
        return f"not a setting of a recipe but an option of the command, --{path[0]}"
    known = sorted({name for kind in _specs_at(path[:-1], spec) for name in kind.model_fields})
    near = difflib.get_close_matches(path[-1], known, n=1)
    return "there is no such setting" + (f", did you mean {near[0]}?" if near else "")


def _specs_at(path: list[str], spec: type[Spec] | None) -> list[type[Spec]]:
    """Return the classes of settings at a dotted key, including all kinds of a choice."""
    specs = [] if spec is None else _specs_in(spec)
    for part in path:
        if not part.isdecimal():
            fields = [kind.model_fields[part] for kind in specs if part in kind.model_fields]
            specs = [kind for field in fields for kind in _specs_in(field.annotation)]
    return specs


def _specs_in(annotation: Any) -> list[type[Spec]]:
    """Return the classes of settings in a type annotation such as ``tuple[Augment, ...] | None``."""
    if isinstance(annotation, type) and issubclass(annotation, Spec):
        kinds: Mapping[str, type[Spec]] = getattr(annotation, "kinds", {})
        return [annotation, *kinds.values()]
    return [kind for argument in get_args(annotation) for kind in _specs_in(argument)]


def _descend(container: Any, part: str, key: str) -> Any:
    """The list or mapping at a part of a dotted key; that of a name, or of nothing in a mapping, is made."""
    place = _place(container, part, key)
    value = container.get(part) if isinstance(container, dict) else container[place]
    if isinstance(value, str) and part != "name":
        container[place] = {"name": value}
    elif value is None and isinstance(container, dict):
        container[place] = {}
    if not isinstance(container[place], dict | list):
        raise RecipeError(f"{key}: {part} is a plain value without settings; set {part} itself")
    return container[place]


def _place(container: Any, part: str, key: str) -> Any:
    """Key of a mapping or index of a list."""
    if isinstance(container, dict):
        return part
    if not part.isdecimal() or int(part[:9]) >= len(container):
        raise RecipeError(f"{key}: {part!r} must be an index from 0 to {len(container) - 1}")
    return int(part)


def parse_budget(budget: str) -> float:
    """Convert ``90s``, ``5min``, ``2h`` or minutes to seconds; raise `RecipeError` unless the duration is above 0."""
    units = "s|secs?|seconds?|m|mins?|minutes?|h|hrs?|hours?"
    match = re.fullmatch(rf"(\d+(?:\.\d+)?)\s*({units})?", budget.strip().lower())
    if match is None or float(match[1]) == 0:
        raise RecipeError(f"--budget must be a duration such as 90s, 10min or 2h, got {budget!r}")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[(match[2] or "m")[0]]
