"""Errors that a user can act on, each with the problem, its location and the correction; text safe to show."""

import html
import importlib
import re
from pathlib import Path
from typing import Any

MAX_MESSAGE = 2000
"""Largest length of an error message in characters."""


def printable(text: str) -> str:
    """Escape characters that a terminal would obey, and those that stand for bytes of a file name that is not UTF-8."""
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        for character in text
    )


def markdown_text(text: object) -> str:
    """Escape what Markdown reads as HTML, links, code and cells of a table; on one line."""
    escaped = html.escape(" ".join(str(text).split()), quote=False)
    return re.sub(r"[\\`\[\]|]", r"\\\g<0>", printable(escaped))


def render_text(template: Path, **values: object) -> str:
    """Fill in a template of jinja2 that is plain text or Markdown, in which the filter ``text`` is `markdown_text`."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False)  # noqa: S701
    environment.filters["text"] = markdown_text
    return environment.from_string(template.read_text(encoding="utf-8")).render(values)


class OverflyError(Exception):
    """Base of all errors that a user can act on. The command line prints its message and exits with status 2.

    The message is on one line, without control characters; the middle of a long one is left out.
    """

    def __init__(self, message: str) -> None:
        message = printable(re.sub(r"\s*\n\s*", " ", message))
        if len(message) > MAX_MESSAGE:
            message = f"{message[: MAX_MESSAGE // 2]} […] {message[-MAX_MESSAGE // 3 :]}"
        super().__init__(message)


class RecipeError(OverflyError):
    """A recipe, or a setting of one, that is invalid or cannot be trained."""


class DataError(OverflyError):
    """A file or folder of imagery that is missing, damaged, or of an unexpected format."""


class WeightsError(OverflyError):
    """A file of weights that is missing, damaged, or made for another network."""


class RunError(OverflyError):
    """A run folder that is missing, incomplete, or belongs to another recipe."""


class DownloadError(OverflyError):
    """A download that failed or does not match its checksum."""


class TrainingError(OverflyError):
    """Training that cannot go on, such as a loss that is not finite."""


class NotFiniteError(OverflyError):
    """A network whose scores are not finite."""


class MissingExtraError(OverflyError):
    """An optional dependency that is not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs the package {package}; install it with: pip install 'overfly[{extra}]'")


def import_extra(package: str, extra: str, purpose: str) -> Any:
    """Import an optional package; raise `MissingExtraError` with its extra and purpose if it is not installed."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise MissingExtraError(package, extra, purpose) from None
