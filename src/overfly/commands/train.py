"""The command ``train``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from overfly.commands.arguments import PathLike, RecipeLike, image_cache
from overfly.core.choices import Cache

if TYPE_CHECKING:
    from overfly.training.run import Run


@dataclass(frozen=True)
class TrainResult:
    """A trained run."""

    path: Path

    @property
    def run(self) -> Run:
        """The run's folder as an object."""
        from overfly.training.run import Run

        return Run.open(self.path)

    def __rich_console__(self, *_: object) -> Iterator[str]:
        yield f"trained: {self.path}"
        yield f"score it with: overfly evaluate {self.path}"


def train(
    recipe: RecipeLike, *overrides: str, out: PathLike = Path("runs"), device: str = "auto", devices: int = 1,
    workers: int = 0, checkpoint_every: int = 200, log_every: int = 10, cache: Cache = "memory",
    tensorboard: bool = False, quiet: bool = False,
) -> TrainResult:  # fmt: skip
    """Train a network by a recipe, or resume an unfinished run.

    Args:
        recipe: a recipe file, or the folder of a run.
        overrides: settings to change, such as optim.lr=0.005 or source.root=/data/loveda.
        out: folder in which the run's own folder is made.
        device: auto, cpu, cuda, cuda:1 or mps.
        devices: number of devices, one process each.
        workers: processes that load images, for each device; 0: images are loaded between the steps.
        checkpoint_every: steps between two checkpoints; an unfinished run resumes from the last.
        log_every: steps that one line of log.jsonl averages.
        cache: where decoded images are cached: memory, disk or off.
        tensorboard: write TensorBoard curves too (extra: tensorboard).
        quiet: print no progress.

    Returns:
        The run's folder.
    """
    from overfly.core.progress import print_status

    name = recipe if isinstance(recipe, Path | str) else "the recipe"
    print_status(f"loading {name}", quiet=quiet or os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) != "0")
    from overfly.recipe import load

    if isinstance(recipe, Path | str) and (Path(recipe) / "recipe.yaml").is_file() and not overrides:
        out = Path(recipe)
    value = load(recipe, *overrides)  # before the slow imports, so that an invalid setting is reported early
    from overfly.training.engine import TrainerConfig, launch_fabric
    from overfly.training.train_recipe import train_recipe

    config = TrainerConfig(
        device, devices, workers, checkpoint_every, log_every, image_cache(cache), tensorboard=tensorboard, quiet=quiet
    )
    return TrainResult(train_recipe(value, Path(out), launch_fabric(value, config), config).path)
