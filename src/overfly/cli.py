"""The API's functions as commands, nothing else."""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False  # as in overfly/__init__.py: what takes time is imported where a Ctrl-C is answered already
if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import FrameType
    from typing import Any

    from cyclopts import App

FIRST = os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0"
"""Whether this is the process that speaks, of the several that train together."""
WRONG = 2
"""Exit status where the user can put it right."""
STOPPED = 128
"""Exit status of what a signal has stopped, less the signal's number: 130 after Ctrl-C."""

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
    """Return the words that call a function: ``data_synthesize`` is ``data synthesize``, ``list_kinds`` is ``list``."""
    return ("list",) if name == "list_kinds" else tuple(name.split("_"))


def application() -> App:
    """Build the command line: one command for each function of `overfly.commands`, imported when it is called."""
    from cyclopts import App, Parameter

    from overfly import __version__
    from overfly.commands import MODULES

    app = App(
        name="overfly",
        help=HELP,
        version=__version__,
        help_format="markdown",
        default_parameter=Parameter(negative_iterable=(), negative_none=()),
        suppress_keyboard_interrupt=False,
        exit_on_error=False,
        print_error=False,
        result_action="return_value",
    )
    groups = {name: App(name=name, help=text) for name, text in GROUPS.items()}
    for group in groups.values():
        app.command(group)
    for name, module in MODULES.items():
        *group, command = words(name)
        (groups[group[0]] if group else app).command(f"overfly.commands.{module}:{name}", name=command)
    return app


class Stop:
    """Answers Ctrl-C, and being told to end, which is like it.

    While nothing is begun, or all is done, the process ends at once: an import that is interrupted raises what it
    likes. In between, what is half made is cleared away or left to be gone on with.

    Attributes:
        begun: whether a command is at work.
        status: the exit status that came of it; 0 where nobody has stopped it.
    """

    def __init__(self) -> None:
        self.begun = False
        self.status = 0
        self._before: dict[int, Any] = {}

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        del frame
        self.status = STOPPED + number
        if not self.begun:
            if FIRST:
                os.write(2, b"overfly: stopped\n")
            os._exit(self.status)
        raise KeyboardInterrupt

    def listen(self) -> None:
        """Handle the signals from now on, but those that whoever started the process wants ignored."""
        import signal

        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                before = signal.getsignal(number)
                if before is not signal.SIG_IGN:
                    signal.signal(number, self)
                    self._before[number] = before
        except ValueError:  # not in the main thread
            return

    def leave(self) -> None:
        """Have the signals handled as they were."""
        import signal

        for number, before in self._before.items():
            signal.signal(number, before)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; a mistake of the user's is one sentence and exit status 2, being stopped is 130."""
    stop = Stop()
    try:
        stop.listen()
        status = run(list(sys.argv[1:] if arguments is None else arguments), stop)
    except KeyboardInterrupt:
        stop.begun = False
        stop.status = stop.status or STOPPED + 2  # before it was listened for
        status = fail("stopped; the same command goes on where it can")
    except Exception:  # of a library that was interrupted
        stop.begun = False
        if not stop.status:
            raise
        status = fail("stopped; the same command goes on where it can")
    stop.begun = False
    if arguments is not None:
        stop.leave()
    sys.exit(stop.status if stop.status and status == WRONG else status)


def run(arguments: list[str], stop: Stop) -> int:
    """Run one command; its exit status."""
    from cyclopts import CycloptsError
    from rich.console import Console

    from overfly.core.errors import OverflyError

    try:
        app = application()
        stop.begun = True
        result = app(arguments)
        if result is not None and FIRST:
            Console(soft_wrap=True, highlight=False, markup=False).print(result)
            sys.stdout.flush()
        return int(getattr(result, "exit_status", 0))
    except OverflyError as error:
        return fail(str(error))
    except CycloptsError as error:
        return fail(f"{str(error).strip().rstrip('.')}; see overfly --help")
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except OSError as error:
        return fail(f"{error.filename or 'a file'}: {error.strerror or error}; put this right and try again")
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        return fail("this does not fit the memory; lower batch, crop or size, or use a larger machine")


def fail(sentence: str) -> int:
    """Say what is wrong; the status to exit with."""
    if FIRST:
        print(f"overfly: {' '.join(sentence.split())}", file=sys.stderr)
    return WRONG


if __name__ == "__main__":
    main()
