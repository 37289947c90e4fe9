"""Errors that a user can act on. Each message has the problem, its location and the correction."""

from __future__ import annotations

import importlib
from typing import Any


class OverflyError(Exception):
    """Base of all errors that a user can act on. The command line prints its message and exits with status 2."""


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
