"""Mistakes on the command line, explained in one sentence with what was probably meant."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from overfly.core.errors import RecipeError

if TYPE_CHECKING:
    from cyclopts import CycloptsError, UnknownOptionError

TYPES: dict[object, str] = {int: "an integer", float: "a number", bool: "true or false"}


def check_settings(command: Callable[..., Any], arguments: Sequence[Any]) -> None:
    """Check that no option of a command is written like a setting, such as ``quiet=true``.

    Raises:
        RecipeError: one is; the message says how to write it.
    """
    if not _takes_settings(command):
        return
    options = {
        name: parameter
        for name, parameter in inspect.signature(command).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    for entry in chain.from_iterable(each if isinstance(each, list) else [each] for each in arguments):
        key, equals, value = str(entry).partition("=")
        name = key.replace("-", "_")
        if equals and name in options:
            option = name.replace("_", "-")
            if isinstance(options[name].default, bool):
                no = "no-" if value.lower() in ("false", "no", "off", "0") else ""
                raise RecipeError(f"{key} is an option, not a setting of a recipe; write --{no}{option}")
            raise RecipeError(f"{key} is an option, not a setting of a recipe; write --{option} {value}")


def usage_message(error: CycloptsError) -> str:
    """Return what is wrong with a command line, and what was probably meant."""
    from cyclopts import CoercionError, MissingArgumentError, UnknownCommandError, UnknownOptionError

    words = error.command_chain or ()
    command = " ".join(words) or "overfly"
    unused = error.unused_tokens or ()
    message = str(error).strip().rstrip(".")
    match error:
        case UnknownCommandError() if unused and not unused[0].startswith("-"):
            names = sorted(name for name in error.app or () if not name.startswith("-"))
            return f"unknown command {unused[0]}{_suggestion(unused[0], names)}; commands: {', '.join(names)}"
        case UnknownCommandError() if unused:
            message = f"unknown option {unused[0]}"
        case UnknownOptionError():
            message = f"{command} has no option {_unknown_option(error)}"
        case MissingArgumentError(argument=argument) if argument is not None:
            name = argument.name.lstrip("-").upper() if argument.index is not None else argument.name
            message = f"{command} needs {name if error.keyword is None else f'a value for {error.keyword}'}"
        case CoercionError(token=token, argument=argument) if token is not None and argument is not None:
            name = token.keyword or argument.name.lstrip("-").upper()
            expected = TYPES.get(error.target_type)
            if get_origin(error.target_type) is Literal:
                expected = " or ".join(map(str, get_args(error.target_type)))
            if expected is not None:
                message = f"{name} must be {expected}, got {token.value}"
        case _ if unused:
            message = f"{command} takes no further argument, got {' '.join(unused)}"
    return f"{message}; see {' '.join(['overfly', *words])} --help"


def _unknown_option(error: UnknownOptionError) -> str:
    """Return an unknown option, with a suggestion: another option, or the setting of the same name."""
    option = error.token.keyword or error.token.value
    names = [name for argument in error.argument_collection for name in argument.names if name.startswith("--")]
    suggestion = _suggestion(option, names)
    if suggestion or option.startswith("--no-") or error.target is None or not _takes_settings(error.target):
        return f"{option}{suggestion}"
    tokens = error.root_input_tokens or []
    values = [value for name, value in pairwise(tokens) if name == option and value[:1] != "-"]
    setting = option.lstrip("-").replace("-", "_")
    return f"{option}; a setting of the recipe is written {setting}={(values or ['…'])[0]}"


def _suggestion(word: str, names: Iterable[str]) -> str:
    """Return the nearest of some names as a question, or nothing."""
    plain = {name.lstrip("-"): name for name in names}
    close = get_close_matches(word.lstrip("-"), plain, n=1, cutoff=0.7)
    return f"; did you mean {plain[close[0]]}?" if close else ""


def _takes_settings(command: Callable[..., Any]) -> bool:
    """Return whether a command takes settings of a recipe or a domain as arguments."""
    return bool({"overrides", "recipes"} & set(inspect.signature(command).parameters))
