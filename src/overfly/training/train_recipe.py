"""Train a recipe to a finished run, its ``start`` recipe first; finished runs are not trained again."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from overfly.core.atomic_files import file_sha256
from overfly.core.errors import RecipeError
from overfly.core.progress import print_status
from overfly.recipe import Recipe
from overfly.training.engine import Arithmetic, TrainerConfig, choose_arithmetic, recipe_fabric, run_on_rank_zero
from overfly.training.evaluate import training_files_sha256
from overfly.training.run import Run
from overfly.training.setup import prepare_training
from overfly.training.trainer import Trainer

if TYPE_CHECKING:
    from lightning_fabric import Fabric


def train_recipe(recipe: Recipe, out: Path, fabric: "Fabric", config: TrainerConfig) -> Run:
    """Train a recipe below ``out``, resume its unfinished run, or return its finished run.

    Raises `OverflyError`: recipe, data or weights do not fit together; no folder is created in that case, and
    `TrainingError`: a loss or a weight is not finite; the last checkpoint is kept.
    """
    quiet = config.quiet or not fabric.is_global_zero
    start: Path | None = None
    if isinstance(recipe.start, Recipe):
        parent = out.parent if (out / "recipe.yaml").is_file() else out
        start_run = Run.find(parent, recipe.start)
        trained = start_run is not None and start_run.finished
        if not trained:
            print_status("training the recipe under start first; its settings are start.steps and so on", quiet=quiet)
        start = train_recipe(recipe.start, parent, fabric, replace(config, quiet=config.quiet or trained)).weights
    elif recipe.start is not None:
        start = resolve_start(recipe.start)
    digest = run_on_rank_zero(fabric, lambda: None if start is None else file_sha256(start))
    files = run_on_rank_zero(fabric, lambda: training_files_sha256(recipe))
    finished, begun, changed = run_on_rank_zero(fabric, lambda: _existing_runs(out, recipe, digest, files))
    if changed is not None and fabric.is_global_zero:
        print_status(f"{changed}: its images or masks have changed since; the recipe is trained again")
    if finished is not None:
        print_status(f"{finished.name}: already trained", quiet=quiet)
        return Run(finished)
    device, processes = fabric.device, fabric.world_size
    arithmetic = begun or run_on_rank_zero(
        fabric, lambda: choose_arithmetic(recipe, device, processes, start=start, quiet=quiet)
    )
    fabric = recipe_fabric(recipe, fabric, config, arithmetic)
    setup = prepare_training(recipe, fabric, config, start)
    run = Run(run_on_rank_zero(fabric, lambda: Run.open_or_create(out, recipe, digest, files).path))
    with run.lock() if fabric.is_global_zero else nullcontext():
        trainer = Trainer(run, fabric, config, setup, arithmetic)
        trainer.resume()
        trainer.train()
        trainer.finish()
    return run


def _existing_runs(
    out: Path, recipe: Recipe, start_sha256: str | None, files_sha256: str | None
) -> tuple[Path | None, Arithmetic | None, str | None]:
    """Return the finished run of a recipe, weights and files in or below a folder, the arithmetic of one begun.

    Third, the name of the newest run whose files have changed if there is none.
    """
    found = [Run.open(out)] if (out / "recipe.yaml").is_file() else list(Run.find_all(out, recipe))
    runs = [run for run in found if run.recipe == recipe and run.fits(start_sha256, files_sha256)]
    changed = next((run.path.name for run in found if not runs and run.fits(start_sha256, None)), None)
    finished = next((run.path for run in runs if run.finished), None)
    machine = runs[0].machine if runs else {}
    if "precision" not in machine:
        return finished, None, changed
    arithmetic = Arithmetic(machine["precision"], machine.get("channels_last", recipe.precision != "32"))
    return finished, arithmetic, changed


def resolve_start(start: Path) -> Path:
    """Return the weights file of ``start``, a file or a run; raise `RecipeError` if it is missing or unfinished."""
    if start.is_dir():
        run = Run.open(start)
        if not run.finished:
            raise RecipeError(f"start: {start} has no trained network yet; finish it with `overfly train {start}`")
        return run.weights
    if not start.is_file():
        raise RecipeError(f"start: {start} does not exist; give a run folder, a .safetensors file or a recipe")
    return start
