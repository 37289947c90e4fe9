"""Real-time semantic segmentation of aerial imagery, trained on one domain and adapted to another without labels."""

from importlib import import_module
from typing import TYPE_CHECKING

from overfly.commands import MODULES as COMMANDS

__version__ = "0.1.0"

if TYPE_CHECKING:
    from overfly.commands.adapt import adapt
    from overfly.commands.benchmark import benchmark
    from overfly.commands.data import data_check, data_fetch, data_stats, data_synthesize
    from overfly.commands.evaluate import evaluate
    from overfly.commands.export import export, hub_load, hub_push
    from overfly.commands.list import list_kinds
    from overfly.commands.predict import predict
    from overfly.commands.rank import rank
    from overfly.commands.report import report
    from overfly.commands.serve import serve
    from overfly.commands.speed import speed
    from overfly.commands.train import train
    from overfly.commands.watch import watch
    from overfly.core.classes import Classes
    from overfly.core.errors import OverflyError
    from overfly.data.domain import Domain
    from overfly.methods.method import Method
    from overfly.models.network import build
    from overfly.models.segmenter import Segmenter
    from overfly.models.weights import load_weights
    from overfly.recipe import Recipe, load
    from overfly.training.run import Run

__all__ = [
    "Classes", "Domain", "Method", "OverflyError", "Recipe", "Run", "Segmenter", "adapt", "benchmark", "build",
    "data_check", "data_fetch", "data_stats", "data_synthesize", "evaluate", "export", "hub_load", "hub_push",
    "list_kinds", "load", "load_weights", "predict", "rank", "report", "serve", "speed", "train", "watch",
]  # fmt: skip

MODULES = {
    "Classes": "core.classes",
    "Domain": "data.domain",
    "Method": "methods.method",
    "OverflyError": "core.errors",
    "Recipe": "recipe",
    "Run": "training.run",
    "Segmenter": "models.segmenter",
    "build": "models.network",
    "load": "recipe",
    "load_weights": "models.weights",
} | {name: f"commands.{module}" for name, module in COMMANDS.items()}
"""Module of each public name."""


def __getattr__(name: str) -> object:
    """Import a public name on first access, so that ``import overfly`` needs no PyTorch."""
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f"{__name__}.{MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
