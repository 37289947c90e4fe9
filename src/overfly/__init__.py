"""Segmentation of aerial imagery in real time, in the place you have labels for and in the place you do not."""

__version__ = "0.1.0"

from overfly.api import adapt, benchmark, evaluate, export, predict, report, serve, speed, train, validate, watch
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
    "report",
    "serve",
    "speed",
    "train",
    "validate",
    "watch",
]
