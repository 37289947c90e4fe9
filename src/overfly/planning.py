"""Plan a benchmark: what would be trained, what is missing on disk, and about how long it takes."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from overfly.core.classes import Classes
from overfly.core.errors import DataError, OverflyError
from overfly.core.records import Item, UInt8
from overfly.core.spec import NonNegativeInt, Spec
from overfly.data.domain import Domain, Split, SplitError
from overfly.recipe import Recipe, load
from overfly.training.run import Run


class PlannedTraining(Spec):
    """The trainings of a recipe, one for each seed."""

    name: str
    """Name of the recipe file; "start of" it for the recipe under its ``start``."""
    runs: NonNegativeInt
    """Number of runs that are not finished yet."""
    done: NonNegativeInt
    """Number of finished runs."""
    steps: int | None
    """Steps of a run; none if they depend on images that are missing."""
    seconds: float | None
    """Estimated duration of the runs, from steps on generated images; none if unknown."""
    missing: tuple[str, ...] = ()
    """Missing data and weights, and where to get them."""

    def __str__(self) -> str:
        """Number of runs, steps and duration."""
        length = "steps that depend on the images" if self.steps is None else f"{self.steps} steps"
        hours = "duration unknown" if self.seconds is None else f"about {self.seconds / 3600:.1f} h"
        left = f"{self.runs} runs of {length}, {hours}" if self.runs else "nothing to train"
        return f"{self.name}: {left}" + (f" ({self.done} finished)" if self.done else "")


def plan_benchmark(
    recipes: Sequence[Path], overrides: Sequence[str], seeds: Sequence[int], *, out: Path, split: Split,
    time_step: Callable[[Recipe], float],
) -> list[PlannedTraining]:  # fmt: skip
    """Plan the trainings of a benchmark, each once; ``time_step`` measures the seconds of a step."""
    planned: dict[str, list[Recipe]] = {}
    for path, seed in product(recipes, seeds):
        recipe: Recipe | Path | None = load(path, *overrides, f"seed={seed}")
        name = path.stem
        while isinstance(recipe, Recipe):
            if not any(recipe in others for others in planned.values()):
                planned.setdefault(name, []).append(recipe)
            recipe, name = recipe.start, f"start of {name}"
    times: dict[str, float | None] = {}
    plans = []
    for name, versions in planned.items():
        first, images = versions[0], 0
        with suppress(DataError):
            images = len(first.source.items("train")) if first.epochs and first.source else 0
        steps = None if first.epochs and not images else first.length(images)
        left = sum(not any(run.finished for run in Run.find_all(out, version)) for version in versions)
        seconds = _time(first, times, time_step) if left and steps else None
        total = None if seconds is None or steps is None else seconds * steps * first.accumulate * left
        missing = tuple(dict.fromkeys(_missing(first, split)))
        done = len(versions) - left
        plans.append(PlannedTraining(name=name, runs=left, done=done, steps=steps, seconds=total, missing=missing))
    return plans


def _missing(recipe: Recipe, split: Split) -> Iterator[str]:
    """Yield what a recipe lacks: images and masks, and files of weights."""
    for domain, trains in ((recipe.source, recipe.method.needs_source), (recipe.target, recipe.method.needs_target)):
        for part in ("train" if trains else split, split):
            try:
                if domain is not None:
                    domain.items(part)
            except DataError as error:
                if part in ("train", *getattr(domain, "splits", ())) or not isinstance(error, SplitError):
                    yield str(error)
                break
    weights = recipe.model.weights or ""
    if isinstance(recipe.start, Path) and not recipe.start.exists():
        yield f"start {recipe.start} does not exist"
    if recipe.start is None and Path(weights).suffix and ":" not in weights and not Path(weights).is_file():
        yield f"weights {weights} do not exist"


def _time(recipe: Recipe, times: dict[str, float | None], time_step: Callable[[Recipe], float]) -> float | None:
    """Seconds of a step on generated images, from random weights; None if a file of the method is missing.

    Recipes that differ in their data alone are timed once: the number of classes changes little.
    """
    update: dict[str, Any] = {"start": None, "labels": None, "seed": 0, "steps": 1, "epochs": None}
    update["model"] = recipe.model.model_copy(update={"weights": None})
    for role, domain in (("source", recipe.source), ("target", recipe.target)):
        if domain is not None:
            side = recipe.resize or recipe.crop
            update[role] = _Noise(classes=domain.classes, bands=domain.bands, max_value=domain.max_value, side=side)
    generated = recipe.model_copy(update=update)
    key = generated.model_dump_json(exclude={"source", "target"})
    if key not in times:
        times[key] = None
        with suppress(OverflyError):
            times[key] = time_step(generated)
    return times[key]


class _Noise(Domain):
    """Images of noise."""

    name: ClassVar[str] = "noise"
    classes: Classes
    bands: int
    max_value: float
    side: int

    def items(self, split: Split) -> Sequence[Item]:
        """Sixteen images in each split."""
        del split
        label = partial(_noise, (self.side, self.side), len(self.classes))
        shape = (self.side, self.side, self.bands)
        return [Item(str(seed), partial(_noise, shape, 255, seed), label) for seed in range(16)]


def _noise(shape: tuple[int, ...], end: int, seed: int = 0) -> UInt8:
    return np.random.default_rng(seed).integers(0, end, shape, np.uint8)
