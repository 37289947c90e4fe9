"""The command ``benchmark``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from overfly.commands.arguments import MAX_SIDE, PathLike, PathLikes, check_bounds, image_cache, is_setting, parse_seeds
from overfly.core.choices import Cache, Split
from overfly.core.errors import RecipeError

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

    from overfly.benchmarking import BenchmarkTable


@dataclass(frozen=True)
class BenchmarkResult:
    """A benchmark's table."""

    table: BenchmarkTable
    folder: Path

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.markdown import Markdown

        yield Markdown(self.table.markdown()) if console.is_terminal else self.table.markdown()
        yield f"written: {self.folder / 'table.md'}, {self.folder / 'table.json'}"


def benchmark(
    recipes: PathLikes, *, seeds: str = "3", out: PathLike = Path("runs"), table: PathLike | None = None,
    split: Split = "val", size: int = 512, device: str = "auto", devices: int = 1, workers: int = 0,
    cache: Cache = "memory", checkpoint_every: int = 200, quiet: bool = False,
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

    Returns:
        The table.
    """
    from overfly import benchmarking
    from overfly.recipe import load
    from overfly.reporting.samples import draw_samples
    from overfly.training.engine import TrainerConfig, launch_fabric, run_on_rank_zero

    overrides = [str(entry) for entry in recipes if is_setting(entry)]
    files = benchmarking.expand_recipe_paths([entry for entry in recipes if not is_setting(entry)])
    if not files:
        raise RecipeError("benchmark needs at least one recipe; give YAML files or a folder of them")
    numbers = parse_seeds(seeds)
    check_bounds({"size": (size, 8, MAX_SIDE)})
    out = Path(out)
    folder = Path(table or out)
    for path in (out, folder):
        if path.exists() and not path.is_dir():
            raise RecipeError(f"{path} is a file; give --out and --table a folder")
    config = TrainerConfig(device, devices, workers, checkpoint_every, cache=image_cache(cache), quiet=quiet)
    fabric = launch_fabric(load(files[0], *overrides), config)
    done = benchmarking.run_benchmark(
        files, overrides, numbers, out=out, fabric=fabric, config=config, split=split, save_samples=draw_samples,
        workers=workers,
    )  # fmt: skip
    result = run_on_rank_zero(
        fabric,
        lambda: benchmarking.tabulate(done, numbers, split, size=size, device=str(fabric.device), changed=overrides),
    )
    run_on_rank_zero(fabric, lambda: benchmarking.write(result, folder))
    return BenchmarkResult(result, folder)
