"""From a recipe to a finished run: what it starts from first, then itself, each once."""

from __future__ import annotations

import sys
from pathlib import Path

from lightning_fabric import Fabric

from overfly.core.errors import RecipeError
from overfly.recipe import Recipe
from overfly.training.engine import Engine, fabric_of, on_main
from overfly.training.run import Run
from overfly.training.trainer import fit, prepare


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
        if fabric.is_global_zero and not engine.quiet and _done(parent, recipe.start) is None:
            print("first the recipe that this starts from, as start.steps=… and the like change it", file=sys.stderr)
        start = carry_out(recipe.start, parent, fabric, engine).weights
    elif recipe.start is not None:
        start = weights_of(recipe.start)
    done = on_main(fabric, lambda: _done(out, recipe))
    if done is not None:
        if fabric.is_global_zero and not engine.quiet:
            print(f"{done.name}: trained already", file=sys.stderr, flush=True)
        return Run(done)
    fabric = fabric_of(recipe, fabric, engine)
    prepared = prepare(recipe, fabric, engine, start)
    run = Run(on_main(fabric, lambda: Run.place(out, recipe).path))
    if not fabric.is_global_zero:
        return fit(run, prepared, fabric, engine)
    with run.locked():
        return fit(run, prepared, fabric, engine)


def _done(out: Path, recipe: Recipe) -> Path | None:
    """The finished run of a recipe in or below a folder, or None."""
    run = Run(out) if (out / "recipe.yaml").is_file() else Run.find(out, recipe)
    return run.path if run is not None and run.finished and run.recipe == recipe else None


def weights_of(start: Path) -> Path:
    """The weights file that a path means: itself, or the network of a run folder.

    Raises:
        RecipeError: there is no such file.
    """
    if start.is_dir():
        run = Run.open(start)
        if not run.finished:
            raise RecipeError(f"start: {start} has no trained network yet; finish it with `overfly train {start}`")
        return run.weights
    if not start.is_file():
        raise RecipeError(f"start: {start} is not there; give a run folder, a .safetensors file or a recipe")
    return start
