"""The commands ``train``, ``benchmark``, ``report`` and ``adapt``."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from overfly.commands import arguments
from overfly.commands.arguments import MAX_SIDE, AddressLike, PathLike, PathLikes, RecipeLike, image_cache
from overfly.core.choices import Cache, Split
from overfly.core.errors import OverflyError, RecipeError, render_text

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

    from overfly.adaptation.inputs import ImageInputs
    from overfly.adaptation.selection import Selection
    from overfly.benchmarking import BenchmarkTable, PlannedTraining
    from overfly.recipe import Recipe
    from overfly.training.engine import TrainerConfig
    from overfly.training.run import Run

NOT_ADAPTED = 3
"""Exit status if the network before adaptation is recommended although an adapted one is required."""
SHOWN = ("consistency", "own source mIoU", "score", "better", "estimate", "decision")
"""Columns of the table on the terminal; ``selection.md`` holds all."""


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
        workers: processes that load images, for each device; 0: a thread loads them ahead of the steps.
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


@dataclass(frozen=True)
class BenchmarkResult:
    """A benchmark's table; of a dry run, its plan and a table without rows."""

    table: BenchmarkTable
    folder: Path
    plan: Sequence[PlannedTraining] = ()

    @property
    def exit_status(self) -> int:
        """1 if data or weights of a plan are missing."""
        return int(any(training.missing for training in self.plan))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.markdown import Markdown

        if self.plan:
            yield render_text(Path(__file__).with_name("plan.txt.jinja"), plan=self.plan)
            return
        yield Markdown(self.table.markdown()) if console.is_terminal else self.table.markdown()
        yield f"written: {self.folder / 'table.md'}, {self.folder / 'table.json'}"


def benchmark(
    recipes: PathLikes, *, seeds: str = "3", out: PathLike = Path("runs"), table: PathLike | None = None,
    split: Split = "val", size: int = 512, device: str = "auto", devices: int = 1, workers: int = 0,
    cache: Cache = "memory", checkpoint_every: int = 200, quiet: bool = False, dry_run: bool = False,
) -> BenchmarkResult:  # fmt: skip
    """Train recipes with several seeds, score them on both domains and write one table.

    Finished runs and scores are reused; unfinished runs resume.

    Args:
        recipes: recipe files, folders of them, and settings to change in all of them, such as source.root=/data/loveda.
        seeds: how many, from 0; or which, such as 0,1,5.
        out: folder of the runs.
        table: folder for table.md and table.json; default: that of the runs.
        split: the split to score.
        size: side of the image, in pixels, for the networks' size and speed.
        device: auto, cpu, cuda, cuda:1 or mps.
        devices: number of devices, one process each.
        workers: processes that load images.
        cache: where decoded images are cached: memory, disk or off.
        checkpoint_every: steps between two checkpoints.
        quiet: print no progress.
        dry_run: train nothing; list the trainings, their duration and missing data, which gives exit status 1.

    Returns:
        The table.
    """
    from overfly import benchmarking
    from overfly.adaptation.auto_recipe import time_step
    from overfly.benchmarking import plan_benchmark
    from overfly.recipe import load
    from overfly.reporting.samples import draw_samples
    from overfly.training.engine import TrainerConfig, launch_fabric, run_on_rank_zero

    overrides = [str(entry) for entry in recipes if arguments.is_setting(entry)]
    files = benchmarking.expand_recipe_paths([entry for entry in recipes if not arguments.is_setting(entry)])
    if not files:
        raise RecipeError("benchmark needs at least one recipe; give YAML files or a folder of them")
    numbers = arguments.parse_seeds(seeds)
    arguments.check_bounds({"size": (size, 8, MAX_SIDE)})
    out = Path(out)
    folder = Path(table or out)
    for path in (out, folder):
        if path.exists() and not path.is_dir():
            raise RecipeError(f"{path} is a file; give --out and --table a folder")
    config = TrainerConfig(device, devices, workers, checkpoint_every, cache=image_cache(cache), quiet=quiet)
    fabric = launch_fabric(load(files[0], *overrides), config)
    if dry_run:
        timed = partial(time_step, fabric=fabric)
        plan = plan_benchmark(files, overrides, numbers, out=out, split=split, time_step=timed)
        return BenchmarkResult(benchmarking.BenchmarkTable(seeds=tuple(numbers)), folder, plan)
    done = benchmarking.run_benchmark(
        files, overrides, numbers, out=out, fabric=fabric, config=config, split=split, save_samples=draw_samples
    )
    result = run_on_rank_zero(
        fabric,
        lambda: benchmarking.tabulate(done, numbers, split, size=size, device=str(fabric.device), changed=overrides),
    )
    run_on_rank_zero(fabric, lambda: benchmarking.write(result, folder))
    return BenchmarkResult(result, folder)


@dataclass(frozen=True)
class ReportResult:
    """A written report."""

    path: Path
    recipes: int
    labels_opened: int

    def __rich_console__(self, *_: object) -> Iterator[str]:
        yield f"labels opened for the sample images: {self.labels_opened}"
        yield f"written: {self.path} ({self.recipes} recipes, {self.path.stat().st_size / 1e6:.1f} MB)"


def report(
    runs: PathLikes, *, out: PathLike = Path("report.html"), title: str = "overfly report", split: Split | None = None,
    labels: bool = True, images: int = 40, speed: bool = True, size: int = 512, own_colors: bool = False,
    device: str = "auto",
) -> ReportResult:  # fmt: skip
    """Write a report of runs as one HTML file.

    It shows the table, gap closed, IoU of each class, the selection, sample images, confusion matrices, training curves
    and speed. The file is self-contained and loads nothing from the network.

    Args:
        runs: run folders, or folders of them; runs that differ in their seed alone become one row.
        out: the file to write.
        title: heading of the page.
        split: the split whose scores are shown; default: the one that most of the runs were scored on.
        labels: open the labels of val to choose the worst and best images; scores.json of each run counts them.
        images: number of images of val to choose from, evenly sampled; 0: no sample images.
        speed: measure the speed of the networks on this machine.
        size: side in pixels of the image that speed is measured with.
        own_colors: show the classes' own colors instead of colors that the color-blind can tell apart.
        device: auto, cpu, cuda, cuda:1 or mps.

    Returns:
        The file, and the labels opened for it.
    """
    from overfly.core.atomic_files import write_text
    from overfly.core.device import select_device
    from overfly.core.download import disk_errors
    from overfly.reporting.report import collect_report, render

    arguments.check_bounds({"images": (images, 0, 10**6), "size": (size, 8, MAX_SIDE)})
    out = Path(out)
    if out.is_dir() or not out.parent.is_dir():
        raise RecipeError(f"--out {out} must be a file in an existing folder")
    if out.suffix.lower() not in (".html", ".htm"):
        raise RecipeError(f"--out {out} must end in .html; use {out.with_suffix('.html').name}")
    result = collect_report(
        runs, title=title, split=split, labels=labels, limit=images, speed=speed, size=size,
        device=select_device(device), own_colors=own_colors,
    )  # fmt: skip
    with disk_errors(out, OverflyError):
        write_text(out, render(result))
    return ReportResult(out, len(result.entries), sum(samples.labels_opened for samples in result.galleries))


@dataclass(frozen=True)
class AdaptResult:
    """A comparison of the networks before and after adaptation, and the recommended one.

    Attributes:
        path: the comparison folder.
        selection: all candidates and the recommendation.
        exit_status: 3 if source only is recommended although an adapted network is required.
    """

    path: Path
    selection: Selection
    exit_status: int = 0

    @property
    def recommended(self) -> Path:
        """File of the recommended network."""
        return self.path / "recommended.safetensors"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.table import Table

        from overfly.adaptation.selection import COLUMNS
        from overfly.core.progress import percent

        table = Table(title="candidates, in percent", title_justify="left", box=None, pad_edge=False)
        rows = self.selection.rows()[:-1]  # without the bounds: reasons name those that a candidate fails
        shown = [COLUMNS.index(name) for name in SHOWN]
        filled = [number for number in shown if any(row[number + 1] != percent(None) for row in rows)]
        for name in ("candidate", *(COLUMNS[number] for number in filled)):
            table.add_column(name, justify="left" if name in ("candidate", "decision") else "right", no_wrap=True)
        for row in rows:
            table.add_row(row[0], *(row[number + 1] for number in filled))
        yield table
        yield from self.selection.reasons
        yield from self.selection.differences
        yield from self.selection.tile_lines
        yield f"target labels opened: {self.selection.labels_opened}"
        yield self.selection.summary
        if self.selection.unsure:
            yield f"{self.selection.unsure}: overfly suggest {self.path} --count 5, then this command with --labels"
        yield f"comparison: {self.path}"
        yield f"predict with: overfly predict {self.path} IMAGE"


def adapt(
    recipe: RecipeLike | None = None, *overrides: RecipeLike, source_images: AddressLike | None = None,
    source_masks: PathLike | None = None, source_labels: AddressLike | None = None, attribute: str | None = None,
    target_images: AddressLike | None = None, classes: PathLike | None = None, checkpoint: PathLike | None = None,
    labels: PathLike | None = None, budget: str | None = None, estimate: bool = False,
    gate: list[str] | None = None, require_adapted: bool = False, out: PathLike = Path("runs"), device: str = "auto",
    devices: int = 1, workers: int = 0, checkpoint_every: int = 200, cache: Cache = "memory", quiet: bool = False,
) -> AdaptResult:  # fmt: skip
    """Adapt to images without labels, and recommend the adapted network or the one before adaptation.

    Candidates are compared without target labels: source only, the same with batch-normalization statistics of the
    target, networks trained further from the best of these, and their average. Give a recipe, or several with the same
    start; or image folders or rasters, the source with masks or polygons and the target without; or a trained network
    (--checkpoint) and the target.

    Args:
        recipe: a recipe file whose method adapts.
        overrides: more recipe files, and settings to change in all, such as method.ema=0.999.
        source_images: folder or pattern of the labeled images; or a raster of any size, a file or an address.
        source_masks: folder or pattern of their masks.
        source_labels: labels of rasters: a vector file of polygons, or a raster.
        attribute: attribute of the polygons that holds the class.
        target_images: folder or pattern of the images to adapt to; or a raster of any size, a file or an address.
        classes: YAML file of the classes: names, or names and their colors; or settings of a folder or raster domain.
            Not needed for polygons with an attribute, each value of which is a class then.
        checkpoint: run, comparison or weights file to adapt, without its source's images.
        labels: folder of a few labeled target tiles, as `overfly suggest` writes it; they decide and are learned from.
        budget: time for folders or rasters, such as 90s, 10min or 2h; default 30m. The same command again resumes.
        estimate: estimate each candidate's mIoU on the target too, with an interval; takes several times as long.
        gate: a bound of the checks; may be repeated: --gate max_source_loss=0.1 --gate min_classes=0.8
        require_adapted: exit with status 3 if the network before adaptation is recommended.
        out: folder of the runs.
        device: auto, cpu, cuda, cuda:1 or mps.
        devices: number of devices, one process each.
        workers: processes that load images, for each device.
        checkpoint_every: steps between two checkpoints.
        cache: where decoded images are cached: memory, disk or off.
        quiet: print no progress.

    Returns:
        The comparison folder and its selection.
    """
    from overfly.adaptation.gate import read_gate
    from overfly.adaptation.inputs import ImageInputs
    from overfly.adaptation.pipeline import adapt as adapt_recipes
    from overfly.adaptation.selection import BASELINE
    from overfly.training.engine import TrainerConfig, launch_fabric

    config = TrainerConfig(device, devices, workers, checkpoint_every, cache=image_cache(cache), quiet=quiet)
    bounds = read_gate(gate or ())
    paths = (None if value is None else Path(value) for value in (source_masks, classes, checkpoint, labels))
    masks, file, start, tiles = paths
    inputs = ImageInputs(source_images, masks, target_images, file, start, source_labels, attribute)
    values = _recipes([*([] if recipe is None else [recipe]), *overrides], inputs, budget, config, Path(out))
    fabric = launch_fabric(values[0], config)
    comparison = adapt_recipes(
        *values, out=Path(out), fabric=fabric, config=config, estimates=estimate, gate=bounds, labels=tiles
    )
    missing = require_adapted and comparison.selection.recommended == BASELINE
    return AdaptResult(comparison.path, comparison.selection, NOT_ADAPTED if missing else 0)


def _recipes(
    entries: list[RecipeLike], inputs: ImageInputs, budget: str | None, config: TrainerConfig, out: Path
) -> list[Recipe]:
    """Read the given recipes, or propose some for the given images."""
    from overfly.adaptation.auto_recipe import folder_recipes
    from overfly.recipe import load

    recipes, settings = arguments.split_entries(entries)
    if recipes and inputs != type(inputs)():
        raise RecipeError("adapt takes a recipe or image folders, not both; leave one of them out")
    if recipes and budget is not None:
        raise RecipeError(f"--budget {budget} is for image folders; set steps=… for a recipe")
    return [load(entry, *settings) for entry in recipes] or folder_recipes(inputs, budget, config, settings, out)
