from .commands.data import data_check, data_fetch, data_list, data_stats, data_synthesize, list_kinds
from .commands.evaluate import evaluate, speed
from .commands.export import export, hub_load, hub_push
from .commands.predict import predict
from .commands.rank import rank, suggest
from .commands.serve import serve
from .commands.train import adapt, benchmark, report, train
from .commands.watch import watch
from .core.classes import Classes
from .core.errors import OverflyError
from .data.domain import Domain
from .methods.method import Method
from .models.network import build
from .models.segmenter import Segmenter
from .models.weights import load_weights
from .recipe import Recipe, load
from .training.run import Run

__all__ = [
    "Classes", "Domain", "Method", "OverflyError", "Recipe", "Run", "Segmenter", "adapt", "benchmark", "build",
    "data_check", "data_fetch", "data_list", "data_stats", "data_synthesize", "evaluate", "export", "hub_load",
    "hub_push", "list_kinds", "load", "load_weights", "predict", "rank", "report", "serve", "speed", "suggest", "train",
    "watch",
]  # fmt: skip

__version__: str
