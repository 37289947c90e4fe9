"""Fixtures of several tests: recipes of a few steps on the synthetic world."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from miniatures import WRITERS
from overfly import adapt, suggest
from overfly.adaptation import pipeline
from overfly.commands.train import AdaptResult
from overfly.core.errors import WeightsError
from overfly.methods.method import Method
from overfly.models import PRETRAINED, LoadReport, Network, load_weights
from overfly.recipe import Recipe, load
from overfly.training import setup
from overfly.training.setup import initial_network
from tiles import TILE, recipe_for, write_targets

REPOSITORY = Path(__file__).parents[1]
SHARED = REPOSITORY.parent / "shared" / "data"


def pytest_configure() -> None:
    """Handle Ctrl-C also in a background job of a shell, whose child processes would ignore it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """Register the small network after tests were made for each network of the package."""
    import small_network  # noqa: F401


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Use one thread and one seed, so that results depend neither on the number of cores nor on earlier tests."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _offline() -> Iterator[None]:
    """Let named weights be random, and HTTPS requests fail at once, also in child processes."""

    def load_file(network: Network, path: Path | str, *, sha256: str | None = None) -> LoadReport:
        if str(path) in PRETRAINED:
            raise WeightsError(f"{path} is not loaded in tests")
        return load_weights(network, path, sha256=sha256)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
        patch.setattr(setup, "load_weights", load_file)
        yield


@pytest.fixture(autouse=True)
def _cache_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use a temporary cache folder instead of the user's."""
    monkeypatch.setenv("OVERFLY_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def small() -> dict[str, Any]:
    """A recipe of a few steps on the synthetic world, as a mapping."""
    return {
        "source": {"name": "synthetic", "scene": "urban", "size": 64, "train": 4, "val": 2, "test": 2},
        "target": {"name": "synthetic", "scene": "rural", "size": 64, "train": 4, "val": 2, "test": 2},
        "model": "small_network",
        "optim": {"name": "sgd", "lr": 0.01},
        "crop": 64,
        "batch": 2,
        "steps": 3,
    }


@pytest.fixture
def recipe(small: dict[str, Any]) -> Recipe:
    return Recipe.model_validate(small)


@pytest.fixture
def recipe_of(small: dict[str, Any], tmp_path: Path) -> Callable[..., Recipe]:
    """Make a small recipe of a method, with the start or teacher that it needs."""

    def teacher() -> dict[str, Any]:
        return {"teacher": str(initial_network(load(small))[0].save(tmp_path / "teacher.safetensors"))}

    special: dict[str, Callable[[], dict[str, Any]]] = {
        "average_weights": lambda: {"runs": [teacher()["teacher"]]},
        "daformer": lambda: {"warmup": 1},
        "distill": teacher,
        "large_teacher": teacher,
        "source_free": lambda: {"statistics": "batch"},  # running statistics after three steps are too inaccurate
    }

    def make(name: str, **changes: Any) -> Recipe:
        method = {"name": name, **special.get(name, dict)()}
        start = {"start": small} if Method.kinds[name].needs_start else {}
        return load({**small, **start, "method": method, **changes})

    return make


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Target images that can be cut into tiles."""
    return write_targets(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def compared(world: Path) -> AdaptResult:
    """A comparison on them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "RECALIBRATION", {"batch": 4, "steps": 4})
        return adapt(recipe_for(world), out=world / "runs", device="cpu", quiet=True)


@pytest.fixture
def labels(compared: AdaptResult, tmp_path: Path) -> Path:
    """A suggestion of three tiles."""
    return suggest([compared.path], count=3, tile=TILE, out=tmp_path / "labels", device="cpu", quiet=True).path


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of miniatures of the public data sets, one for each name."""
    folder = tmp_path_factory.mktemp("datasets")
    for name, write in WRITERS.items():
        write(folder / name)
    return folder
