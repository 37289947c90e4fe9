"""The API's functions as commands, nothing else."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

from cyclopts import App, CycloptsError, Parameter
from rich.console import Console

from overfly import __version__, api
from overfly.core.errors import OverflyError

FIRST = os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0"
"""Whether this is the process that speaks, of the several that train together."""
WRONG = 2
"""Exit status where the user can put it right."""

HELP = """
Segmentation of aerial imagery in real time, in the place you have labels for and in the place you do not.

A recipe is a YAML file; every setting of it can be changed behind it: overfly train recipe.yaml optim.lr=0.005
"""


GROUPS = {
    "data": "Look at, draw and fetch imagery.",
    "hub": "Push networks to a model hub, and load them from one.",
}
"""Help of the commands of two words, by the first."""


def words(name: str) -> tuple[str, ...]:
    """The words that call a function: ``data_draw`` is ``data draw``, ``list_kinds`` is ``list``."""
    return ("list",) if name == "list_kinds" else tuple(name.split("_"))


def application() -> App:
    """The command line: one command for each name in ``overfly.api.__all__``."""
    app = App(
        name="overfly",
        help=HELP,
        version=__version__,
        help_format="plaintext",
        default_parameter=Parameter(negative_iterable=(), negative_none=()),
        suppress_keyboard_interrupt=False,
        exit_on_error=False,
        print_error=False,
        result_action="return_value",
    )
    groups: dict[str, App] = {}
    for name in api.__all__:
        function: Callable[..., Any] = getattr(api, name)
        *group, command = words(name)
        place = app
        for word in group:
            if word not in groups:
                groups[word] = App(name=word, help=GROUPS[word])
                app.command(groups[word])
            place = groups[word]
        place.command(function, name=command)
    return app


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; a mistake of the user's is one sentence and exit status 2."""
    status = 0
    with contextlib.suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGTERM, _stop)
    try:
        result = application()(list(sys.argv[1:] if arguments is None else arguments))
        if result is not None and FIRST:
            Console(soft_wrap=True, highlight=False, markup=False).print(result)
        status = int(getattr(result, "exit_status", 0))
    except OverflyError as error:
        status = fail(str(error))
    except CycloptsError as error:
        status = fail(f"{str(error).strip().rstrip('.')}; see overfly --help")
    except KeyboardInterrupt:
        status = fail("stopped; the same command goes on where it can")
    except BrokenPipeError:
        sys.stderr.close()
    except OSError as error:
        status = fail(f"{error.filename or 'a file'}: {error.strerror or error}; put this right and try again")
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        status = fail("this does not fit the memory; lower batch, crop or size, or use a larger machine")
    sys.exit(status)


def _stop(number: int, frame: FrameType | None) -> None:
    """Being told to end is like Ctrl-C: what is half made is cleared away or left to be gone on with."""
    del number, frame
    raise KeyboardInterrupt


def fail(sentence: str) -> int:
    """Say what is wrong; the status to exit with."""
    if FIRST:
        print(f"overfly: {' '.join(sentence.split())}", file=sys.stderr)
    return WRONG


if __name__ == "__main__":
    main()
