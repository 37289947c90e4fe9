"""From a recipe to a finished run: what it starts from first, then itself, each once."""

from __future__ import annotations

import sys
from pathlib import Path

from lightning_fabric import Fabric

from overfly.core.errors import RecipeError
from overfly.recipe import Recipe
from overfly.training.fit import Engine, fit, prepare
from overfly.training.run import Run


def carry_out(recipe: Recipe, out: Path, fabric: Fabric, engine: Engine) -> Run:
    """Train a recipe below ``out``: begun runs go on, finished ones are not trained again.

    Args:
        recipe: the experiment. Where it starts from another recipe, that one is carried out first.
        out: folder of runs, or the run's own.
        fabric: launched.
        engine: how, not what.

    Raises:
        OverflyError: recipe, data or weights do not go together; no folder is left behind for what never began.
    """
    start: Path | None = None
    if isinstance(recipe.start, Recipe):
        parent = out.parent if (out / "recipe.yaml").is_file() else out
        start = carry_out(recipe.start, parent, fabric, engine).weights
    elif recipe.start is not None:
        start = weights_of(recipe.start)
    done = Run.find(out, recipe)
    if done is not None and done.finished:
        if fabric.is_global_zero and not engine.quiet:
            print(f"{done.path.name}: trained already", file=sys.stderr, flush=True)
        return done
    prepared = prepare(recipe, fabric, engine, start)
    path = Run.place(out, recipe).path if fabric.is_global_zero else None
    run = Run(Path(fabric.broadcast(str(path))))
    if not fabric.is_global_zero:
        return fit(run, prepared, fabric, engine)
    with run.locked():
        return fit(run, prepared, fabric, engine)


def weights_of(start: Path) -> Path:
    """The weights file that a path means: itself, or the network of a run folder.

    Raises:
        RecipeError: there is no such file.
    """
    if start.is_dir():
        run = Run.open(start)
        if not run.weights.exists():
            raise RecipeError(f"start: {start} has no trained network yet; finish it with `overfly train {start}`")
        return run.weights
    if not start.is_file():
        raise RecipeError(f"start: {start} is not there; give a run folder, a .safetensors file or a recipe")
    return start
