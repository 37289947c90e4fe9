"""The command ``adapt``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from overfly.commands.arguments import PathLike, RecipeLike, image_cache, split_entries
from overfly.core.choices import Cache
from overfly.core.errors import RecipeError

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

    from overfly.adaptation.selection import Selection
    from overfly.training.run import Run


@dataclass(frozen=True)
class AdaptResult:
    """A comparison of the networks before and after adaptation, and the recommended one."""

    path: Path
    selection: Selection

    @property
    def run(self) -> Run:
        """The adapted run's folder as an object."""
        from overfly.training.run import Run

        return Run.open(self.path)

    @property
    def best(self) -> Path:
        """File of the recommended network."""
        return self.path / "best.safetensors"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.markdown import Markdown

        yield Markdown(self.selection.table())
        yield f"result: {self.selection.summary}"
        for role, report in self.selection.candidates.items():
            yield from (f"  rejected {role}: {reason}" for reason in report.rejections)
        yield from (f"  {way}" for way in self.selection.differences)
        yield f"target labels opened: {self.selection.labels_opened}"
        yield f"recommended network: {self.best}"
        yield f"report: {self.path / 'selection.md'}"


def adapt(
    recipe: RecipeLike | None = None,
    *overrides: RecipeLike,
    source_images: PathLike | None = None,
    source_masks: PathLike | None = None,
    target_images: PathLike | None = None,
    classes: PathLike | None = None,
    checkpoint: PathLike | None = None,
    budget: str | None = None,
    estimate: bool = True,
    skip_familiarity: bool = False,
    out: PathLike = Path("runs"),
    device: str = "auto",
    devices: int = 1,
    workers: int = 0,
    checkpoint_every: int = 200,
    cache: Cache = "memory",
    quiet: bool = False,
) -> AdaptResult:
    """Adapt to images without labels, and report whether the result is better than the network before adaptation.

    Three candidates are compared without target labels: source only, recalibrated and adapted. Give a recipe, or
    several with the same start to choose among; or your own folders, the source with masks and the target without; or,
    without access to the source's images, a trained run (--checkpoint) and the target.

    Args:
        recipe: a recipe file whose method adapts.
        overrides: more recipe files, and settings to change in all, such as method.ema=0.999.
        source_images: folder or pattern of the labeled images.
        source_masks: folder or pattern of their masks.
        target_images: folder or pattern of the images to adapt to.
        classes: YAML file of the classes: names, or names and their colors; or settings of a folder domain.
        checkpoint: run or weights file to adapt, without its source's images.
        budget: time for your own folders, such as 90s, 10m or 2h; default 30m. The same command again resumes.
        estimate: estimate each candidate's mIoU on the target too, with an interval; takes about as long again.
        skip_familiarity: accept target images that are unfamiliar; use it where they show the source's classes.
        out: folder of the runs.
        device: auto, cpu, cuda, cuda:1 or mps.
        devices: number of devices, one process each.
        workers: processes that load images, for each device.
        checkpoint_every: steps between two checkpoints.
        cache: where decoded images are cached: memory, disk or off.
        quiet: print no progress.

    Returns:
        The comparison and the file of the recommended network.
    """
    from overfly.adaptation import auto_recipe, pipeline
    from overfly.adaptation.gate import Gate
    from overfly.commands.load_predictor import resolve_start
    from overfly.recipe import load
    from overfly.training.engine import TrainerConfig, launch_fabric

    def path(value: PathLike | None) -> Path | None:
        return None if value is None else Path(value)

    config = TrainerConfig(device, devices, workers, checkpoint_every, cache=image_cache(cache), quiet=quiet)
    start = None if checkpoint is None else resolve_start(Path(checkpoint))
    own = auto_recipe.Own(path(source_images), path(source_masks), path(target_images), path(classes), start)
    recipes, settings = split_entries([*([] if recipe is None else [recipe]), *overrides])
    if recipes and own != auto_recipe.Own():
        raise RecipeError("adapt takes a recipe or your own folders, not both; leave one of them out")
    if recipes and budget is not None:
        raise RecipeError(f"--budget {budget} is for your own folders; a recipe sets its length with steps=…")
    values = [load(each, *settings) for each in recipes]
    values = values or auto_recipe.of_folders(own, budget, config, settings, Path(out))
    run, selection = pipeline.adapt(
        *values, out=Path(out), fabric=launch_fabric(values[0], config), config=config, estimates=estimate,
        gate=Gate(familiar=0.0) if skip_familiarity else None,
    )  # fmt: skip
    return AdaptResult(run.path, selection)
