"""Segmentation of aerial imagery in real time, in the place you have labels for and in the place you do not."""

__version__ = "0.1.0"

TYPE_CHECKING = False  # the one of typing takes milliseconds, in which Ctrl-C would be a traceback
if TYPE_CHECKING:
    from overfly.commands.api import (
        adapt,
        benchmark,
        evaluate,
        export,
        predict,
        rank,
        report,
        serve,
        speed,
        train,
        watch,
    )
    from overfly.core.classes import Classes
    from overfly.core.errors import OverflyError
    from overfly.data.domain import Domain
    from overfly.methods.method import Method
    from overfly.models.registry import build
    from overfly.models.segmenter import Segmenter
    from overfly.models.weights import load_weights
    from overfly.recipe import Recipe, load
    from overfly.training.run import Run

__all__ = [
    "Classes",
    "Domain",
    "Method",
    "OverflyError",
    "Recipe",
    "Run",
    "Segmenter",
    "adapt",
    "benchmark",
    "build",
    "evaluate",
    "export",
    "load",
    "load_weights",
    "predict",
    "rank",
    "report",
    "serve",
    "speed",
    "train",
    "watch",
]

PLACES = {
    "Classes": "core.classes",
    "Domain": "data.domain",
    "Method": "methods.method",
    "OverflyError": "core.errors",
    "Recipe": "recipe",
    "Run": "training.run",
    "Segmenter": "models.segmenter",
    "build": "models.registry",
    "load": "recipe",
    "load_weights": "models.weights",
}
"""Modules of the public names; those that are not here are the API's."""


def __getattr__(name: str) -> object:
    """A public name, imported when it is first asked for: the command line says its help before PyTorch is there."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    found: object = getattr(import_module(f"{__name__}.{PLACES.get(name, 'commands.api')}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
