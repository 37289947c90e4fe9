"""The command line: the functions of `overfly.commands`, parsed by cyclopts."""

import inspect
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from overfly.core.errors import OverflyError, RecipeError

if TYPE_CHECKING:
    from types import FrameType

    from cyclopts import App, CycloptsError, UnknownOptionError

RANK_ZERO = os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0"
"""Whether this is the first process of a distributed training, which prints."""
USER_ERROR = 2
"""Exit status of errors that the user can correct."""
TYPES: dict[object, str] = {int: "an integer", float: "a number", bool: "true or false"}
"""Names of types in error messages."""
HELP = """
Segment aerial imagery in real time: train on a labeled domain, adapt to an unlabeled one, export the network.

A recipe is a YAML file; its settings can be changed on the command line: overfly train recipe.yaml optim.lr=0.005
"""
GROUPS = {
    "data": "Check, measure, synthesize and download imagery.",
    "hub": "Push exported networks to a model hub, and load them from one.",
}
"""Help of command groups."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, handled like Ctrl-C with another exit status."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit: 0, 2 after a user's mistake, 130 after Ctrl-C, 143 after SIGTERM."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    handles_sigterm = in_main_thread and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    try:
        if handles_sigterm:
            signal.signal(signal.SIGTERM, _terminate)
        if isinstance(sys.stdout, io.TextIOWrapper):  # else a name that is not UTF-8 could not be printed
            sys.stdout.reconfigure(errors="backslashreplace")
        status = run(list(sys.argv[1:] if arguments is None else arguments))
    except BaseException as error:
        status = handle(error)
    finally:
        if handles_sigterm:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.exit(status)


def _terminate(number: int, frame: "FrameType | None") -> None:
    del number, frame
    raise Terminated


def run(arguments: list[str]) -> int:
    """Run one command, print its result and return the exit status."""
    command, bound, _ = application(arguments).parse_args(arguments, exit_on_error=False, print_error=False)
    check_settings(command, bound.args)
    result = command(*bound.args, **bound.kwargs)
    if result is not None and RANK_ZERO:
        from rich.console import Console

        Console(soft_wrap=True, highlight=False, markup=False).print(result)
        sys.stdout.flush()
    return int(getattr(result, "exit_status", 0))


def application(arguments: Sequence[str] = ()) -> "App":
    """Build the command line: one command for each function of `overfly.commands`.

    If the ``arguments`` contain a command, the other commands are not imported.
    """
    from cyclopts import App, Parameter

    from overfly import __version__
    from overfly.commands import MODULES

    app = App(
        name="overfly", help=HELP, version=__version__, help_format="markdown",
        default_parameter=Parameter(negative_iterable=(), negative_none=()), result_action="return_value",
    )  # fmt: skip
    groups = {name: App(name=name, help=text) for name, text in GROUPS.items()}
    has_command = any(tuple(arguments[: len(words(name))]) == words(name) for name in MODULES)
    for name, module in MODULES.items():
        *group, command = words(name)
        parent = groups[group[0]] if group else app
        parent.command(f"overfly.commands.{module}:{name}", name=command)
        if not has_command:
            parent[command]  # imports it, for the summary of its help
    for parent in groups.values():
        app.command(parent)
    return app


def words(name: str) -> tuple[str, ...]:
    """Return the words of a command: ``data_synthesize`` is ``data synthesize``, ``list_kinds`` is ``list``."""
    return ("list",) if name == "list_kinds" else tuple(name.split("_"))


def handle(error: BaseException) -> int:
    """Print an error that the user can correct on one line and return the exit status; raise other errors.

    Some libraries convert a Ctrl-C during their import to another error, so the contexts of errors are checked too.
    """
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, KeyboardInterrupt):
        cause = cause.__context__
    if cause is not None:
        status = 128 + (signal.SIGTERM if isinstance(cause, Terminated) else signal.SIGINT)
        return fail("stopped; the same command resumes a training, a map or a download", status)
    from cyclopts import CycloptsError

    match error:
        case OverflyError():
            message = str(error)
        case CycloptsError():
            message = usage_message(error)
        case BrokenPipeError():
            sys.stderr.close()
            return 0
        case OSError():
            message = f"{error.filename or 'a file'}: {error.strerror or error}; correct this and try again"
        case UnicodeEncodeError():
            message = f"{error.object!r} is not valid UTF-8; rename the file, or write the name again"
        case MemoryError() | RuntimeError() if isinstance(error, MemoryError) or "memory" in str(error):
            message = "out of memory; lower batch, crop or size, or use a larger machine"
        case RuntimeError() if "gloo" in str(error) or type(error).__name__ == "DistBackendError":
            message = "another process of this training ended or stalls; the same command resumes from its checkpoint"
        case _:
            raise error
    return fail(message)


def fail(message: str, status: int = USER_ERROR) -> int:
    """Print an error message on one line and return the exit status."""
    if RANK_ZERO:
        print(f"overfly: {OverflyError(message)}", file=sys.stderr)
    return status


def check_settings(command: Callable[..., Any], arguments: Sequence[Any]) -> None:
    """Raise `RecipeError` if an option of a command is written like a setting, such as ``quiet=true``."""
    if not _takes_settings(command):
        return
    options = {
        name: parameter
        for name, parameter in inspect.signature(command).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    for entry in chain.from_iterable(value if isinstance(value, list) else [value] for value in arguments):
        key, equals, value = str(entry).partition("=")
        name = key.replace("-", "_")
        if equals and name in options:
            option = f"{name.replace('_', '-')} {value}"
            if isinstance(options[name].default, bool):
                option = ("no-" if value.lower() in ("false", "no", "off", "0") else "") + name.replace("_", "-")
            raise RecipeError(f"{key} is an option, not a setting of a recipe; write --{option}")


def usage_message(error: "CycloptsError") -> str:
    """Return the error of a command line, with a suggestion."""
    from cyclopts import CoercionError, MissingArgumentError, UnknownCommandError, UnknownOptionError

    prefix = error.command_chain or ()
    command = " ".join(prefix) or "overfly"
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
                *most, last = map(str, get_args(error.target_type))
                expected = f"{', '.join(most)} or {last}" if most else last
            if expected is not None:
                message = f"{name} must be {expected}, got {token.value}"
        case _ if unused:
            message = f"{command} takes no further argument, got {' '.join(unused)}"
    return f"{message}; see {' '.join(['overfly', *prefix])} --help"


def _unknown_option(error: "UnknownOptionError") -> str:
    """Return an unknown option, with a suggestion: another option, or the setting of the same name."""
    option = error.token.keyword or error.token.value
    names = [name for argument in error.argument_collection for name in argument.names if name.startswith("--")]
    suggestion = _suggestion(option, names)
    if suggestion or option.startswith("--no-") or error.target is None or not _takes_settings(error.target):
        return f"{option}{suggestion}"
    tokens = error.root_input_tokens or []
    values = [value for name, value in pairwise(tokens) if name == option and value[:1] != "-"]
    setting = option.lstrip("-").replace("-", "_")
    return f"{option}; if it is a setting of the recipe, write {setting}={(values or ['…'])[0]}"


def _suggestion(word: str, names: Iterable[str]) -> str:
    """Return the most similar name as a question, or an empty text."""
    by_word = {name.lstrip("-"): name for name in names}
    close = get_close_matches(word.lstrip("-"), by_word, n=1, cutoff=0.7)
    return f"; did you mean {by_word[close[0]]}?" if close else ""


def _takes_settings(command: Callable[..., Any]) -> bool:
    """Return whether a command takes settings of a recipe or a domain as arguments."""
    return bool({"overrides", "recipes"} & set(inspect.signature(command).parameters))
